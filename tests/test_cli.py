"""The command line, run as people run it."""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
from phantom import phantom
from PIL import Image

from ctmasknet import doctor
from ctmasknet.cli import main
from ctmasknet.cli.parser import build_parser
from ctmasknet.cli.shared import as_flags
from ctmasknet.registry import VARIANTS

SHARED = Path(__file__).parents[2] / "shared"


def test_list_as_text_and_json(capsys):
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in VARIANTS)
    assert main(["list", "*_t1", "--task", "segmentation", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [fact["name"] for fact in facts] == ["maskrcnn_resnet18_t1", "maskrcnn_resnet34_t1"]


def test_list_of_nothing_is_the_users_to_mend(capsys):
    assert main(["list", "resnet999"]) == 2
    assert "no variant matches" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(VARIANTS))
def test_info(name, capsys):
    assert main(["info", name]) == 0
    assert f"{VARIANTS[name].num_values:,} values" in capsys.readouterr().out
    assert main(["info", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_values"] == VARIANTS[name].num_values


def test_an_unknown_name_is_one_line_and_exit_code_two(capsys):
    assert main(["info", "maskrcnn_resnet19"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ctmasknet info: unknown variant 'maskrcnn_resnet19': did you mean")
    assert error.count("\n") == 1


def test_predict_goes_on_past_bad_files_and_keeps_equal_names_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b", "with space ü"):
        Path(folder).mkdir()
        Image.fromarray(phantom(0, size=256).image).save(f"{folder}/x.png")
    Path("text.png").write_text("not an image")
    Path("empty").mkdir()
    files = ["a/x.png", "text.png", "b/x.png", "missing.png", "empty", "with space ü/x.png"]
    assert main(["predict", *files, "-o", "out", "--classifier", "none"]) == 2
    output = capsys.readouterr()
    lines = output.err.strip().splitlines()
    assert len(lines) == 3
    assert all(line.startswith("ctmasknet predict: ") for line in lines)
    assert ["text.png" in lines[0], "missing.png" in lines[1], lines[2].startswith("ctmasknet predict: empty:")] == [
        True
    ] * 3
    assert "3 slices predicted, 3 failed" in output.out
    for folder in ("a", "b", "with space ü"):
        record = json.loads(Path(f"out/{folder}/x.png.json").read_text())
        assert record["source"].endswith("x.png")
        assert Image.open(f"out/{folder}/x.png.overlay.png").size[0] >= 768


def test_predict_states_facts_as_json(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(phantom(0, size=256).image).save("x.png")
    assert main(["predict", "x.png", "bad.png", "-o", "out", "--json"]) == 2
    facts = json.loads(capsys.readouterr().out)
    assert facts["counts"]["slices"] == facts["counts"]["failed"] == 1
    assert facts["caveats"]
    good, bad = facts["results"]
    assert set(good["class_probabilities"]) == {"control", "pneumonia", "covid"}
    assert [Path(path).name for path in good["paths"]] == ["x.png.overlay.png", "x.png.json"]
    assert "no such file" in bad["error"].lower()


def test_one_slice_states_its_caveats_and_is_predicted_anew_each_time(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(phantom(0, size=256).image).save("x.png")
    for threshold in ("0.5", "0.9"):
        assert main(["predict", "x.png", "-o", "out", "--score-threshold", threshold]) == 0
        line, *caveats = capsys.readouterr().out.splitlines()
        assert line.startswith("x.png: ")
        assert "COVID-19" in line or "control" in line or "pneumonia" in line
        run = json.loads(Path("out/run.json").read_text())
        assert run["settings"]["score_threshold"] == float(threshold)
        assert run["counts"]["slices"] == 1
        assert caveats == [f"({caveat})" for caveat in run["caveats"]] != []
    assert not Path("out/predictions.jsonl").exists()
    assert main(["predict", "x.png", "-o", "out", "-q"]) == 0
    assert capsys.readouterr().out == ""


def test_help_is_what_a_bare_command_prints_and_every_command_can_be_quiet(capsys):
    for bare in ([], ["data"]):
        assert main(bare) == 0
        assert capsys.readouterr().out.startswith("usage: ctmasknet")
    commands = dict(subcommands(build_parser()))
    commands |= subcommands(commands.pop("data"))
    for command in commands.values():
        assert "-q, --quiet" in command.format_help()
        assert "-v, --verbose" in command.format_help()


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (group,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return group.choices


@pytest.mark.parametrize("wrong", [["predct", "x"], ["predict", "x.png"], ["predict", "x", "-o", "y", "--units", "xx"]])
def test_a_mistyped_command_is_one_line(wrong, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(wrong)
    error = capsys.readouterr().err
    assert error.startswith("ctmasknet")
    assert error.count("\n") == 1
    assert "--help" in error


def test_errors_speak_of_flags(tmp_path, capsys):
    assert main(["predict", "x.png", "-o", str(tmp_path), "--score-threshold", "7"]) == 2
    assert "--score-threshold 7.0: must lie in 0..1" in capsys.readouterr().err
    options = argparse.Namespace(units=None, score_map=True, spacing=None)
    assert as_flags("spacing=(1.0, 1, 0.5): three", options) == "--spacing 1.0 1 0.5: three"
    text = "a_1/units=2/x.tif: pass units=\"hu\" or units='range', or draw none: score_map=True; lr=3 stays"
    expected = "a_1/units=2/x.tif: pass --units hu or --units range, or draw none: --score-map; lr=3 stays"
    assert as_flags(text, options) == expected


def test_names_are_escaped_and_cut_whatever_prints_them(tmp_path, monkeypatch, capsys):
    assert main(["info", "x" * 5000 + "\x1b[31m"]) == 2
    error = capsys.readouterr().err
    assert error.rstrip("\n").isprintable()
    assert len(error) < 700
    assert error.startswith("ctmasknet info: unknown variant 'xxx")
    folder = tmp_path / "red\x1b[31m" / "imgs"
    folder.mkdir(parents=True)
    (tmp_path / "red\x1b[31m" / "masks").mkdir()
    (folder / "bell\x07.png").write_bytes(b"no picture")
    assert main(["data", "check", str(folder.parent)]) == 2
    assert main(["predict", str(folder), "-o", str(tmp_path / "out"), "--classifier", "none"]) == 2
    assert main(["export", str(folder), "-o", str(tmp_path / "x.onnx")]) == 2
    output = capsys.readouterr()
    for text in (output.out, output.err):
        assert "red\\x1b[31m" in text
        assert all(line.isprintable() for line in text.split("\n"))
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    assert main(["list"]) == 0
    logging.getLogger("ctmasknet.engine").warning("slice %s", "a\x1bb")
    assert capsys.readouterr().err == "slice a\\x1bb\n"


def test_predict_elsewhere_and_upwards_stays_in_the_output_folder(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "here").mkdir()
    Image.fromarray(phantom(0, size=256).image).save(tmp_path / "data" / "x.png")
    monkeypatch.chdir(tmp_path / "here")
    assert main(["predict", "../data/x.png", "-o", "out", "--classifier", "none"]) == 0
    written = sorted(path.name for path in Path("out").rglob("*.*"))
    assert written == ["run.json", "x.png.json", "x.png.overlay.png"]


def test_predict_without_permission_to_write_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(phantom(0, size=256).image).save("x.png")
    Path("out").write_text("a file in the way")
    assert main(["predict", "x.png", "-o", "out", "--classifier", "none"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_demo_says_what_was_there_what_was_found_and_where_the_picture_is(tmp_path, capsys):
    assert main(["demo", "-o", str(tmp_path), "--json"]) == 0
    output = capsys.readouterr()
    assert ["Starting" in output.err, "Loading" in output.err, "Predicting" in output.err] == [True] * 3
    facts = json.loads(output.out)
    assert len(facts["lesions_drawn"]) == 4
    assert facts["found"] >= 3
    assert [Path(path).name for path in facts["paths"]] == ["slice.png.overlay.png", "slice.png.json"]
    assert Image.open(facts["source"]).size == (512, 512)
    assert facts["source"] == str(tmp_path / "slice.png")
    assert main(["demo", "-o", str(tmp_path), "--segmenter", "none"]) == 0
    text = capsys.readouterr().out
    assert "0 of 4 lesions found" in text
    assert "not a medical device" in text


def test_doctor_finds_this_installation_sound(capsys):
    assert main(["doctor", "--json"]) == 0
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert checks["torch and torchvision"]["ok"]
    assert any(name.startswith("weights of") for name in checks)


def test_doctor_says_what_each_extra_would_add(monkeypatch):
    def installed(package):
        if package in ("pydicom", "gradio", "onnxruntime"):
            raise PackageNotFoundError
        return "1.0"

    monkeypatch.setattr(doctor, "version", installed)
    found = {check.name: check.detail for check in doctor.examine() if check.name.startswith("extra")}
    extras = ("io", "dicom", "train", "plots", "export", "openvino", "demo")
    assert set(found) == {f"extra {extra}" for extra in extras}
    assert found["extra io"] == "pip install 'ctmasknet[io]' (in a checkout: '.[io]') adds pydicom"
    assert found["extra demo"].endswith("adds pydicom, gradio")
    assert found["extra export"].endswith("adds onnxruntime")
    assert found["extra train"] == "installed"


def test_doctor_explains_a_torchvision_that_does_not_match(monkeypatch, capsys):
    import torchvision.ops

    def broken(*args):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(torchvision.ops, "nms", broken)
    check = doctor._torch()
    assert not check.ok
    assert "pip install --force-reinstall torch torchvision" in check.detail
    assert main(["doctor"]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_help_teaches_and_needs_no_torch():
    code = (
        "import sys\nfrom ctmasknet.cli import main\n"
        "try:\n    main(['predict', '--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Examples:" in done.stdout
    assert "--units" in done.stdout


def test_the_module_runs_as_a_command():
    done = subprocess.run([sys.executable, "-m", "ctmasknet", "--version"], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("ctmasknet ")


def test_a_16_bit_picture_warns_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(phantom(0, size=256).image.astype(np.uint16) * 100).save("deep.png")
    command = [sys.executable, "-m", "ctmasknet", "predict", "deep.png", "-o", "out", "--classifier", "none"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr.startswith("ctmasknet: deep.png: not an 8-bit image")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="needs the research data")
def test_a_malformed_dicom_is_explained_not_guessed(tmp_path, capsys):
    pytest.importorskip("pydicom")
    bad, good = SHARED / "data/dicom/malformed_nm.dcm", SHARED / "data/dicom/ny-sbu_a046441_23.dcm"
    assert main(["predict", str(bad), str(good), "-o", str(tmp_path), "--classifier", "none"]) == 2
    output = capsys.readouterr()
    assert "malformed_nm.dcm" in output.err
    assert "units" in output.err
    assert "1 slice predicted, 1 failed" in output.out
