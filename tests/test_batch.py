"""Many files: nothing lost and nothing repeated, whatever ends the run; bounded queues; shards; COCO results."""

from __future__ import annotations

import csv
import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from phantom import phantom, phantom_scan
from PIL import Image
from scans import BlockPredictor, TruthPredictor

from ctmasknet import ConfigError, InputError, create_model
from ctmasknet.batch import common_root, find_inputs, place_of, predict_files, process_shard
from ctmasknet.cli import main
from ctmasknet.data.scans import read_ahead
from ctmasknet.output import Log


@pytest.fixture(scope="module")
def predictor() -> BlockPredictor:
    return BlockPredictor(batch_size=3)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_slices(folder: Path, count: int, side: int = 64) -> list[str]:
    """Noise with one white block, at a place and of a size that tell the slices apart."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for k in range(count):
        pixels = rng.integers(0, 200, (side, side)).astype(np.uint8)
        pixels[k % 20 : k % 20 + 5, 10 : 15 + k % 31] = 255
        Image.fromarray(pixels).save(folder / f"{k:04d}.png")
    return [str(folder / f"{k:04d}.png") for k in range(count)]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# The record


def test_a_run_writes_a_line_per_file_in_order_and_its_facts(here, predictor):
    names = write_slices(Path("in put é"), 7)
    (here / "in put é" / "bad.png").write_text("no picture")
    (here / "in put é" / "notes.txt").write_text("no picture either")
    summary = predict_files(predictor, ["in put é"], "out", units=None)
    written = lines(Path("out/predictions.jsonl"))
    assert [line["source"] for line in written] == names
    assert (summary.slices, summary.failed, summary.left_out, summary.status) == (7, 1, 1, "complete")
    run = json.loads(Path("out/run.json").read_text())
    assert run["status"] == "complete"
    counts = {"inputs": 8, "slices": 7, "scans": 0, "scan_slices": 0, "bad_slices": 0}
    assert run["counts"] == counts | {"already_done": 0, "failed": 1, "left_out": 1}
    assert "bad.png" in run["failures"][0]["source"]
    assert run["settings"]["segmenter"]["variant"] == "maskrcnn_resnet18_t2"
    assert len(run["settings"]["segmenter"]["sha256"]) == 64
    assert {"ctmasknet", "torch", "torchvision", "python", "device"} <= set(run["environment"])
    for name in names:
        assert Path("out", f"{name}.json").is_file()
        assert Path("out", f"{name}.overlay.png").is_file()


def test_the_same_command_again_does_only_what_is_missing(here, predictor):
    write_slices(Path("a"), 4)
    predict_files(predictor, ["a"], "out", format="jsonl")
    before = Path("out/predictions.jsonl").read_bytes()
    write_slices(Path("a"), 6)
    summary = predict_files(predictor, ["a"], "out", format="jsonl")
    assert (summary.already_done, summary.predicted) == (4, 2)
    assert Path("out/predictions.jsonl").read_bytes().startswith(before)
    assert [line["source"] for line in lines(Path("out/predictions.jsonl"))] == [f"a/{k:04d}.png" for k in range(6)]


def test_other_settings_do_not_mix_into_a_run(here, predictor):
    write_slices(Path("a"), 2)
    predict_files(predictor, ["a"], "out", format="jsonl")
    with pytest.raises(ConfigError, match=r"run\.json: a run with another units"):
        predict_files(predictor, ["a"], "out", format="jsonl", units="range")
    assert len(lines(Path("out/predictions.jsonl"))) == 2


@pytest.mark.parametrize("options", [{"spacing": (1, 1, 2)}, {"units": "hu"}, {"format": "files"}])
def test_other_ways_to_read_do_not_mix_into_a_run(here, predictor, options):
    write_slices(Path("a"), 1)
    predict_files(predictor, ["a"], "out", format="jsonl")
    with pytest.raises(ConfigError, match="a run with another"):
        predict_files(predictor, ["a"], "out", **{"format": "jsonl", **options})


@pytest.mark.parametrize("options", [{"spacing": (1, 1, 2)}, {"series": "1.2.3"}])
def test_options_of_scans_are_not_dropped_in_silence(here, predictor, options):
    write_slices(Path("a"), 1)
    with pytest.warns(UserWarning, match="series and spacing are for scans: these were single slices"):
        predict_files(predictor, ["a"], "out", **options)


def test_another_configuration_of_the_same_weights_does_not_mix_into_a_run(here, predictor, monkeypatch):
    write_slices(Path("a"), 1)
    predict_files(predictor, ["a"], "out", format="jsonl")
    model = predictor.segmenter
    monkeypatch.setattr(model, "config", dataclasses.replace(model.config, max_size=800))
    with pytest.raises(ConfigError, match="a run with another segmenter"):
        predict_files(predictor, ["a"], "out", format="jsonl")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_no_text_are_shown_escaped_and_stop_nothing(here, capfd):
    (good,) = write_slices(Path("in"), 1, side=128)
    odd = [os.fsdecode(b"in/\xff.png"), "in/new\nline.png", "in/\x1b[31mred.png"]
    for name in odd:
        shutil.copy(good, name)
    Path("in/bad\x07.png").write_text("no picture")
    Path("list.txt").write_bytes(b"\n".join(os.fsencode(name) for name in [good, "nul\0.png", odd[0], odd[2]]))
    assert main(["predict", "in", "-o", "out", "--classifier", "none"]) == 2
    out, error = capfd.readouterr()
    assert "in/\\udcff.png: " in out
    assert "in/new\\nline.png: " in out
    assert "in/\\x1b[31mred.png: " in out
    assert "4 slices predicted, 1 failed" in out
    assert "in/bad\\x07.png" in error
    assert len(lines(Path("out/predictions.jsonl"))) == 4
    assert main(["predict", "--names", "list.txt", "-o", "out2", "--classifier", "none"]) == 2
    out, error = capfd.readouterr()
    assert "3 slices predicted, 1 failed" in out
    assert "nul\\x00.png: no file name holds a NUL" in error


def test_score_maps_are_written_or_refused_never_computed_for_nothing(here, capsys):
    nibabel = pytest.importorskip("nibabel")
    from scans import block_volume

    write_slices(Path("in"), 1, side=128)
    nibabel.save(nibabel.Nifti1Image(block_volume(), np.eye(4)), "in/scan.nii.gz")
    options = ["predict", "in", "-o", "out", "--classifier", "none", "--score-map"]
    for format in ("jsonl", "coco"):
        assert main([*options, "--format", format]) == 2
        assert "needs --format files" in capsys.readouterr().err
    assert main(options) == 2
    output = capsys.readouterr()
    assert "in/scan.nii.gz: a scan has no score map: predict it without --score-map" in output.err
    assert "1 slice predicted, 1 failed" in output.out
    assert np.load("out/in/0000.png.score_map.npy").shape == (128, 128)


@pytest.mark.parametrize("cut", [1, 30, 10_000])
def test_a_line_that_a_kill_cut_short_is_done_again(here, predictor, cut):
    write_slices(Path("a"), 5)
    predict_files(predictor, ["a"], "out", format="jsonl")
    path = Path("out/predictions.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole[: max(len(whole) - cut, 10)])
    predict_files(predictor, ["a"], "out", format="jsonl")
    assert path.read_bytes() == whole


def test_damage_inside_and_a_repeated_line_are_mended(here, predictor):
    write_slices(Path("a"), 4)
    predict_files(predictor, ["a"], "out", format="jsonl")
    path = Path("out/predictions.jsonl")
    one, two, three, four = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(one + bytes(len(two)) + b"\n" + three + three + four)
    predict_files(predictor, ["a"], "out", format="jsonl")
    assert sorted(path.read_bytes().splitlines(keepends=True)) == sorted([one, two, three, four])


def test_a_full_disk_stops_the_run_in_one_line_and_it_goes_on_later(here, predictor, monkeypatch, capsys):
    write_slices(Path("a"), 6)
    plain = os.write

    def full(handle: int, data: bytes) -> int:
        if b"0003.png" in data:
            plain(handle, data[:20])  # a disk fills in the middle of a line
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(handle, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(InputError, match=r"predictions\.jsonl: cannot be written .*disk space"):
        predict_files(predictor, ["a"], "out", format="jsonl")
    assert len(lines(Path("out/predictions.jsonl"))) == 3
    run = json.loads(Path("out/run.json").read_text())
    assert run["status"] == "stopped"
    assert "disk space" in run["stopped_by"]
    monkeypatch.setattr(os, "write", plain)
    assert predict_files(predictor, ["a"], "out", format="jsonl").predicted == 3
    assert len({line["source"] for line in lines(Path("out/predictions.jsonl"))}) == 6


def test_a_folder_that_cannot_be_written_stops_the_run_at_once(here, predictor, monkeypatch):
    write_slices(Path("a"), 5)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", refuse)  # root, who runs many a test, may write anywhere
    with pytest.raises(InputError, match="may write to"):
        predict_files(predictor, ["a"], "out")


def test_two_runs_into_one_folder_are_told_apart(here, predictor):
    write_slices(Path("a"), 2)
    ledger = Log(Path("out/predictions.jsonl"))
    with pytest.raises(ConfigError, match="another run is writing here"):
        predict_files(predictor, ["a"], "out")
    ledger.close()
    assert predict_files(predictor, ["a"], "out").predicted == 2


def test_a_name_too_long_for_its_results_is_one_failure(here, predictor):
    long = "x" * 245 + ".png"
    write_slices(Path("a"), 2)
    Path("a/0001.png").rename(Path("a") / long)
    summary = predict_files(predictor, ["a"], "out")
    assert (summary.predicted, summary.failed) == (1, 1)
    assert "shorter name" in summary.failures[0]["error"]


# Inputs


def test_folders_patterns_links_and_repeated_names_give_each_file_once(here):
    for folder in ("in", "in/deep/er", "other"):
        write_slices(Path(folder), 2)
    Path("in/.hidden.png").write_bytes(b"x")
    Path("in/loop").symlink_to(here / "in")
    Path("in/linked").symlink_to(here / "other")
    Path("in/self").symlink_to("self")
    Path("in/same.png").symlink_to(here / "in/0000.png")
    Path("in/deep/out").mkdir()
    Image.new("L", (64, 64)).save("in/deep/out/0000.png.overlay.png")
    found = [
        one.name
        for one in find_inputs(["in", "in/0001.png", "in/**/*.png", "other"], out="in/deep/out")
        if not one.error
    ]
    assert len(found) == len({os.path.realpath(name) for name in found}) == 6
    assert found[:2] == ["in/0000.png", "in/0001.png"]
    assert [one.error for one in find_inputs(["*.jpg"])] == ["*.jpg: no file matches. Check the pattern, and quote it."]


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(here):
    write_slices(Path(), 1)
    Path("0000.png").rename("a[1].png")
    assert [one.name for one in find_inputs(["a[1].png", "a*"])] == ["a[1].png"]


def test_dicom_folders_are_scans_and_with_slices_files(here):
    pytest.importorskip("pydicom")
    from scans import block_volume, write_series

    write_series(here / "study/one", np.moveaxis(block_volume(), 2, 0)[:2])
    write_series(here / "study/two", np.moveaxis(block_volume(), 2, 0)[:3])
    assert [(one.name, one.scan) for one in find_inputs(["study"])] == [("study/one", True), ("study/two", True)]
    assert len([one for one in find_inputs(["study"], slices=True) if not one.scan]) == 5


@pytest.mark.parametrize(
    ("inputs", "root"),
    [
        (["a/b.png", "c"], None),
        (["/data/val"], "/data"),
        (["/data/val/x.png", "/data/train/y/z.png"], "/data"),
        (["/data/val/**/*.png"], "/data/val"),
        (["a/b.png", "/elsewhere/c.png"], "/"),
    ],
)
def test_inputs_share_a_folder(inputs, root):
    assert common_root(inputs) == root


def test_results_lie_at_their_inputs_path_from_here_or_from_the_shared_folder(tmp_path, monkeypatch, predictor):
    write_slices(tmp_path / "data/val", 1)
    (tmp_path / "data/link").symlink_to(tmp_path / "data/val")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert place_of("a/../b/c.png") == Path("b/c.png")
    predict_files(predictor, [tmp_path / "data/link", "../data/val/missing.png"], "out")
    assert Path("out/link/0000.png.json").is_file()
    # What is added later keeps its place below the first run's folder, or is refused.
    write_slices(tmp_path / "data/val/more", 1, side=70)
    predict_files(predictor, [tmp_path / "data/val/more"], "out")
    assert Path("out/val/more/0000.png.json").is_file()
    write_slices(tmp_path / "other", 1)
    with pytest.raises(ConfigError, match=r"run\.json: a run of files below .*data, where these are not"):
        predict_files(predictor, [tmp_path / "other"], "out")


def test_names_restrict_the_inputs_and_those_missing_are_reported(here, predictor):
    write_slices(Path("a"), 4)
    Path("names.txt").write_text("0001\nelsewhere/0003.png\n0009.png\n")
    summary = predict_files(predictor, ["a"], "out", names="names.txt", format="jsonl")
    assert [line["source"] for line in lines(Path("out/predictions.jsonl"))] == ["a/0001.png", "a/0003.png"]
    error = "0009.png: listed in names, but not among the inputs. Correct the list."
    assert summary.failures == [{"source": "0009.png", "error": error, "scan": False}]
    assert predict_files(predictor, ["a"], "out2", names=["0002"], format="jsonl").predicted == 1


# Slices and scans in one run


def test_scans_and_slices_share_a_run(here, predictor):
    nibabel = pytest.importorskip("nibabel")
    pytest.importorskip("pydicom")
    from scans import block_volume, write_series

    write_slices(Path("in/pictures"), 4)
    write_series(here / "in/series", np.moveaxis(block_volume(), 2, 0))
    nibabel.save(nibabel.Nifti1Image(block_volume(), np.diag([0.8, 0.7, 2, 1])), "in/scan.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.zeros((40, 40, 3), np.int16), np.eye(4)), "in/zeros.nii.gz")
    summary = predict_files(predictor, ["in"], "out")
    assert (summary.slices, summary.scans, summary.scan_slices, summary.failed) == (4, 2, 12, 1)
    assert summary.summary.startswith("4 slices and 2 scans (12 slices) predicted, 1 failed; ")
    by_file = {line["source"]: line for line in lines(Path("out/predictions.jsonl"))}
    assert by_file["in/scan.nii.gz"]["lesion_ml"] == pytest.approx(24 * 0.8 * 0.7 * 2 / 1000)
    assert by_file["in/series"]["kind"] == "scan"
    for name in ("in/scan.nii.gz", "in/series"):
        mask = np.asarray(nibabel.load(f"out/{name}.lesions.nii.gz").dataobj)
        assert mask.sum() == 24
    assert predict_files(predictor, ["in"], "out").already_done == 6


SCAN_COLUMNS = """source slices slices_failed slices_with_lesions lesion_ml units score_threshold lesions
outside_lesion_ml right_lung_ml right_lesion_ml right_lesion_percent left_lung_ml left_lesion_ml left_lesion_percent
both_lung_ml both_lesion_ml both_lesion_percent spacing_x_mm spacing_y_mm spacing_z_mm problems
segmenter segmenter_sha256 classifier classifier_sha256 version"""


@pytest.mark.parametrize("processes", [1, 2])
def test_scans_csv_has_a_row_per_scan_that_says_what_its_json_says(here, processes):
    nibabel = pytest.importorskip("nibabel")
    made = phantom_scan([(-80.0, 20.0, 0.0, 22.0)], size=96, slices=24, thickness=10.0)
    z, y, x = made.spacing
    Path("in").mkdir()
    nibabel.save(nibabel.Nifti1Image(made.hu.T + 1024, np.diag([-x, -y, z, 1])), "in/lungs.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.zeros((40, 40, 3), np.int16), np.eye(4)), "in/empty.nii.gz")
    write_slices(Path("in/pictures"), 1)
    (here / "in/pictures/bad.png").write_text("no picture")  # fails, too, but is no scan
    predictor = TruthPredictor((made.lesions > 0).astype(np.uint8))
    for rank in range(processes):
        predict_files(predictor, ["in"], "out", units="hu", format="jsonl", shard=(rank, processes))
    with Path("out/scans.csv").open(newline="") as stream:
        table = csv.DictReader(stream)
        good, failed = table
    assert table.fieldnames == SCAN_COLUMNS.split()
    facts = json.loads(Path("out/in/lungs.nii.gz.json").read_text())
    figures = facts | facts["involvement"] | {"lesions": len(facts["lesions"])}
    figures |= {f"spacing_{axis}_mm": mm for axis, mm in zip("xyz", facts["spacing_mm"], strict=True)}
    model = facts["models"]["segmenter"]
    texts = {"source": "in/lungs.nii.gz", "units": "hu+1024", "problems": " | ".join(facts["problems"])}
    texts |= {"segmenter": model["variant"], "segmenter_sha256": model["sha256"], "classifier": ""}
    texts |= {"classifier_sha256": "", "version": facts["version"]}
    assert "1024" in texts["problems"]
    for name, value in good.items():
        assert value == texts[name] if name in texts else float(value) == pytest.approx(figures[name], rel=1e-5), name
    assert float(good["right_lesion_percent"]) > 1
    stated = {key: value for key, value in failed.items() if value}
    reason = stated.pop("problems")
    assert reason.startswith("in/empty.nii.gz: ")
    same = ("segmenter", "segmenter_sha256", "version")
    assert stated == {"source": "in/empty.nii.gz", **{name: texts[name] for name in same}}


def test_the_command_line_predicts_a_scan_and_says_where_the_mask_is(here, capsys):
    nibabel = pytest.importorskip("nibabel")
    hu = np.flip(phantom(0, size=128).hu.T, (0, 1))[..., None]
    nibabel.save(nibabel.Nifti1Image(hu, np.diag([2.0, 2, 5, 1])), "scan.nii")
    assert main(["predict", "scan.nii", "-o", "out", "--classifier", "none", "--json"]) == 0
    (facts,) = json.loads(capsys.readouterr().out)["results"]
    assert all(Path(path).is_file() for path in facts["paths"])
    assert facts["slices"] == 1
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "run.json",
        "scan.nii.json",
        *(f"scan.nii.lesion{kind}" for kind in ("_ids.nii.gz", "s.csv", "s.nii.gz")),
        *(f"scan.nii.{kind}" for kind in ("lungs.nii.gz", "montage.png", "report.pdf", "report.png", "slices.csv")),
    ]


def test_the_command_line_takes_lists_shards_and_formats(here, capsys):
    write_slices(Path("a"), 4, side=128)
    Path("list.txt").write_text("a/0000.png\n\na/0001.png\na/0002.png\n")
    arguments = ["predict", "--names", "list.txt", "-o", "out", "--classifier", "none"]
    assert main([*arguments, "--format", "jsonl", "--shard", "1/2"]) == 0
    assert re.search(r"1 slice predicted; \d+ s -> out \(process 1 of 2\)", capsys.readouterr().out)
    assert [path.name for path in Path("out").iterdir()] == ["parts"]
    assert main([*arguments, "--format", "coco"]) == 0
    assert "2 slices predicted, 1 done before" in capsys.readouterr().out
    assert len(lines(Path("out/predictions.jsonl"))) == 3
    assert Path("out/coco_results.json").is_file()
    for wrong in (["--shard", "2/2"], ["--shard", "x"], ["--batch-size", "0"], ["--names", "missing.txt"]):
        assert main(["predict", "a", "-o", "out2", "--classifier", "none", *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert main(["predict", "-o", "out2"]) == 2
    assert "nothing to predict" in capsys.readouterr().err


# Queues


@pytest.mark.parametrize(("reading", "using"), [(0.02, 0), (0, 0.02)], ids=["slow reader", "slow model"])
def test_queues_stay_bounded_whichever_side_is_slower(reading, using):
    begun = finished = most = 0
    lock = threading.Lock()

    def read(item: int) -> int:
        nonlocal begun, most
        with lock:
            begun += 1
            most = max(most, begun - finished)
        time.sleep(reading)
        return item * item

    results = []
    for item, value in read_ahead(read, iter(range(40)), threads=3, depth=6):
        time.sleep(using)
        results.append((item, value))
        with lock:
            finished += 1
    assert results == [(item, item * item) for item in range(40)]
    assert most <= 7  # depth, and the one in use


def test_reading_ahead_takes_its_items_lazily_and_stops_when_left():
    taken = []

    def items():
        for item in range(1000):
            taken.append(item)
            yield item

    stream = read_ahead(str, items(), threads=2, depth=4)
    assert next(stream) == (0, "0")
    stream.close()
    assert len(taken) == 4
    with pytest.raises(ZeroDivisionError):
        list(read_ahead(lambda item: 1 // item, [1, 0], threads=2, depth=4))


@pytest.mark.parametrize("slow", ["reader", "model", "neither"])
def test_slow_readers_and_slow_models_give_the_same_lines(here, slow, monkeypatch):
    import ctmasknet.batch

    names = write_slices(Path("a"), 12)
    predictor = BlockPredictor(batch_size=4)
    read, forward = ctmasknet.batch.read_slice, predictor._predict
    if slow == "reader":
        monkeypatch.setattr(ctmasknet.batch, "read_slice", lambda *a, **k: (time.sleep(0.03), read(*a, **k))[1])
    if slow == "model":
        monkeypatch.setattr(predictor, "_predict", lambda *a: (time.sleep(0.1), forward(*a))[1])
    predict_files(predictor, names, "out", format="jsonl")
    written = lines(Path("out/predictions.jsonl"))
    assert [line["source"] for line in written] == names
    areas = [line["lesions"][0]["area_px"] for line in written]
    assert areas == [5 * (5 + k % 31) for k in range(12)]
    assert predictor.batches == [4, 4, 4]


# Processes


def test_shards_do_every_file_once_and_join_to_what_one_process_writes(here, predictor):
    write_slices(Path("a"), 7)
    (here / "a" / "bad.png").write_text("no picture")
    alone = predict_files(predictor, ["a"], "alone", format="jsonl")
    first = predict_files(predictor, ["a"], "both", format="jsonl", shard=(0, 2))
    assert not Path("both/predictions.jsonl").exists()  # half a result must not look like one
    second = predict_files(predictor, ["a"], "both", format="jsonl", shard=(1, 2))
    assert first.inputs + second.inputs == alone.inputs == 8
    assert sorted(Path("both/predictions.jsonl").read_bytes().splitlines()) == sorted(
        Path("alone/predictions.jsonl").read_bytes().splitlines()
    )
    run = json.loads(Path("both/run.json").read_text())
    assert run["counts"] == json.loads(Path("alone/run.json").read_text())["counts"]
    assert run["environment"]["processes"] == 2
    # Another number of processes goes on from there.
    write_slices(Path("a"), 9)
    assert sum(predict_files(predictor, ["a"], "both", format="jsonl", shard=(r, 3)).predicted for r in range(3)) == 2
    assert len(lines(Path("both/predictions.jsonl"))) == 9


def test_the_environment_of_torchrun_names_the_shard(monkeypatch):
    assert process_shard() == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert process_shard() == (3, 8)
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(ConfigError, match="WORLD_SIZE"):
        process_shard()


# COCO results


def test_coco_results_score_a_perfect_prediction_perfectly(here, predictor, capsys):
    coco_api = pytest.importorskip("pycocotools.coco")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    mask_api = pytest.importorskip("pycocotools.mask")
    names = write_slices(Path("a"), 5)
    predict_files(predictor, names[::-1], "out", format="coco")
    listed = {image["file_name"]: image for image in json.loads(Path("out/coco_images.json").read_text())["images"]}
    assert sorted(listed) == names
    annotations = []
    for k, name in enumerate(names):
        mask = np.asarray(Image.open(name)) == 255
        assert (listed[name]["height"], listed[name]["width"]) == mask.shape
        rle = mask_api.encode(np.asfortranarray(mask.astype(np.uint8)))
        box = mask_api.toBbox(rle).tolist()
        rle["counts"] = rle["counts"].decode()
        annotations.append(
            {"id": k + 1, "image_id": listed[name]["id"], "category_id": 1, "segmentation": rle, "bbox": box}
            | {"area": float(mask.sum()), "iscrowd": 0}
        )
    content = {"info": {}, "annotations": annotations, "categories": [{"id": 1, "name": "lesion"}]}
    Path("truth.json").write_text(json.dumps({**content, "images": list(listed.values())}))
    truth = coco_api.COCO("truth.json")
    found = truth.loadRes("out/coco_results.json")
    for kind in ("bbox", "segm"):
        scores = evaluation.COCOeval(truth, found, kind)
        scores.evaluate()
        scores.accumulate()
        scores.summarize()
        assert scores.stats[0] == pytest.approx(1)


# Slow: real processes, kills, memory


def tiny_segmenter(folder: Path) -> Path:
    quick = {"min_size": 64, "max_size": 64, "rpn_post_nms_top_n_test": 20}
    return create_model("maskrcnn_resnet18_t2", **quick, box_score_thresh=0.0).save_pretrained(folder)


def command(weights: Path, *more: str) -> list[str]:
    fixed = ["--segmenter", str(weights), "--classifier", "none", "--device", "cpu", "--score-threshold", "0.5"]
    return [sys.executable, "-m", "ctmasknet", "predict", "in", *fixed, "--format", "jsonl", *more]


def run_whole(arguments: list[str], **environment: str) -> None:
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, env=settings)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_run_survives_three_kills_without_losing_or_repeating_a_line(here):
    count = int(os.environ.get("CTMASKNET_KILL_SLICES", "1000"))
    names = write_slices(Path("in"), count)
    weights = tiny_segmenter(here / "weights")
    ledger = Path("out/predictions.jsonl")
    for share in (0.2, 0.5, 0.8):
        process = subprocess.Popen(command(weights, "-o", "out"), stdout=subprocess.DEVNULL)
        while not ledger.exists() or ledger.read_bytes().count(b"\n") < share * count:
            assert process.poll() is None, "ended before it could be killed"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert json.loads(Path("out/run.json").read_text())["status"] == "running"
    run_whole(command(weights, "-o", "out"))
    run_whole(command(weights, "-o", "alone"))
    assert [line["source"] for line in lines(ledger)] == names
    assert ledger.read_bytes() == Path("alone/predictions.jsonl").read_bytes()


@pytest.mark.slow
def test_two_launched_processes_equal_one(here):
    pytest.importorskip("accelerate")
    count = int(os.environ.get("CTMASKNET_LAUNCH_SLICES", "100"))
    write_slices(Path("in"), count)
    weights = tiny_segmenter(here / "weights")
    # accelerate has no launcher for several processes on CPUs but MPI; this one starts them all the same.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m"]
    alone = command(weights, "-o", "alone")
    run_whole(alone)
    run_whole([sys.executable, *launch, *command(weights, "-o", "both")[2:]])
    run_whole(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *command(weights, "-o", "run")[1:]]
    )
    expected = sorted(Path("alone/predictions.jsonl").read_bytes().splitlines())
    assert len(expected) == count
    for folder in ("both", "run"):
        assert sorted(Path(folder, "predictions.jsonl").read_bytes().splitlines()) == expected
        parts = [lines(path) for path in sorted(Path(folder, "parts").glob("predictions-*.jsonl"))]
        assert [len(part) for part in parts] == [-(-count // 2), count // 2]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_stays_flat_over_5000_slices(here):
    count = int(os.environ.get("CTMASKNET_MEMORY_SLICES", "5000"))
    write_slices(Path("in"), count)
    from ctmasknet import Predictor

    # No lesion scores this high: oneDNN keeps code for every number of lesions it meets, which is not ours to measure.
    predictor = Predictor(tiny_segmenter(here / "weights"), None, device="cpu", batch_size=4, score_threshold=0.99)
    page = os.sysconf("SC_PAGE_SIZE")
    used: list[float] = []

    def look(result: object) -> None:
        used.append(int(Path("/proc/self/statm").read_text().split()[1]) * page / 2**20)

    predict_files(predictor, ["in"], "out", format="jsonl", on_result=look)
    assert len(used) == count
    early, late = np.median(used[count // 5 : 2 * count // 5]), np.median(used[-count // 5 :])
    print(f"MiB at slices {count // 5}..{2 * count // 5}: {early:.1f}, in the last fifth: {late:.1f}")  # noqa: T201
    assert late - early < 16
