"""The author's checkpoints: read without executing anything, and reproducing the released code's outputs."""

from __future__ import annotations

import json
import pickle
import struct
import sys
import tracemalloc
import zipfile
from contextlib import suppress
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ctmasknet import WeightsError, create_model, from_pretrained, load_released
from ctmasknet.cli import main
from ctmasknet.zoo import open_model


def test_reads_the_newer_serialization_too(tmp_path):
    path = golden.checkpoint(tmp_path / "released.pth", "maskrcnn_resnet18_t2", legacy=False)
    model = load_released(path)
    stored = golden.weights("maskrcnn_resnet18_t2")
    assert_close(model.state_dict()["rpn.head.cls_logits.weight"], stored["rpn.head.cls_logits.weight"])


def test_torch_itself_refuses_what_we_write_in_these_tests(tmp_path):
    path = golden.checkpoint(tmp_path / "released.pth", "maskrcnn_resnet18_t2")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


@pytest.mark.parametrize("module", ["models.mask_net.rpn_segmentation", "models.mask_net.rpn"])
def test_takes_the_anchors_from_the_file(module, tmp_path):
    sizes, ratios = ((4, 8, 16, 32, 64),) * 5, ((0.2, 0.4, 0.6, 1.0, 1.5, 2.5),) * 5
    generator = golden.anchor_generator(module, sizes, ratios)
    path = golden.checkpoint(tmp_path / "released.pth", "maskrcnn_resnet18_t2", anchor_generator=generator)
    model = load_released(path)
    assert model.rpn.anchor_generator.sizes == ((4, 8, 16, 32, 64),)
    assert model.rpn.anchor_generator.aspect_ratios == ((0.2, 0.4, 0.6, 1.0, 1.5, 2.5),)


def test_a_file_of_separate_lesion_classes_keeps_them(tmp_path):
    weights = golden.weights("maskrcnn_resnet18_t2")
    for key, tensor in list(weights.items()):
        rows = {"cls_score": 3, "mask_fcn_logits": 3, "bbox_pred": 12}.get(key.split(".")[-2])
        if rows and key.startswith("roi_heads"):
            weights[key] = torch.zeros(rows, *tensor.shape[1:])
    path = golden.checkpoint(tmp_path / "released.pth", "maskrcnn_resnet18_t2", model_weights=weights)
    assert load_released(path).config.num_classes == 3


class Payload:
    """Runs code when unpickled by an unrestricted loader."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("place", ["epoch", "anchor_generator", "extra"])
def test_refuses_anything_else_in_the_pickle_and_runs_none_of_it(place, legacy, tmp_path):
    target = tmp_path / "executed"
    path = golden.checkpoint(tmp_path / "evil.pth", "maskrcnn_resnet18_t2", legacy=legacy, **{place: Payload(target)})
    with pytest.raises(WeightsError, match=r"evil\.pth: refused"):
        load_released(path)
    assert not target.exists()


def test_the_payload_of_these_tests_would_really_run(tmp_path):
    target = tmp_path / "executed"
    pickle.loads(pickle.dumps(Payload(target)))
    assert target.exists()


@pytest.mark.parametrize("name", ["models.mask_net.rpn_segmentation.Other", "torch.nn.modules.linear.Linear"])
def test_refuses_classes_outside_the_allow_list(name, tmp_path):
    module, attribute = name.rsplit(".", 1)
    if module.startswith("torch"):
        extra = torch.nn.Linear(2, 2)
    else:
        golden.anchor_generator(module)
        kind = type(attribute, (), {"__module__": module})
        setattr(sys.modules[module], attribute, kind)
        extra = kind()
    with pytest.raises(WeightsError, match=f"asks for {module}.{attribute}"):
        load_released(golden.checkpoint(tmp_path / "x.pth", "maskrcnn_resnet18_t2", extra=extra))


def test_names_the_variant_it_holds_when_another_was_asked_for(tmp_path):
    path = golden.checkpoint(tmp_path / "released.pth", "maskrcnn_resnet18_t2")
    with pytest.raises(WeightsError, match="holds maskrcnn_resnet18_t2, not maskrcnn_resnet18_t1"):
        load_released(path, "maskrcnn_resnet18_t1")


@pytest.mark.parametrize("keep", [0, 10, 100, 5000, 0.3, 0.999])
@pytest.mark.parametrize("legacy", [True, False])
def test_truncated_files_are_refused(keep, legacy, tmp_path):
    path = golden.checkpoint(tmp_path / "released.pth", "maskrcnn_resnet18_t2", legacy=legacy)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(WeightsError, match=r"released\.pth"):
        load_released(path)


def test_damaged_bytes_never_escape_as_another_exception(tmp_path):
    path = golden.checkpoint(tmp_path / "released.pth", "maskrcnn_resnet18_t2")
    whole = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    for _ in range(40):
        damaged = bytearray(whole)
        for position in rng.integers(0, 13_000, 4):  # the pickles; the values follow
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        with suppress(WeightsError):  # anything else fails the test
            load_released(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "no 'model_weights'"),
        ({"model_weights": {"a": 1}}, "no 'model_weights'"),
        ({"model_weights": {"a.weight": torch.zeros(2)}}, "none of the 14 variants"),
    ],
)
def test_other_contents_are_refused(content, message, tmp_path):
    with pytest.raises(WeightsError, match=message):
        load_released(golden.save_released(tmp_path / "x.pth", content))


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("roi_heads.box_head.fc6.weight", (128, 7), r"1 of another shape \(first: roi_heads\.box_head\.fc6\.weight\)"),
        ("roi_heads.box_predictor.cls_score.weight", (), r"1 of another shape \(first: .*cls_score\.weight\)"),
        ("s2new.fc_scores.weight", (2, 2), r"1 unexpected \(first: module_s\.fc1\.weight\)"),
    ],
)
def test_wrong_tensors_are_refused(key, shape, message, tmp_path):
    weights = golden.weights("maskrcnn_resnet18_t2")
    weights[key] = torch.zeros(shape)
    path = golden.checkpoint(tmp_path / "x.pth", "maskrcnn_resnet18_t2", model_weights=weights)
    with pytest.raises(WeightsError, match=message):
        load_released(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(WeightsError, match="no such file"):
        load_released(tmp_path / "nowhere.pth")
    with pytest.raises(WeightsError, match="cannot be read"):
        load_released(tmp_path)


def test_convert_writes_what_from_pretrained_loads(tmp_path):
    path = golden.checkpoint(tmp_path / "released.pth", "ctmasknet_resnet18_t2")
    (tmp_path / "known.json").write_text(json.dumps({"license": "mit", "classes": ["a", "b", "c"]}))
    known = ["--metadata", str(tmp_path / "known.json")]
    assert main(["convert", str(path), "-o", str(tmp_path / "out"), *known]) == 0
    direct, converted = load_released(path), from_pretrained(tmp_path / "out", verify=True)
    assert converted.variant.name == "ctmasknet_resnet18_t2"
    assert converted.metadata == {"license": "mit", "classes": ["a", "b", "c"]}
    for key, tensor in direct.state_dict().items():
        assert torch.equal(tensor, converted.state_dict()[key]), key
    assert converted.config == direct.config


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("bad.pth", "not a checkpoint", "bad.pth"),
        ("known.json", '{"license": 3}', "known.json: license=3: text is needed"),
        ("known.json", "[]", "known.json: must hold a JSON object"),
    ],
)
def test_convert_reports_a_bad_file_in_one_line(file, content, words, tmp_path, capsys):
    golden.checkpoint(tmp_path / "bad.pth", "maskrcnn_resnet18_t2")
    (tmp_path / "known.json").write_text("{}")
    (tmp_path / file).write_text(content)
    known = ["--metadata", str(tmp_path / "known.json")]
    assert main(["convert", str(tmp_path / "bad.pth"), "-o", str(tmp_path / "out"), *known]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert words in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["mine.pth", "mine.pt", "pytorch_model.bin"])
def test_a_state_dict_of_ones_own_is_told_what_to_do(name, tmp_path):
    torch.save(create_model("maskrcnn_resnet18_t2").state_dict(), tmp_path / name)
    for load in (load_released, open_model, lambda path: create_model("maskrcnn_resnet18_t2", weights=path)):
        with pytest.raises(WeightsError, match=rf"{name}.*save_pretrained"):
            load(tmp_path / name)


STORAGE, GENERATOR = b"ctorch\nFloatStorage\n", b"ctorchvision.models.detection.rpn\nAnchorGenerator\n"


@pytest.mark.parametrize("target", [STORAGE, GENERATOR])
def test_what_a_hostile_file_does_to_its_stand_ins_the_next_file_does_not_see(target, tmp_path):
    # Opcodes: the stand-in, the state (None, {"dtype": None, "sizes": ()}) to set on it by BUILD, the end.
    state = pickle.dumps((None, {"dtype": None, "sizes": ()}), protocol=2)[2:-1]
    head = [pickle.dumps(value, protocol=2) for value in (0x1950A86A20F9469CFC6C, 1001, {})]
    (tmp_path / "hostile.pth").write_bytes(b"".join(head) + b"\x80\x02" + target + state + b"b.")
    with pytest.raises(WeightsError, match=r"hostile\.pth"):
        load_released(tmp_path / "hostile.pth")
    bare = golden.anchor_generator("torchvision.models.detection.rpn")
    vars(bare).pop("sizes", None)
    path = golden.checkpoint(tmp_path / "good.pth", "maskrcnn_resnet18_t2", anchor_generator=bare)
    with pytest.raises(WeightsError, match="unusable sizes"):
        load_released(path)
    assert (
        load_released(golden.checkpoint(tmp_path / "good.pth", "maskrcnn_resnet18_t2")).variant.backbone == "resnet18"
    )


HEAD = b"".join(pickle.dumps(value, protocol=2) for value in (0x1950A86A20F9469CFC6C, 1001, {}))
FLOATS = b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"


def tensor(size: bytes, stride: bytes) -> bytes:
    """Opcodes for {"model_weights": {"a": a tensor of 4 stored values}} with this size and stride."""
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n" + FLOATS + b"K\x00" + size + stride + b"I00\n}tR"
    return b"\x80\x02}X\x0d\x00\x00\x00model_weights}X\x01\x00\x00\x00a" + rebuilt + b"ss."


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        (b"\x80\x02Nr" + struct.pack("<I", 2**27) + b".", "not a released checkpoint"),  # the memo's place 2^27
        (b"\x80\x02})" + b"2\x86" * 60 + b"Ns.", "neither text nor whole numbers"),  # 2^60 tuples to hash
        (tensor(b"J\x00\x00\x00\x10J\x00\x00\x00\x10\x86", b"K\x00K\x00\x86"), "beyond its storage"),
        (tensor(b"K\x02K\x02\x86", b"K\x02K\x02\x86"), "beyond its storage"),
        (tensor(b"K\x04\x85", b"J\xff\xff\xff\xff\x85"), "described inconsistently"),
        (tensor(b"(" + b"K\x01" * 9 + b"t", b"(" + b"K\x01" * 9 + b"t"), "described inconsistently"),
        (b"\x80\x02" + b"]" * 5_000_000 + b".", "damaged"),
        (b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b".", "not a released checkpoint"),
    ],
    ids=["memo", "hash", "zero strides", "overlong", "negative", "dimensions", "objects", "digits"],
)
def test_a_few_bytes_cannot_ask_for_much_room_or_time(objects, message, tmp_path):
    keys = ["0"] if FLOATS in objects else []
    data = pickle.dumps(keys, protocol=2) + struct.pack("<q4f", 4, 1, 2, 3, 4)
    (tmp_path / "hostile.pth").write_bytes(HEAD + objects + data)
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError, match=rf"hostile\.pth.*{message}"):
            load_released(tmp_path / "hostile.pth")
        assert tracemalloc.get_traced_memory()[1] < 600e6
    finally:
        tracemalloc.stop()


def test_a_compressed_pickle_is_refused_before_it_is_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(3_000_000))
    with pytest.raises(WeightsError, match=r"bomb\.pth: refused: its data do not match"):
        load_released(tmp_path / "bomb.pth")


def test_one_storage_named_3000_times_is_read_once(tmp_path):
    storage = torch.zeros(1_000_000)
    path = tmp_path / "many.pth"
    torch.save({"model_weights": {f"{n}.weight": storage[n:] for n in range(3000)}}, path)
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError, match="none of the 14 variants"):
            load_released(path)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_complex_weights_are_refused(tmp_path):
    torch.save({"model_weights": {"a": torch.zeros(2, dtype=torch.complex64)}}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"asks for torch\.ComplexFloatStorage"):
        load_released(tmp_path / "x.pth")
