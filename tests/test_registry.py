"""The registry: 14 variants, found without torch, and every list of them in agreement."""

from __future__ import annotations

import ast
import fnmatch
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import ctmasknet
from ctmasknet import ConfigError, get_variant, list_models, zoo
from ctmasknet.registry import VARIANTS
from ctmasknet.weights.manifest import manifest

ROOT = Path(__file__).parents[1]
# Values per state dict, counted in the released code.
RELEASED = {
    "maskrcnn_resnet50": 31_781_015,
    "maskrcnn_resnet18": 14_520_694,
    "maskrcnn_resnet18_t1": 6_056_305,
    "maskrcnn_resnet18_t2": 3_921_260,
    "maskrcnn_resnet34": 24_636_294,
    "maskrcnn_resnet34_t1": 11_449_215,
    "maskrcnn_resnet34_t2": 4_587_378,
    "ctmasknet_resnet50": 31_522_200,
    "ctmasknet_resnet18": 14_752_119,
    "ctmasknet_resnet18_t1": 6_287_730,
    "ctmasknet_resnet18_t2": 4_152_685,
    "ctmasknet_resnet34": 24_867_719,
    "ctmasknet_resnet34_t1": 11_680_640,
    "ctmasknet_resnet34_t2": 4_818_803,
}


def test_lists_the_fourteen_with_the_released_sizes():
    assert {name: variant.num_values for name, variant in VARIANTS.items()} == RELEASED
    assert list_models() == list(RELEASED)


def test_filters_by_pattern_and_task():
    assert list_models("*_t1", task="segmentation") == ["maskrcnn_resnet18_t1", "maskrcnn_resnet34_t1"]
    # Shell wildcards: "*t1*" also matches the t1 of resnet18.
    assert list_models("*t1*", task="segmentation") == fnmatch.filter(list_models("mask*"), "*t1*")
    assert len(list_models(task="classification")) == 7
    assert list_models("nothing*") == []
    with pytest.raises(ConfigError, match="unknown task 'seg'"):
        list_models(task="seg")


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(ConfigError, match="did you mean maskrcnn_resnet18_t1"):
        get_variant("maskrcnn_resnet18t1")
    with pytest.raises(ConfigError, match="ctmasknet list"):
        get_variant("zzz")


def test_listing_needs_no_torch():
    code = (
        "import sys, ctmasknet\n"
        "assert ctmasknet.list_models('*t2*') and ctmasknet.get_variant('maskrcnn_resnet50')\n"
        "assert ctmasknet.CTMaskNetError and dir(ctmasknet)\n"
        "from ctmasknet.cli import main\n"
        "assert main(['list']) == 0 and main(['info', 'maskrcnn_resnet18_t2']) == 0\n"
        "heavy = {'torch', 'torchvision', 'timm', 'numpy', 'PIL', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_factories_hubconf_and_registry_agree():
    factories = {
        name
        for name, value in inspect.getmembers(zoo, inspect.isfunction)
        if name.startswith(("maskrcnn_", "ctmasknet_"))
    }
    assert factories == set(VARIANTS)
    tree = ast.parse((ROOT / "hubconf.py").read_text())
    imported = [a.name for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names]
    assert sorted(imported) == sorted(VARIANTS)


@pytest.mark.parametrize("name", list(VARIANTS))
def test_every_factory_says_what_it_builds(name):
    text = inspect.getdoc(getattr(zoo, name)) or ""
    first = text.splitlines()[0]
    assert f"{VARIANTS[name].num_values / 1e6:.2f}M" in first
    for word in ("weights:", "pretrained:", "num_classes", "Returns:", "boxes (N, 4)"):
        assert word in text


def test_the_readme_table_is_the_generated_one():
    tool = ROOT / "tools" / "readme_table.py"
    done = subprocess.run([sys.executable, tool, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_public_name_resolves():
    for name in ctmasknet.__all__:
        assert getattr(ctmasknet, name) is not None
    with pytest.raises(AttributeError):
        _ = ctmasknet.nothing_of_that_name


def test_variants_are_plain_values():
    assert json.loads(json.dumps(get_variant("ctmasknet_resnet50").to_dict()))["roi_batch"] == 256


def test_a_segmenter_and_its_classifier_name_each_other():
    assert get_variant("ctmasknet_resnet34_t2").segmenter == "maskrcnn_resnet34_t2"
    assert get_variant("maskrcnn_resnet34_t2").classifier == "ctmasknet_resnet34_t2"


def test_the_manifest_lists_only_known_variants():
    assert {entry.variant for entry in manifest()} <= set(VARIANTS)


def test_the_paper_figures_are_table_two_and_three():
    paper = get_variant("maskrcnn_resnet34_t1").paper
    assert (paper.ap50, paper.ap75, paper.ap, paper.minutes) == (0.5988, 0.4506, 0.4476, 134.01)
    paper = get_variant("ctmasknet_resnet18_t1").paper
    assert paper.sensitivity == (0.9698, 0.9163, 0.9135)
    assert paper.accuracy == 0.9395
