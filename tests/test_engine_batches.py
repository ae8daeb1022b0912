"""Order of training slices over epochs, processes and interruptions; learning rate."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from engine_data import lesion_folder
from PIL import Image
from torch.utils.data._utils.pin_memory import pin_memory

from ctmasknet.data.augment import Augmentation
from ctmasknet.data.datasets import open_dataset
from ctmasknet.engine import TrainConfig
from ctmasknet.engine.batches import Batch, EpochBatches, TrainingSlices, balanced, make_loader, model_input, on_device
from ctmasknet.engine.setup import build_optimizer, learning_rate


def batches(size: int, *, batch: int = 4, accumulate: int = 1, rank: int = 0, world: int = 1) -> EpochBatches:
    config = TrainConfig("maskrcnn_resnet18_t1", "data", "out", batch_size=batch, accumulate=accumulate, seed=3)
    return EpochBatches(size, config, rank=rank, world=world)


@pytest.mark.parametrize("size", [1, 3, 8, 21])
def test_an_epoch_has_every_slice_in_full_batches(size: int) -> None:
    order = list(batches(size))
    assert [len(batch) for batch in order] == [4] * math.ceil(size / 4)
    counts = Counter(index for batch in order for _, index in batch)
    assert set(counts) == set(range(size))
    assert max(counts.values()) - min(counts.values()) <= 1, "the last batch is filled up, nothing else repeats"


def test_processes_share_out_the_batches_of_one() -> None:
    alone = batches(21, batch=6)
    shares = [list(batches(21, batch=3, rank=rank, world=2)) for rank in range(2)]
    assert [first + second for first, second in zip(*shares, strict=True)] == list(alone)


def test_accumulated_batches_are_whole_steps() -> None:
    order = batches(21, batch=2, accumulate=3)
    assert len(list(order)) == len(order) == 3 * order.steps == 12


def test_balanced_draws_take_classes_and_their_patients_as_often(tmp_path: Path) -> None:
    slices = {"0_a_1": 6, "0_b_1": 2, "2_b_1": 1, "2_c_1": 3, "1_d_1": 1}  # patient b has slices of two classes
    for name, count in slices.items():
        for number in range(count):
            Image.new("L", (64, 64)).save(tmp_path / f"{name}_{number}.png")
    data = open_dataset("classification", tmp_path)
    weights = balanced(data)
    share = {name: sum(w for w, n in zip(weights, data.names, strict=True) if n.startswith(name)) for name in slices}
    assert share == pytest.approx({"0_a_1": 1 / 6, "0_b_1": 1 / 6, "2_b_1": 1 / 6, "2_c_1": 1 / 6, "1_d_1": 1 / 3})

    config = TrainConfig("ctmasknet_resnet18_t1", "data", "out", batch_size=10)
    order = EpochBatches(len(data), config, weights=weights)
    drawn: Counter[int] = Counter()
    for order.epoch in range(300):
        drawn.update(index for batch in order for _, index in batch)
    counts = [drawn[index] / drawn.total() for index in range(len(data))]
    assert counts == pytest.approx(weights, abs=0.015), "6000 draws: four standard deviations are below 0.025"


def test_an_interrupted_epoch_goes_on_where_it_stopped() -> None:
    whole, rest = batches(21), batches(21)
    whole.epoch = rest.epoch = 5
    rest.start = 2
    assert list(rest) == list(whole)[2:]


def test_epochs_differ_in_order_and_repeat_exactly() -> None:
    sampler = batches(21)
    first = list(sampler)
    sampler.epoch = 1
    second = list(sampler)
    assert [[i for _, i in b] for b in first] != [[i for _, i in b] for b in second]
    sampler.epoch = 0
    assert list(sampler) == first


def test_augmentation_depends_on_epoch_and_slice_alone(tmp_path: Path) -> None:
    data = open_dataset("segmentation", lesion_folder(tmp_path / "d", range(1, 4)), min_area=5)
    one, other = (TrainingSlices(data, Augmentation(), seed=7) for _ in range(2))
    first = one[0, 2]
    other[0, 0], other[4, 1]
    again = other[0, 2]
    assert first[2] == again[2]
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(first[1][key], again[1][key]) for key in first[1])
    assert not torch.equal(one[1, 2][0], first[0])


def test_slices_kept_on_a_device_are_the_same(tmp_path: Path) -> None:
    data = open_dataset("segmentation", lesion_folder(tmp_path / "d", range(1, 4)), min_area=5)
    kept = on_device(data, torch.device("cpu"))
    assert len(kept) == 3
    for there, here in zip(kept, data, strict=True):
        assert there.name == here.name
        assert torch.equal(there.image, here.image)
        assert torch.equal(there.target["masks"], here.target["masks"])


def test_a_batch_is_pinned_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[int] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: (pinned.append(id(tensor)), tensor.clone())[1])
    target = {"boxes": torch.zeros(2, 4), "labels": torch.ones(2), "image_label": 1}
    batch = Batch([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)], [target, {"image_label": 0}], ["a", "b"])
    copy = pin_memory(batch)  # what a DataLoader does to a batch
    assert isinstance(copy, Batch)
    assert pinned == [id(tensor) for tensor in (*batch.images, target["boxes"], target["labels"])]
    assert (copy.names, copy.targets[0]["image_label"], copy.targets[1]) == (batch.names, 1, {"image_label": 0})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory is pinned for a GPU")
def test_the_loader_gives_pinned_batches_for_a_gpu(tmp_path: Path) -> None:
    data = TrainingSlices(
        open_dataset("segmentation", lesion_folder(tmp_path / "d", range(1, 4)), min_area=5), Augmentation(), seed=7
    )
    loader = make_loader(data, batches(3, batch=3), workers=1, device=torch.device("cuda"))
    batch = next(iter(loader))
    assert all(image.is_pinned() for image in batch.images)
    assert all(target["masks"].is_pinned() for target in batch.targets)


def test_models_get_three_channels_in_0_to_1() -> None:
    image = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    ready = model_input(image, torch.device("cpu"))
    assert ready.shape == (3, 16, 16)
    assert (ready.min(), ready.max()) == (0, 1)
    assert torch.equal((ready[2] * 255).round().to(torch.uint8), image[0])


def test_rate_warms_up_and_falls_to_zero() -> None:
    config = TrainConfig("maskrcnn_resnet18_t1", "data", "out", lr=1.0, warmup=0.1)
    rates = [learning_rate(config, step, 1000) for step in range(1000)]
    assert rates[0] < 0.02
    assert max(rates) == pytest.approx(1.0, abs=0.01)
    assert rates.index(max(rates)) == pytest.approx(100, abs=2)
    assert rates[550] == pytest.approx(0.5, abs=0.01), "half way down the cosine"
    assert rates[-1] < 1e-5
    constant = TrainConfig("maskrcnn_resnet18_t1", "data", "out", recipe="paper")
    assert {learning_rate(constant, step, 1000) for step in range(1000)} == {1e-5}


def test_biases_and_normalisation_do_not_decay_with_adamw() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    config = TrainConfig("maskrcnn_resnet18_t1", "data", "out", weight_decay=0.1)
    groups = build_optimizer(model, config).param_groups
    assert {(group["weight_decay"], len(group["params"])) for group in groups} == {(0.1, 1), (0.0, 3)}
