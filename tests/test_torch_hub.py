"""torch.hub entry points, used as a stranger would: from a folder that has modules of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ctmasknet.registry import DEFAULT_SEGMENTER, VARIANTS

ROOT = Path(__file__).parents[1]


def in_a_strangers_folder(folder: Path, code: str) -> str:
    (folder / "utils.py").write_text("raise RuntimeError('the wrong utils')\n")
    (folder / "models").mkdir()
    (folder / "models" / "__init__.py").write_text("raise RuntimeError('the wrong models')\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_loads_a_variant_from_a_folder_with_modules_of_its_own(tmp_path):
    code = (
        "import sys; sys.path.insert(0, '')\n"
        "import torch\n"
        f"model = torch.hub.load({str(ROOT)!r}, 'maskrcnn_resnet18_t1', source='local', pretrained=False)\n"
        "print(type(model).__name__, sum(t.numel() for t in model.state_dict().values()))\n"
        f"trained = torch.hub.load({str(ROOT)!r}, {DEFAULT_SEGMENTER!r}, source='local', pretrained=True)\n"
        "with torch.inference_mode():\n"
        "    print(sorted(trained([torch.zeros(3, 64, 64)])[0]))\n"
    )
    lines = in_a_strangers_folder(tmp_path, code).splitlines()
    assert lines == ["LesionMaskRCNN 6056305", "['boxes', 'labels', 'masks', 'scores']"]


def test_lists_exactly_the_fourteen_and_explains_them(tmp_path):
    # torch.hub.list reads no local folder, but a repository that is already in its cache.
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "OWNER_ctmasknet_main").symlink_to(ROOT)
    code = (
        "import torch\n"
        f"torch.hub.set_dir({str(cache)!r})\n"
        "known = {'skip_validation': True, 'trust_repo': True}\n"
        "print(*torch.hub.list('OWNER/ctmasknet:main', **known))\n"
        "print(torch.hub.help('OWNER/ctmasknet:main', 'ctmasknet_resnet18_t1', **known))\n"
    )
    names, text = in_a_strangers_folder(tmp_path, code).split("\n", 1)
    assert sorted(names.split()) == sorted(VARIANTS)
    assert "COVID-CT-Mask-Net (ResNet18 T1 + FPN)" in text
    assert "pretrained: True" in text


def test_an_unknown_option_fails_loudly(tmp_path):
    code = (
        "import torch\n"
        "try:\n"
        f"    torch.hub.load({str(ROOT)!r}, 'maskrcnn_resnet18_t1', source='local', box_score_tresh=1)\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    assert "ConfigError" in in_a_strangers_folder(tmp_path, code)


def test_hubconf_stays_short():
    lines = (ROOT / "hubconf.py").read_text().splitlines()
    assert len(lines) < 25


@pytest.mark.parametrize("name", ["torch", "torchvision", "timm", "huggingface_hub", "safetensors", "numpy", "PIL"])
def test_hubconf_names_its_dependencies(name):
    assert f'"{name}"' in (ROOT / "hubconf.py").read_text()
