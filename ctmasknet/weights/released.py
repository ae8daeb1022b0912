"""Read the paper author's checkpoints (``torch.save`` of 2020) without executing anything in them.

These files hold a dict with `model_weights` and a pickled anchor generator, in the pre-1.6 serialization.
`torch.load(weights_only=True)` refuses them and an unrestricted load would run code, so this is the one module that
reads a pickle: through an unpickler whose allow-list consists of inert stand-ins.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ctmasknet.errors import WeightsError
from ctmasknet.registry import VARIANTS, Variant
from ctmasknet.weights.files import OWN_STATE_DICT

# First object of a pre-1.6 file, and the serialization's version after it (torch/serialization.py).
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_ANCHOR_GENERATORS = {
    ("models.mask_net.rpn_segmentation", "AnchorGenerator"),
    ("models.mask_net.rpn", "AnchorGenerator"),
    ("torchvision.models.detection.rpn", "AnchorGenerator"),
    ("torchvision.models.detection.anchor_utils", "AnchorGenerator"),
}


@dataclass(frozen=True)
class ReleasedCheckpoint:
    """What is worth keeping of an author's checkpoint.

    Attributes:
        variant: recognised from the keys and shapes.
        weights: state dict with this library's key names.
        num_classes: detector classes, background included.
        image_classes: outputs of module S, None for segmenters.
        anchors: `anchor_sizes` and `anchor_ratios` per FPN level, empty if the file has no anchor generator.
        epoch: the epoch it was saved after, if the file says so.
    """

    variant: Variant
    weights: dict[str, Tensor]
    num_classes: int
    image_classes: int | None
    anchors: dict[str, tuple[tuple[float, ...], ...]]
    epoch: int | None


def read_released(path: str | os.PathLike[str], variant: Variant | None = None) -> ReleasedCheckpoint:
    """Read an author's `.pth` file.

    Args:
        path: the file.
        variant: what it must hold; None recognises it.

    Raises:
        WeightsError: not such a checkpoint, damaged, holding anything beyond tensors, plain values and the anchor
            generator, of an unknown architecture, or of another variant than asked for.
    """
    path = Path(path)
    content = _unpickle(path)
    if isinstance(content, dict) and content and all(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(f"{path}: a bare state dict, which says neither variant nor settings. {OWN_STATE_DICT}")
    weights = content.get("model_weights") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in weights.items()
    ):
        raise WeightsError(f"{path}: not a released checkpoint: it has no 'model_weights' dict of tensors")
    renamed = {_rename(key): value for key, value in weights.items()}
    found = _recognise(path, renamed)
    if variant is not None and found.name != variant.name:
        raise WeightsError(
            f"{path}: holds {found.name}, not {variant.name}: load it as {found.name}, or leave the name out"
        )
    head = renamed.get("module_s.logits.weight")
    epoch = content.get("epoch")
    return ReleasedCheckpoint(
        variant=found,
        weights=renamed,
        num_classes=len(renamed["roi_heads.box_predictor.cls_score.weight"]),
        image_classes=None if head is None else len(head),
        anchors=_anchors(path, content.get("anchor_generator"), found),
        epoch=epoch if isinstance(epoch, int) else None,
    )


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a bare state dict that `torch.save` wrote, such as torchvision's ImageNet weights.

    Raises:
        WeightsError: not such a file, damaged, or holding anything but tensors.
    """
    content = _unpickle(Path(path))
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(f"{path}: not a state dict: it must hold tensors by name and nothing else")
    return dict(content)


# torchvision 0.3 names (left) and the author's name for module S, to today's.
_RENAMES = [
    (re.compile(r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$"), r"\1.0.\2"),
    (re.compile(r"^rpn\.head\.conv\.(weight|bias)$"), r"rpn.head.conv.0.0.\1"),
    (re.compile(r"^s2new\.fc_scores\.(weight|bias)$"), r"module_s.fc1.\1"),
    (re.compile(r"^s2new\.fc_scores_2\.(weight|bias)$"), r"module_s.fc2.\1"),
    (re.compile(r"^s2new\.fc_scores_img\.(weight|bias)$"), r"module_s.logits.\1"),
]
_MASK_LAYER = re.compile(r"^roi_heads\.mask_head\.mask_fcn(\d+)\.(weight|bias)$")


def _rename(key: str) -> str:
    if match := _MASK_LAYER.match(key):
        return f"roi_heads.mask_head.{int(match[1]) - 1}.0.{match[2]}"
    for pattern, new in _RENAMES:
        if pattern.match(key):
            return pattern.sub(new, key)
    return key


def _recognise(path: Path, weights: dict[str, Tensor]) -> Variant:
    """Task, depth and truncation from keys alone; the strict load that follows checks every shape."""
    task = "classification" if any(key.startswith("module_s.") for key in weights) else "segmentation"
    blocks = {
        stage: len({key.split(".")[3] for key in weights if key.startswith(f"backbone.body.layer{stage}.")})
        for stage in (1, 2, 3, 4)
    }
    stages = sum(count > 0 for count in blocks.values())
    if any(".conv3.weight" in key for key in weights):
        backbone = "resnet50"
    else:
        backbone = {2: "resnet18", 3: "resnet34"}.get(blocks[1], "unknown")
    for variant in VARIANTS.values():
        if (variant.task, variant.backbone, variant.stages) == (task, backbone, stages):
            needed = {"roi_heads.box_predictor.cls_score.weight", "backbone.fpn.inner_blocks.0.0.weight"}
            if not needed - set(weights):
                return variant
    raise WeightsError(
        f"{path}: none of the 14 variants has these weights (first keys: {', '.join(list(weights)[:3])})"
    )


def _anchors(path: Path, stored: Any, variant: Variant) -> dict[str, tuple[tuple[float, ...], ...]]:
    """Sizes and ratios from the generator's attributes, as many levels as the FPN has."""
    if stored is None:
        return {}
    result = {}
    for option, attribute in (("anchor_sizes", "sizes"), ("anchor_ratios", "aspect_ratios")):
        value = getattr(stored, attribute, None)
        try:
            levels = tuple(tuple(float(number) for number in level) for level in value)  # type: ignore[union-attr]
        except (TypeError, ValueError):
            raise WeightsError(f"{path}: its anchor generator has unusable {attribute}: {value!r}") from None
        if len(levels) < variant.levels:
            raise WeightsError(
                f"{path}: its anchor generator has {len(levels)} levels, {variant.name} needs {variant.levels}"
            )
        result[option] = levels[: variant.levels]
    return result


class _StorageType:
    """Stand-in for torch.FloatStorage and its kin, which old files name in their persistent ids."""

    def __init__(self, name: str) -> None:
        self.dtype = _DTYPES[name]


class _RefusedError(Exception):
    pass


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    whole = isinstance(storage, Tensor) and isinstance(offset, int) and len(size) == len(stride)
    if not whole or min((offset, *size, *stride)) < 0:
        raise _RefusedError("a tensor is described inconsistently")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and last >= storage.numel():
        raise _RefusedError("a tensor reaches beyond its storage")
    return storage.as_strided(tuple(size), tuple(stride), offset)


def _allowed() -> dict[tuple[str, str], Any]:
    """Everything such a file may name. Nothing here can reach the system.

    Made anew for each pickle, which may set attributes on whatever is not built in: what one file does to its
    stand-ins, the next one must not see.
    """

    class AnchorGenerator:
        """Inert: the pickled attributes, no behaviour."""

    def rebuild_tensor(*arguments: Any) -> Tensor:
        return _rebuild_tensor(*arguments)

    def rebuild_parameter(data: Any, *_: Any) -> Any:
        return data

    def nothing(*_: Any) -> None:
        return None

    return {
        ("collections", "OrderedDict"): OrderedDict,
        ("builtins", "set"): set,
        ("__builtin__", "set"): set,
        ("torch", "Size"): tuple,
        ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
        # torch 1.1 modules carry a reference to their function back end.
        ("torch.nn.backends.thnn", "_get_thnn_function_backend"): nothing,
        **{("torch", name): _StorageType(name) for name in _DTYPES},
        **dict.fromkeys(_ANCHOR_GENERATORS, AnchorGenerator),
    }


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, storage: Callable[[str, torch.dtype, int], Tensor]) -> None:
        super().__init__(file, encoding="utf-8")
        self._storage = storage
        self._allowed = _allowed()

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise _RefusedError(f"it asks for {module}.{name}, which released checkpoints do not hold") from None

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and pid[:1] == ("module",) and len(pid) == 4:
            return pid[1]
        if isinstance(pid, tuple) and pid[:1] == ("storage",) and len(pid) in (5, 6):
            _, kind, key, _, numel = pid[:5]
            view = pid[5] if len(pid) == 6 else None
            if isinstance(kind, _StorageType) and isinstance(numel, int) and numel >= 0 and view is None:
                return self._storage(str(key), kind.dtype, numel)
        raise _RefusedError("it holds a kind of storage that released checkpoints do not have")


def _unpickle(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return _read_zip(file) if zipfile.is_zipfile(file) else _read_legacy(file, size)
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file") from None
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror or error})") from None
    except _RefusedError as error:
        raise WeightsError(f"{path}: refused: {error}") from None
    except Exception as error:
        # A damaged pickle can fail in any way; nothing in it has been executed.
        raise WeightsError(
            f"{path}: not a checkpoint written by torch.save, or damaged ({type(error).__name__})"
        ) from error


def _no_storage(key: str, dtype: torch.dtype, numel: int) -> Tensor:
    raise _RefusedError("a storage stands where none belongs")


def _read_legacy(file: BinaryIO, size: int) -> Any:
    file.seek(0)
    if _Unpickler(file, _no_storage).load() != _MAGIC or _Unpickler(file, _no_storage).load() != _PROTOCOL:
        raise _RefusedError("its first bytes are not those of a torch.save file")
    _Unpickler(file, _no_storage).load()
    storages: dict[str, Tensor] = {}

    def allocate(key: str, dtype: torch.dtype, numel: int) -> Tensor:
        # The data follow after the objects: allocate now, fill below. A lying size must not exhaust memory.
        if numel * dtype.itemsize > size:
            raise _RefusedError("it announces more data than the file has")
        if key not in storages:
            storages[key] = torch.zeros(numel, dtype=dtype)
        if storages[key].dtype != dtype or storages[key].numel() != numel:
            raise _RefusedError("it describes one storage in two ways")
        return storages[key]

    content = _Unpickler(file, allocate).load()
    for key in _Unpickler(file, _no_storage).load():
        storage = storages[key]
        if int.from_bytes(file.read(8), "little", signed=True) != storage.numel():
            raise _RefusedError("its data do not match its description")
        data = file.read(storage.nbytes)
        if len(data) != storage.nbytes:
            raise _RefusedError("it is truncated")
        if data:
            storage.copy_(torch.frombuffer(bytearray(data), dtype=storage.dtype))
    return content


def _read_zip(file: BinaryIO) -> Any:
    with zipfile.ZipFile(file) as archive:
        (name,) = (n for n in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", n))
        folder = name.removesuffix("data.pkl")

        def stored(key: str, dtype: torch.dtype, numel: int) -> Tensor:
            member = archive.getinfo(f"{folder}data/{key}")
            if member.file_size != numel * dtype.itemsize or member.compress_type != zipfile.ZIP_STORED:
                raise _RefusedError("its data do not match its description")
            return (
                torch.frombuffer(bytearray(archive.read(member)), dtype=dtype) if numel else torch.zeros(0, dtype=dtype)
            )

        return _Unpickler(io.BytesIO(archive.read(name)), stored).load()
