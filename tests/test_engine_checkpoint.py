"""Checkpoints: exact, whole or absent, never a pickle, and the one before where the last is damaged."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ctmasknet import CTMaskNetError, WeightsError
from ctmasknet.engine import checkpoint as checkpoints
from ctmasknet.engine.checkpoint import (
    checkpoints_from,
    list_checkpoints,
    newest_readable,
    pack_optimizer,
    read_checkpoint,
    unpack_optimizer,
    write_checkpoint,
)

FACTS = {"state": {"step": 3, "best": None}, "rate": 0.1 + 0.2}


def some_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(3, 5, generator=generator),
        "channels_last": torch.randn(2, 3, 4, 4, generator=generator).to(memory_format=torch.channels_last),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 4),
    }


def test_tensors_and_facts_come_back_exactly(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 3, some_tensors(), FACTS)
    tensors, facts = read_checkpoint(path)
    assert facts == FACTS
    assert tensors.keys() == some_tensors().keys()
    assert all(torch.equal(tensors[key], value) for key, value in some_tensors().items())
    assert load_file(path).keys() == tensors.keys(), "an ordinary safetensors file"


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 20, 300, 4000):
        write_checkpoint(tmp_path, step, some_tensors(), FACTS)
    kept = [int(path.stem.removeprefix("step-")) for path in list_checkpoints(tmp_path)]
    assert kept == [4000, 300]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "pickle", "text"])
def test_a_damaged_file_gives_way_to_the_one_before(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = write_checkpoint(tmp_path, 1, some_tensors(1), FACTS)
    last = write_checkpoint(tmp_path, 2, some_tensors(2), FACTS)
    content = bytearray(last.read_bytes())
    if damage == "pickle":
        torch.save({"a": 1}, last)
    else:
        content[-3] ^= 16
        last.write_bytes({"cut": content[:-9], "flip": content, "empty": b"", "text": b"hello"}[damage])
    with caplog.at_level(logging.WARNING):
        path, tensors, _ = newest_readable(list_checkpoints(tmp_path))
    assert path == good
    assert torch.equal(tensors["a"], some_tensors(1)["a"])
    assert f"{last}: " in caplog.text
    assert "the one before is tried" in caplog.text


def test_no_readable_checkpoint_is_an_error_that_names_all(tmp_path: Path) -> None:
    for step in (1, 2):
        write_checkpoint(tmp_path, step, some_tensors(), FACTS).write_bytes(b"nothing")
    with pytest.raises(WeightsError, match=r"step-000000002.*step-000000001"):
        newest_readable(list_checkpoints(tmp_path))


def test_a_path_means_a_run_or_a_file_and_those_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "KEPT", 3)
    first, second, third = (write_checkpoint(tmp_path, step, some_tensors(), FACTS) for step in (1, 2, 3))
    assert checkpoints_from(tmp_path) == [third, second, first]
    assert checkpoints_from(second) == [second, first]
    with pytest.raises(WeightsError, match="absent"):
        checkpoints_from(tmp_path / "absent")


def test_a_failed_write_leaves_the_checkpoints_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = write_checkpoint(tmp_path, 1, some_tensors(), FACTS)

    def full(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(CTMaskNetError, match="No space left on device"):
        write_checkpoint(tmp_path, 2, some_tensors(), FACTS)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [good.name]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_an_optimizer_goes_on_as_if_never_stopped(tmp_path: Path, kind: type[torch.optim.Optimizer]) -> None:
    def start() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 2)
        return model, kind([{"params": [model.weight]}, {"params": [model.bias], "lr": 0.5}], lr=0.1)  # type: ignore[call-arg]

    def steps(model: torch.nn.Linear, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            model(torch.ones(3, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = start()
    steps(model, optimizer, 2)
    path = write_checkpoint(tmp_path, 2, pack_optimizer(optimizer), {})
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    steps(model, optimizer, 3)

    again, fresh = start()
    again.load_state_dict(weights)
    unpack_optimizer(fresh, read_checkpoint(path)[0])
    steps(again, fresh, 3)
    assert torch.equal(again.weight, model.weight)
    assert torch.equal(again.bias, model.bias)
