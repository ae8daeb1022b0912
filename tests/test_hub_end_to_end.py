"""From one machine to another by way of the Hub: push, forget, load in every way, go offline, train on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_data import lesion_folder, segmenter_config
from hub_client import Client, hub_environment
from hub_server import OWNER, TOKEN, running_hub

from ctmasknet import create_model, from_pretrained
from ctmasknet.weights.files import state_digest

pytestmark = pytest.mark.slow  # half a minute and more, most of it spent importing torch in new processes

ROOT = Path(__file__).parents[1]
NAME = "maskrcnn_resnet18_t2"
SMALL = {"min_size": 64, "max_size": 128, "rpn_post_nms_top_n_test": 50}

LOAD_IN_EVERY_WAY = """
import sys, torch
repository, revision, root = sys.argv[1:]
import ctmasknet
from ctmasknet.weights.files import state_digest
models = [
    torch.hub.load(root, "maskrcnn_resnet18_t2", source="local", weights=f"{repository}@{revision}"),
    ctmasknet.from_pretrained(repository, revision=revision, verify=True),
    ctmasknet.create_model("maskrcnn_resnet18_t2", weights=f"{repository}@{revision}"),
]
for model in models:
    print(type(model).__name__, state_digest(model.state_dict()), model.config.min_size)
print(ctmasknet.Predictor(repository, None, device="cpu").score_threshold)
"""


def push(folder: Path, repository: str) -> str:
    model = create_model(NAME, **SMALL)
    model.metadata = {"operating_point": {"score_threshold": 0.25, "nms_threshold": 0.5}}
    model.save_pretrained(folder, license="cc-by-4.0")
    return model.push_to_hub(repository, license="cc-by-4.0").revision


def train_on(weights: str, data: Path, out: Path) -> str:
    from ctmasknet.engine import train

    config = segmenter_config(data, out, epochs=1, weights=weights, license="cc-by-4.0")
    return str(train(config).last)


def in_a_new_process(folder: Path, environment: dict[str, str], *arguments: str) -> list[str]:
    command = [sys.executable, "-c", LOAD_IN_EVERY_WAY, *arguments, str(ROOT)]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_weights_travel_from_one_machine_to_another(tmp_path):
    stranger, repository = tmp_path / "stranger", f"{OWNER}/{NAME}"
    stranger.mkdir()
    with running_hub() as hub:
        author = Client(hub.url, tmp_path / "author", HF_TOKEN=TOKEN)
        revision = author(push, tmp_path / "saved", repository)
        author.wipe()
        expected = state_digest(from_pretrained(tmp_path / "saved").state_dict())
        line = f"LesionMaskRCNN {expected} 64"

        home = tmp_path / "reader"
        before = hub.count()
        lines = in_a_new_process(stranger, hub_environment(hub.url, home), repository, revision)
        assert lines == [line] * 3 + ["0.25"]
        assert hub.count() > before

        before = hub.count()
        offline = hub_environment(hub.url, home, HF_HUB_OFFLINE="1")
        assert in_a_new_process(stranger, offline, repository, revision) == lines
        assert hub.count() == before

        # Fine-tuning starts from the same repository; what comes out travels on.
        pytest.importorskip("accelerate")
        data = lesion_folder(tmp_path / "data", range(1, 4))
        tuned = author(train_on, f"{repository}@{revision}", data, tmp_path / "run")
        author.close()
    model = from_pretrained(tuned)
    start = from_pretrained(tmp_path / "saved").state_dict()
    changed = [key for key, tensor in model.state_dict().items() if not torch.equal(tensor, start[key])]
    assert "roi_heads.box_predictor.cls_score.weight" in changed
    with torch.inference_mode():
        assert set(model([torch.zeros(3, 64, 64)])[0]) == {"boxes", "labels", "scores", "masks"}
