"""Training in real processes: killed in mid-epoch, and two at once. Slow."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from engine_data import class_folder, classifier_config, lesion_folder, segmenter_config

from ctmasknet import from_pretrained
from ctmasknet.data.datasets import open_dataset
from ctmasknet.engine import TrainConfig, train
from ctmasknet.engine.validation import SegmenterValidation
from ctmasknet.weights.files import read_weights

pytest.importorskip("accelerate")
pytestmark = pytest.mark.slow

PROGRAM = """
import json, os, sys, zlib
from timm.utils import ModelEmaV3
from ctmasknet.engine import TrainConfig, train

# Writes a checksum of all weights after every step.
update = ModelEmaV3.update
def watched(self, model, step=None):
    update(self, model, step)
    values = [t.detach().contiguous().numpy().tobytes() for t in model.parameters()]
    with open(f"{sys.argv[1]}.weights{os.environ.get('RANK', 0)}", "a") as file:
        print(step, zlib.crc32(b"".join(values)), file=file)
ModelEmaV3.update = watched

train(TrainConfig.from_file(sys.argv[1]))
"""


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[1])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def write(config: TrainConfig, path: Path) -> Path:
    path.write_text(json.dumps(config.to_dict()))
    return path


def losses(run: str | Path) -> list[dict[str, float]]:
    history = json.loads((Path(run) / "run.json").read_text())["result"]["history"]
    return [{k: v for k, v in row.items() if k not in ("images_per_s", "minutes")} for row in history]


def test_a_run_killed_in_mid_epoch_again_and_again_gives_the_same_losses(tmp_path: Path) -> None:
    data = lesion_folder(tmp_path / "data", range(1, 7))
    options = {"batch_size": 1, "val": data, "checkpoint_minutes": 0.0}
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    for name in ("whole", "killed"):
        write(segmenter_config(data, tmp_path / name, **options), tmp_path / f"{name}.json")
    subprocess.run([sys.executable, script, tmp_path / "whole.json"], check=True, env=environment(), timeout=600)

    folder = tmp_path / "killed" / "checkpoints"
    for step in (2, 4, 8):
        process = subprocess.Popen([sys.executable, script, tmp_path / "killed.json"], env=environment())
        deadline = time.monotonic() + 600
        # Past this step: the process is amid the next one, or writing its checkpoint.
        while not any(int(path.stem[5:]) >= step for path in folder.glob("step-*")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([sys.executable, script, tmp_path / "killed.json"], check=True, env=environment(), timeout=600)

    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    for kind in ("best", "last"):
        one, other = (read_weights(tmp_path / run / kind).tensors for run in ("killed", "whole"))
        assert all(torch.equal(one[key], other[key]) for key in other)
    assert not list(folder.glob(".ctmasknet-*"))


def two_processes(config: TrainConfig, path: Path) -> None:
    """Run a config in two processes under torchrun."""
    script = path.with_suffix(".py")
    script.write_text(PROGRAM)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    subprocess.run([*command, script, write(config, path)], check=True, env=environment(), timeout=600)


def test_two_processes_have_equal_weights_after_every_step_and_count_every_slice_once(tmp_path: Path) -> None:
    data = lesion_folder(tmp_path / "data", range(1, 6))
    val = lesion_folder(tmp_path / "val", range(11, 16))
    config = segmenter_config(data, tmp_path / "run", val=val, batch_size=1, ema=0.0)
    two_processes(config, tmp_path / "run.json")

    ranks = [(tmp_path / f"run.json.weights{rank}").read_text().splitlines() for rank in range(2)]
    assert ranks[0] == ranks[1]
    assert len(ranks[0]) == 2 * 3, "five slices, two at a time"

    row = losses(tmp_path / "run")[-1]
    model = from_pretrained(tmp_path / "run" / "last")
    slices = open_dataset("segmentation", val, min_area=5)
    alone = SegmenterValidation(config, slices.class_names, slices, rank=0, world=1).metrics(model)  # type: ignore[arg-type]
    assert row["images"] == len(slices) == 5
    for key, value in alone.items():
        assert row[key] == pytest.approx(value, abs=1e-9), key


def test_module_s_learns_the_same_from_two_processes_as_from_one(tmp_path: Path) -> None:
    data = class_folder(tmp_path / "data", 1)
    # Zeros in place of replicated RoIs: the batches are fixed, nothing in them is drawn.
    fixed = {**classifier_config(data, tmp_path).model_options, "replicate": False}
    alone = train(classifier_config(data, tmp_path / "one", model_options=fixed, batch_size=2))
    two_processes(classifier_config(data, tmp_path / "two", model_options=fixed, batch_size=1), tmp_path / "two.json")
    assert alone.last is not None
    one, two = read_weights(alone.last).tensors, read_weights(tmp_path / "two" / "last").tensors
    for key, value in one.items():
        # Adam divides by the gradient's size, so that rounding shows where the gradient is next to nothing.
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-5)
    for first, second in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)


def start_two(script: Path, arguments: list[Path], folders: list[Path]) -> list[subprocess.Popen[str]]:
    """Two ranks of one run, as torchrun starts them, each in a working folder of its own."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found.getsockname()[1])}
    return [
        subprocess.Popen(
            [sys.executable, script, *arguments],
            env={**environment(), **ranks, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=folder,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, folder in enumerate(folders)
    ]


LATE = """
import os, time
from ctmasknet.engine.run import Run

# The second rank is late: the first could have written a checkpoint by then.
begin = Run.open
def late(self):
    time.sleep(5 * int(os.environ["RANK"]))
    begin(self)
Run.open = late
"""


def test_a_late_process_does_not_trip_over_the_first_checkpoint(tmp_path: Path) -> None:
    data = class_folder(tmp_path / "data", 1)
    script = tmp_path / "program.py"
    script.write_text(LATE + PROGRAM)
    config = classifier_config(data, tmp_path / "run", epochs=1, batch_size=1, resume=False)
    processes = start_two(script, [write(config, tmp_path / "run.json")], [tmp_path, tmp_path])
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said

    processes = start_two(script, [tmp_path / "run.json"], [tmp_path, tmp_path])
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert all("holds a run" in text for text in said), "and both see what the first decides"


def test_a_folder_that_the_processes_do_not_share_is_refused(tmp_path: Path) -> None:
    data = class_folder(tmp_path / "data", 1)
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    path = write(classifier_config(data, Path("run"), epochs=1, batch_size=1), tmp_path / "run.json")
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    processes = start_two(script, [path], folders)
    for process in processes:
        said = process.communicate(timeout=300)[1]
        assert process.returncode != 0
        assert "all hosts of a run must share it" in said


def test_sigterm_to_one_process_stops_both_at_the_same_step(tmp_path: Path) -> None:
    data = class_folder(tmp_path / "data", 1)
    options = {"epochs": 500, "batch_size": 1, "checkpoint_minutes": 60.0}
    path = tmp_path / "run.json"
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    write(classifier_config(data, tmp_path / "run", **options), path)
    processes = start_two(script, [path], [tmp_path, tmp_path])
    deadline = time.monotonic() + 600
    while not (tmp_path / "run" / "metrics.csv").exists():
        assert all(process.poll() is None for process in processes)
        assert time.monotonic() < deadline
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    lines = [path.with_name(f"run.json.weights{rank}").read_text().splitlines() for rank in range(2)]
    assert lines[0] == lines[1]
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    assert int(newest.stem[5:]) == len(lines[0]), "stopped after the step whose checkpoint was written"


def test_memory_does_not_grow_over_epochs(tmp_path: Path) -> None:
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("reads memory from /proc")
    data = lesion_folder(tmp_path / "data", range(1, 5))
    used = []
    for epochs in (3, 15):
        train(segmenter_config(data, tmp_path / "run", val=data, epochs=epochs))
        used.append(int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6)
    assert used[1] - used[0] < 100, f"{used} MB"
