"""`tools/reproduce.py`: pictures and scans of public data give the expected figures, or it is said that they do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reproduce
from phantom import Phantom, phantom
from PIL import Image

from ctmasknet import Predictor, get_variant
from ctmasknet.registry import DEFAULT_SEGMENTER
from ctmasknet.weights.manifest import default_entry

CASE = reproduce.Case("a scan", "case.nii.gz", "Infection_Mask/case.nii.gz", "case_{:03d}", (1, 3))


@pytest.fixture(scope="module")
def planes() -> list[Phantom]:
    return [phantom(index, lesions=3, size=256) for index in range(4)]


@pytest.fixture(autouse=True)
def one_case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(reproduce, "CASES", (CASE,))
    monkeypatch.setattr(reproduce, "EXPECTED", tmp_path / "expected.json")
    (tmp_path / "expected.json").write_text(Path(reproduce.__file__).with_suffix(".json").read_text())


@pytest.fixture
def pictures(planes: list[Phantom], tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    for folder in ("imgs", "masks"):
        (root / folder).mkdir(parents=True)
    for index in CASE.slices:
        Image.fromarray(planes[index].image).save(root / "imgs" / f"case_{index:03d}.png")
        Image.fromarray(planes[index].class_mask()).save(root / "masks" / f"case_{index:03d}.png")
    return root


def test_pictures_are_recorded_and_found_again(
    pictures: Path, planes: list[Phantom], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce.main([str(pictures), "--record", "--device", "cpu"]) == 0
    recorded: dict[str, Any] = json.loads((tmp_path / "expected.json").read_text())
    predictor = Predictor(DEFAULT_SEGMENTER, None, device="cpu")
    marked = [predictor(planes[index].image).lesion_mask for index in CASE.slices]
    lesions = [planes[index].masks.any(0) for index in CASE.slices]
    both = sum(int((m & t).sum()) for m, t in zip(marked, lesions, strict=True))
    sizes = int(np.sum(marked)), int(np.sum(lesions))
    assert recorded["cases"]["a scan"] == {
        "slices": 2,
        "marked_pixels": sizes[0],
        "lesion_pixels": sizes[1],
        "dice": round(2 * both / sum(sizes), 4),
    }
    assert reproduce.main([str(pictures), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith("agrees")
    recorded["cases"]["a scan"]["dice"] -= 0.02
    (tmp_path / "expected.json").write_text(json.dumps(recorded))
    assert reproduce.main([str(pictures), "--device", "cpu"]) == 1
    assert "DIFFERS" in capsys.readouterr().out
    recorded["cases"]["a scan"]["lesion_pixels"] *= 2
    (tmp_path / "expected.json").write_text(json.dumps(recorded))
    assert reproduce.main([str(pictures), "--device", "cpu"]) == 1
    assert "OTHER LESIONS" in capsys.readouterr().out


def test_a_scan_gives_what_its_pictures_give(
    pictures: Path, planes: list[Phantom], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nibabel = pytest.importorskip("nibabel")
    assert reproduce.main([str(pictures), "--record", "--device", "cpu"]) == 0
    affine = np.diag([-1.5, -1.5, 5, 1])
    parts = {
        "scans": [p.hu for p in planes],
        "Infection_Mask": [p.masks.any(0).astype(np.uint8) for p in planes],
        "Lung_Mask": [p.lungs.astype(np.uint8) for p in planes],
    }
    for folder, stack in parts.items():
        (tmp_path / "zenodo" / folder).mkdir(parents=True)
        image = nibabel.Nifti1Image(np.stack(stack, -1).swapaxes(0, 1), affine)
        nibabel.save(image, tmp_path / "zenodo" / folder / "case.nii.gz")
    capsys.readouterr()
    assert reproduce.main([str(tmp_path / "zenodo"), "--device", "cpu"]) == 0
    line = capsys.readouterr().out
    assert line.startswith("a scan, scan: 2 slices")
    assert line.endswith("agrees\n")


def test_data_without_a_known_scan_and_figures_of_other_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce.main([str(tmp_path), "--device", "cpu"]) == 2
    assert "none of case.nii.gz" in capsys.readouterr().err
    (tmp_path / "expected.json").write_text('{"weights": "0", "cases": {}}')
    assert reproduce.main([str(tmp_path), "--device", "cpu"]) == 2
    assert "--record" in capsys.readouterr().err


def test_the_expected_figures_are_of_the_default_weights() -> None:
    expected = json.loads(Path(reproduce.__file__).with_suffix(".json").read_text())
    assert expected["weights"] == default_entry(get_variant(DEFAULT_SEGMENTER)).sha256
    for figures in expected["cases"].values():
        assert 0.3 < figures["dice"] < 1
