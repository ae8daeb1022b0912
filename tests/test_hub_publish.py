"""Saving and publishing: what is written, what is claimed, what the Hub gets."""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_client import Client
from hub_server import OWNER, TOKEN, HubServer, running_hub, sha256
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from ctmasknet import ConfigError, WeightsError, create_model, doctor, from_pretrained
from ctmasknet.cli import main
from ctmasknet.example import SLICE
from ctmasknet.registry import DEFAULT_CLASSIFIER, DEFAULT_SEGMENTER
from ctmasknet.weights import hub as hub_module
from ctmasknet.weights import manifest as manifest_module
from ctmasknet.weights.files import read_weights, sha256_of
from ctmasknet.weights.manifest import ManifestEntry, manifest
from ctmasknet.weights.publish import Published, packed, push_folder

ROOT = Path(__file__).parents[1]
SEGMENTER, CLASSIFIER = "maskrcnn_resnet18_t2", "ctmasknet_resnet18_t2"
FILES = ["README.md", "config.json", "golden.safetensors", "model.safetensors"]
SMALL: dict[str, Any] = {"min_size": 64, "max_size": 128, "rpn_post_nms_top_n_test": 50}
FACTS: dict[str, Any] = {"metrics": {"ap50": 0.5, "dice": 1}, "dataset": "owner/ct-scans", "license": "cc-by-nc-sa-4.0"}


def small(name: str = SEGMENTER, **config: Any) -> Any:
    torch.manual_seed(3)
    model = create_model(name, **SMALL, **config)
    model.metadata = {"classes": ["background", "lesion"] if name == SEGMENTER else ["control", "pneumonia", "covid"]}
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small().save_pretrained(tmp_path_factory.mktemp("saved"), **FACTS)


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


# --- saving


@pytest.mark.parametrize("name", [SEGMENTER, CLASSIFIER])
def test_saving_and_loading_is_exact(name, tmp_path):
    model = small(name, num_classes=3, image_classes=20)
    assert model.save_pretrained(tmp_path) == tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    again = from_pretrained(tmp_path, verify=True)
    assert again.config == model.config
    assert type(again) is type(model)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key


def test_saving_leaves_the_model_as_it_was(tmp_path):
    model = small().train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, dtype="float16")
    assert model.training
    assert model.roi_heads.score_thresh == 0.75
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_float16_halves_the_file_and_its_golden_file_belongs_to_the_rounded_values(saved, tmp_path):
    small().save_pretrained(tmp_path, dtype="float16")
    assert (tmp_path / "model.safetensors").stat().st_size < 0.51 * (saved / "model.safetensors").stat().st_size
    again = from_pretrained(tmp_path, verify=True)
    assert again.backbone.body.conv1.weight.dtype == torch.float32
    with pytest.raises(ConfigError, match="dtype='int8'"):
        small().save_pretrained(tmp_path, dtype="int8")


def test_the_card_has_the_metadata_the_hub_reads(saved):
    data = ModelCard.load(saved / "README.md").data
    assert data.license == "cc-by-nc-sa-4.0"
    assert data.library_name == "ctmasknet"
    assert data.pipeline_tag == "image-segmentation"
    assert "chest-ct" in data.tags
    assert data.datasets == ["owner/ct-scans"]
    assert data.metrics == ["ap50", "dice"]
    assert {result.metric_type: result.metric_value for result in data.eval_results} == FACTS["metrics"]
    assert {result.dataset_type for result in data.eval_results} == {"owner/ct-scans"}


def test_a_sentence_about_the_data_is_no_data_set_id(tmp_path):
    small(CLASSIFIER).save_pretrained(tmp_path, metrics={"accuracy": 0.9}, dataset="684 slices: three collections.")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.datasets is None
    assert data.eval_results[0].dataset_name == "684 slices: three collections."
    assert data.pipeline_tag == "image-classification"


@pytest.mark.parametrize("value", ["high", float("nan"), True, None])
def test_metrics_are_numbers(value, tmp_path):
    with pytest.raises(ConfigError, match=r"metrics\['ap50'\]"):
        small().save_pretrained(tmp_path, metrics={"ap50": value})


def test_metadata_that_could_not_be_read_again_are_not_written(tmp_path):
    model = small()
    model.metadata["license"] = None
    with pytest.raises(WeightsError, match=r"config\.json: license=None: text is needed"):
        model.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_what_was_said_of_weights_goes_along_until_they_change(saved, tmp_path):
    model = from_pretrained(saved)
    model.save_pretrained(tmp_path / "same")
    assert read_weights(tmp_path / "same").metadata == read_weights(saved).metadata
    with torch.no_grad():
        model.backbone.body.conv1.weight[0, 0, 0, 0] += 1
    model.save_pretrained(tmp_path / "changed")
    left = read_weights(tmp_path / "changed").metadata
    before = {"variant": SEGMENTER, "license": "cc-by-nc-sa-4.0", "dataset": "owner/ct-scans"}
    terms = {"license": "cc-by-nc-sa-4.0", "derived_from": [before]}
    assert left == terms | {"classes": ["background", "lesion"]}
    model.metadata["note"] = "trained on"
    model.save_pretrained(tmp_path / "stated", metrics={"ap50": 0.6})
    assert read_weights(tmp_path / "stated").metadata == left | {"note": "trained on", "metrics": {"ap50": 0.6}}


def test_new_heads_keep_the_licence_but_no_figures(saved):
    kept = from_pretrained(saved, num_classes=3).metadata
    assert (kept["license"], kept["derived_from"][0]["dataset"]) == ("cc-by-nc-sa-4.0", "owner/ct-scans")
    assert set(kept) == {"license", "derived_from"}


# --- golden files


@pytest.mark.parametrize("name", [DEFAULT_SEGMENTER, DEFAULT_CLASSIFIER])
def test_a_bundled_golden_file_holds_what_the_model_says_of_its_image(name):
    file = next(entry.path for entry in manifest() if entry.variant == name).with_name("golden.safetensors")
    golden = load_file(file)
    with Image.open(SLICE) as picture:
        image = torch.from_numpy(np.array(picture)[::2, ::2].copy())
    assert torch.equal(golden["image"], image)
    recorded_with = {"box_score_thresh": 0.0, "box_nms_thresh": 0.5} if name == DEFAULT_SEGMENTER else {}
    model = create_model(name, weights="default", **recorded_with)
    with torch.inference_mode():
        result = model([(image.float() / 255).expand(3, -1, -1)])[0]
    assert len(golden["scores"]) >= 3
    for box, score in zip(golden["boxes"], golden["scores"], strict=True):
        away = (result["boxes"] - box).abs().amax(1) + 100 * (result["scores"] - score).abs()
        assert away.min() < 0.2
    if "logits" in golden:
        torch.testing.assert_close(result["probabilities"], golden["probabilities"], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": lambda t: t - 0.05}, "scores differ by up to 0.05"),
        ({"boxes": lambda t: t + 5}, "boxes differ by up to"),
        ({"areas": lambda t: t + 500}, "areas differ by up to 5"),
        ({"labels": lambda t: t + 1}, "labels differ by up to 1"),
        ({"labels": lambda t: t.float()}, "contradict each other"),
        ({"boxes": lambda t: t[:2].contiguous()}, "contradict each other"),
        ({"image": lambda t: t.float()}, "no .* uint8 image"),
        ({"logits": lambda t: torch.zeros(3)}, "holds .*logits"),
    ],
)
def test_golden_outputs_that_differ_are_reported(change, message, folder):
    golden = load_file(folder / "golden.safetensors")
    for key, edit in change.items():
        golden[key] = edit(golden.get(key))
    save_file(golden, folder / "golden.safetensors")
    with pytest.raises(WeightsError, match=rf"golden\.safetensors: .*{message}"):
        from_pretrained(folder, verify=True)
    assert from_pretrained(folder).variant.name == SEGMENTER


def test_verify_checks_the_weights_as_saved_whatever_options_are_given(folder):
    assert from_pretrained(folder, verify=True, box_score_thresh=0.99, min_size=96).config.min_size == 96
    (folder / "golden.safetensors").unlink()
    with pytest.raises(WeightsError, match="cannot be verified"):
        from_pretrained(folder, verify=True)


def test_a_classifier_of_other_weights_is_told_apart(tmp_path):
    folder = small(CLASSIFIER).save_pretrained(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["module_s.logits.bias"][0] += 0.5
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"logits differ by up to 0\.5"):
        from_pretrained(folder, verify=True)


def test_doctor_runs_the_golden_files(monkeypatch, capsys, folder):
    checks = {check.name: check for check in doctor.examine()}
    assert "golden outputs match" in checks[f"weights of {DEFAULT_SEGMENTER}"].detail
    golden = load_file(folder / "golden.safetensors")
    save_file(golden | {"scores": golden["scores"] + 1}, folder / "golden.safetensors")
    file = folder / "model.safetensors"
    entry = ManifestEntry(
        SEGMENTER, "test", sha256_of(file), file.stat().st_size, (), {}, "mit", file="bundled/model.safetensors"
    )
    monkeypatch.setattr(manifest_module, "MANIFEST", folder.with_name("manifest.json"))
    folder.rename(folder.with_name("bundled"))
    monkeypatch.setattr(manifest_module, "default_entry", lambda variant: entry)
    monkeypatch.setattr(hub_module, "default_entry", lambda variant: entry)
    assert main(["doctor"]) == 1
    assert "does not reproduce its recorded outputs" in capsys.readouterr().out


# --- the manifest and the wheel


def test_everything_the_manifest_lists_exists_or_is_pinned():
    for entry in manifest():
        assert entry.path is not None or entry.repository is not None
        assert entry.path is None or (
            entry.path.is_file() and entry.path.is_relative_to(manifest_module.MANIFEST.parent)
        )
        assert entry.repository is None or re.fullmatch("[0-9a-f]{40}", entry.revision or "")
        assert re.fullmatch("[0-9a-f]{64}", entry.sha256)


def test_the_wheel_with_its_weights_stays_under_40_mb():
    files = [path for path in (ROOT / "ctmasknet").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(len(zlib.compress(path.read_bytes())) for path in files) < 40e6  # as a zip file holds them


# --- publishing


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with running_hub() as server:
        yield server


@pytest.fixture(scope="module")
def author(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = Client(hub.url, tmp_path_factory.mktemp("home"), HF_TOKEN=TOKEN)
    yield client
    client.close()


def push_model(repository: str, folder: Path, **options: Any) -> Published:
    return from_pretrained(folder).push_to_hub(repository, **options)


def publish(*arguments: str) -> tuple[int, str, str]:
    tool = runpy.run_path(str(ROOT / "tools" / "publish_hub.py"))
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = tool["main"](list(arguments))
    return code, out.getvalue(), err.getvalue()


def test_push_to_hub_publishes_four_files_and_says_how_to_pin_them(author, hub, saved):
    published = author(push_model, f"{OWNER}/pushed", saved, metrics={"ap50": 0.7})
    repository = hub.repositories[f"{OWNER}/pushed"]
    assert published.revision == repository.head
    files = repository.commits[repository.head]
    assert sorted(name for name in files if name != ".gitattributes") == FILES
    assert published.sha256 == sha256(files["model.safetensors"]) == sha256_of(saved / "model.safetensors")
    card = files["README.md"].decode()
    assert f'weights="{OWNER}/pushed"' in card
    assert "| ap50 | 0.7 |" in card
    again = author(push_model, f"{OWNER}/pushed", saved)
    assert again.revision != published.revision
    assert again.sha256 == published.sha256


def test_push_publishes_a_folder_and_nothing_else_in_it(author, hub, folder):
    (folder / "patient.png").write_bytes(b"private")
    (folder / "golden.safetensors").unlink()
    card = (folder / "README.md").read_text() + "\nA line by hand.\n"
    (folder / "README.md").write_text(card)
    author(push_folder, folder, f"{OWNER}/folder")
    files = hub.repositories[f"{OWNER}/folder"].commits[hub.repositories[f"{OWNER}/folder"].head]
    assert sorted(name for name in files if name != ".gitattributes") == FILES
    assert "A line by hand." in files["README.md"].decode()
    assert (folder / "README.md").read_text() == card
    assert not (folder / "golden.safetensors").exists()


def test_the_card_shows_the_picture_of_failures_that_travels_along(folder, tmp_path):
    assert "failures.png`" in (folder / "README.md").read_text()
    ready = tmp_path / "ready"
    ready.mkdir()
    for name, content in packed(folder, f"{OWNER}/x", b"png")[1].items():
        (ready / name).write_bytes(content)
    assert "](failures.png)" in (ready / "README.md").read_text()
    assert packed(ready, f"{OWNER}/y")[1]["failures.png"] == b"png"
    tool = runpy.run_path(str(ROOT / "tools" / "publish_hub.py"))
    shown = next(entry.path.parent for entry in manifest() if entry.variant == DEFAULT_SEGMENTER)
    pictures = [tool["failures_of"](at, read_weights(at).variant) for at in (shown, folder)]
    assert pictures == [(ROOT / "docs" / "failures.png").read_bytes(), None]


def test_what_cannot_be_published_is_refused_before_anything_is_sent(author, hub, folder):
    before = hub.count()
    for repository in ("no-owner", "../x/y", f"{OWNER}/name@main", f"{OWNER}/.."):
        with pytest.raises(WeightsError, match="is not a repository id"):
            author(push_folder, folder, repository)
    with pytest.raises(WeightsError, match="no such file or folder"):
        author(push_folder, folder / "nowhere", f"{OWNER}/x")
    golden = load_file(folder / "golden.safetensors")
    save_file(golden | {"scores": golden["scores"] + 1}, folder / "golden.safetensors")
    with pytest.raises(WeightsError, match="does not reproduce"):
        author(push_folder, folder, f"{OWNER}/x")
    (folder / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"no config\.json names the variant"):
        author(push_folder, folder, f"{OWNER}/x")
    assert hub.count() == before


def test_no_permission_no_token_and_a_card_the_hub_refuses_are_explained(author, hub, folder, tmp_path):
    with pytest.raises(WeightsError, match=r"refused \(HTTP 403.*somebody.*HF_TOKEN"):
        author(push_folder, folder, "somebody/x")
    facts = json.loads((folder / "config.json").read_text())
    del facts["metadata"]["license"]
    (folder / "config.json").write_text(json.dumps(facts))
    (folder / "README.md").unlink()
    with pytest.raises(WeightsError, match=r"refuses the card: .*license"):
        author(push_folder, folder, f"{OWNER}/x")
    stranger = Client(hub.url, tmp_path / "home")
    try:
        with pytest.raises(WeightsError, match=r"refused \(HTTP 401.*HF_TOKEN"):
            stranger(push_folder, folder, f"{OWNER}/y")
    finally:
        stranger.close()


def test_the_tool_publishes_what_it_finds_and_writes_the_manifest(author, hub, folder, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(folder, runs / "one" / "best")
    shutil.copytree(folder, runs / "one" / "last")
    small(CLASSIFIER).save_pretrained(runs / "two", metrics={"accuracy": 0.9}, license="mit")
    listed = tmp_path / "manifest.json"
    bundled = {"variant": SEGMENTER, "tag": "old", "file": "bundled/old.safetensors", "sha256": "1" * 64, "bytes": 1}
    shared = {"classes": ["background", "lesion"], "metrics": {}, "license": "mit"}
    listed.write_text(json.dumps({"weights": [bundled | shared], "backbones": {"kept": 1}}))
    before = hub.count()
    options = ["--namespace", OWNER, "--tag", "ct", "--manifest", str(listed), str(runs)]
    code, out, _ = author(publish, *options, "--dry-run")
    assert (code, hub.count()) == (0, before)
    assert f"{OWNER}/{SEGMENTER}-ct" in out
    assert f"{OWNER}/{CLASSIFIER}-ct" in out
    code, out, err = author(publish, *options, "--out", str(tmp_path / "ready"))
    assert (code, hub.count()) == (0, before), err
    written = json.loads(listed.read_text())
    assert [entry["variant"] for entry in written["weights"]] == [SEGMENTER]
    ready = {entry["variant"]: tmp_path / "ready" / f"{entry['variant']}-ct" for entry in written["prepared"]}
    assert ready.keys() == {SEGMENTER, CLASSIFIER}
    for entry in written["prepared"]:
        assert sorted(path.name for path in ready[entry["variant"]].iterdir()) == FILES
        assert entry["sha256"] == sha256_of(ready[entry["variant"]] / "model.safetensors")
        from_pretrained(ready[entry["variant"]], verify=True)
    options[-1] = str(tmp_path / "ready")
    code, out, err = author(publish, *options)
    assert code == 0, err
    written = json.loads(listed.read_text())
    assert (written["backbones"], written["prepared"]) == ({"kept": 1}, [])
    entries = [ManifestEntry(**entry) for entry in written["weights"]]
    assert [(entry.variant, entry.tag) for entry in entries] == [
        (SEGMENTER, "ct"),
        (CLASSIFIER, "ct"),
        (SEGMENTER, "old"),
    ]
    for entry in entries[:2]:
        repository = hub.repositories[f"{OWNER}/{entry.variant}-ct"]
        assert entry.revision == repository.head
        assert entry.sha256 == sha256(repository.commits[repository.head]["model.safetensors"])
    code, _, err = author(publish, *options[:-1], str(tmp_path / "nowhere"))
    assert (code, err.count("\n")) == (2, 1)


def test_the_command_push_publishes(author, hub, folder):
    assert author(main, ["push", str(folder), f"{OWNER}/by-command"]) == 0
    assert (
        "model.safetensors"
        in hub.repositories[f"{OWNER}/by-command"].commits[hub.repositories[f"{OWNER}/by-command"].head]
    )
    assert author(main, ["push", str(folder), "somebody/x"]) == 2


def test_a_variant_without_weights_says_what_can_be_done():
    with pytest.raises(WeightsError, match=f"these have: .*{DEFAULT_SEGMENTER}") as caught:
        create_model("maskrcnn_resnet50", weights="default")
    for way in ("ctmasknet train maskrcnn_resnet50", "ctmasknet convert", "Hub repository"):
        assert way in str(caught.value)
