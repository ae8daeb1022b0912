"""Read the paper author's checkpoints (``torch.save`` of 2020) without executing anything in them.

These files hold a dict with `model_weights` and a pickled anchor generator, in the pre-1.6 serialization.
`torch.load(weights_only=True)` refuses them and an unrestricted load would run code, so this is the one module that
reads a pickle. Its unpickler knows plain values and descriptions of tensors; a description becomes a tensor only once
it has been compared with the bytes that are there.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor

from ctmasknet.errors import ConfigError, WeightsError, shown, typed
from ctmasknet.registry import VARIANTS, Variant
from ctmasknet.weights.files import OWN_STATE_DICT, StoredWeights

# First object of a pre-1.6 file, and the serialization's version after it (torch/serialization.py).
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_PICKLE_LIMIT = 4_000_000  # bytes; the pickle of a ResNet50 with its optimizer's state has 0.1 million
_MOST_ANCHORS, _MOST_DIMENSIONS = 100, 8


def read_released(path: str | os.PathLike[str], variant: Variant | None = None) -> StoredWeights:
    """Read an author's `.pth` file; its keys and shapes tell the variant, which must be the one given, if any is.

    Returns:
        The weights under this library's key names; as config the numbers of classes and, if the file holds an anchor
        generator, the anchors of each FPN level. The metadata are empty.

    Raises:
        WeightsError: not such a checkpoint, damaged, holding anything beyond tensors, plain values and the anchor
            generator, of an unknown architecture, or of another variant than asked for.
    """
    path = Path(path)
    content, tensors = _unpickle(path)
    weights = content.get("model_weights") if isinstance(content, dict) else None
    if tensors and tensors.keys() == content.keys():
        raise WeightsError(f"{path}: a bare state dict, which says neither variant nor settings. {OWN_STATE_DICT}")
    if not isinstance(weights, dict) or len(tensors) < len(weights):
        raise WeightsError(f"{path}: not a released checkpoint: it has no 'model_weights' dict of tensors")
    renamed = {_rename(key): value for key, value in tensors.items()}
    found = recognised(renamed)
    if found is None:
        raise WeightsError(f"{path}: none of the 14 variants has these weights (keys: {shown(list(renamed)[:3])}...)")
    if variant is not None and found.name != variant.name:
        raise WeightsError(
            f"{path}: holds {found.name}, not {variant.name}: load it as {found.name}, or leave the name out"
        )
    config = {"num_classes": renamed[_CLASSES].numel()}
    if found.task == "classification":
        config["image_classes"] = renamed[_IMAGE_CLASSES].numel()
    anchors = _anchors(path, content.get("anchor_generator"), found)
    return StoredWeights(path, renamed, found.name, config | anchors, {})


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a bare state dict that `torch.save` wrote, such as torchvision's ImageNet weights."""
    content, tensors = _unpickle(Path(path))
    if not tensors or tensors.keys() != content.keys():
        raise WeightsError(f"{path}: not a state dict: it must hold tensors by name and nothing else")
    return tensors


# torchvision 0.3 names (left) and the author's name for module S, to today's.
_RENAMES = [
    (re.compile(r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$"), r"\1.0.\2"),
    (re.compile(r"^rpn\.head\.conv\.(weight|bias)$"), r"rpn.head.conv.0.0.\1"),
    (re.compile(r"^s2new\.fc_scores\.(weight|bias)$"), r"module_s.fc1.\1"),
    (re.compile(r"^s2new\.fc_scores_2\.(weight|bias)$"), r"module_s.fc2.\1"),
    (re.compile(r"^s2new\.fc_scores_img\.(weight|bias)$"), r"module_s.logits.\1"),
]
_CLASSES, _IMAGE_CLASSES = "roi_heads.box_predictor.cls_score.bias", "module_s.logits.bias"  # a value each
_MASK_LAYER = re.compile(r"^roi_heads\.mask_head\.mask_fcn(\d+)\.(weight|bias)$")


def _rename(key: str) -> str:
    if match := _MASK_LAYER.match(key):
        return f"roi_heads.mask_head.{int(match[1]) - 1}.0.{match[2]}"
    for pattern, new in _RENAMES:
        if pattern.match(key):
            return pattern.sub(new, key)
    return key


def recognised(weights: Mapping[str, Tensor]) -> Variant | None:
    """The variant of a state dict, by its keys alone; loading it strictly checks every shape."""
    task = "classification" if _IMAGE_CLASSES in weights else "segmentation"
    stages = {key.split(".")[2] for key in weights if key.startswith("backbone.body.layer")}
    backbone = "resnet34" if "backbone.body.layer1.2.conv1.weight" in weights else "resnet18"
    if "backbone.body.layer1.0.conv3.weight" in weights:
        backbone = "resnet50"
    for variant in VARIANTS.values():
        if (variant.task, variant.backbone, variant.stages) == (task, backbone, len(stages)) and _CLASSES in weights:
            return variant
    return None


def _anchors(path: Path, generator: Any, variant: Variant) -> dict[str, Any]:
    """Sizes and ratios from the generator's attributes, as many levels as the FPN has."""
    if generator is None:
        return {}
    stored = getattr(generator, "state", None)
    result = {}
    for option, attribute in (("anchor_sizes", "sizes"), ("anchor_ratios", "aspect_ratios")):
        levels: Any = stored.get(attribute) if isinstance(stored, dict) else None
        try:
            few = not isinstance(levels, list | tuple) or len(levels) < variant.levels
            if few or max(map(len, levels[: variant.levels])) > _MOST_ANCHORS:
                raise TypeError
            result[option] = typed(attribute, levels[: variant.levels], list[list[float]])
        except (TypeError, ValueError, ConfigError):
            need = f"{variant.name} needs {variant.levels} level(s)"
            raise WeightsError(f"{path}: its anchor generator has unusable {attribute}; {need}") from None
    return result


class _RefusedError(Exception):
    pass


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class _Described:
    """A tensor as the pickle describes it."""

    storage: _Storage
    offset: Any
    size: Any
    stride: Any

    def of(self, whole: Tensor) -> Tensor:
        """The tensor, a view of its storage."""
        if not len(self.size) == len(self.stride) <= _MOST_DIMENSIONS or not all(
            type(n) is int and n >= 0 for n in (self.offset, *self.size, *self.stride)
        ):
            raise _RefusedError("a tensor is described inconsistently")
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        count = math.prod(self.size)
        if count > whole.numel() or (count and last >= whole.numel()):
            raise _RefusedError("a tensor reaches beyond its storage")
        return whole.as_strided(self.size, self.stride, self.offset)


class _AnchorGenerator:
    """Inert: what was pickled of it is its `state`."""

    state: Any = None


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Described:
    if not isinstance(storage, _Storage):
        raise _RefusedError("a tensor is described inconsistently")
    return _Described(storage, offset, size, stride)


# Everything such a file may name. Nothing here can reach the system, and no file can change it: see `load_build`.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): lambda: {},
    ("builtins", "set"): lambda *_: None,
    ("__builtin__", "set"): lambda *_: None,
    ("torch", "Size"): lambda numbers: tuple(numbers[:_MOST_DIMENSIONS]),
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    # torch 1.1 modules carry a reference to their function back end.
    ("torch.nn.backends.thnn", "_get_thnn_function_backend"): lambda *_: None,
    ("torch", "DoubleStorage"): torch.float64,
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "BFloat16Storage"): torch.bfloat16,
    ("torch", "LongStorage"): torch.int64,
    ("torch", "IntStorage"): torch.int32,
    ("torch", "ShortStorage"): torch.int16,
    ("torch", "CharStorage"): torch.int8,
    ("torch", "ByteStorage"): torch.uint8,
    ("torch", "BoolStorage"): torch.bool,
    ("models.mask_net.rpn_segmentation", "AnchorGenerator"): _AnchorGenerator,
    ("models.mask_net.rpn", "AnchorGenerator"): _AnchorGenerator,
    ("torchvision.models.detection.rpn", "AnchorGenerator"): _AnchorGenerator,
    ("torchvision.models.detection.anchor_utils", "AnchorGenerator"): _AnchorGenerator,
}


class _Unpickler(pickle._Unpickler):
    """The one written in Python: its memo takes the room of what is in it, not of the highest number named.

    A few bytes must not cause much work, either: keys are text or whole numbers (tuples of tuples of the same tuple
    take for ever to hash), and what BUILD sets is kept as one reference.
    """

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _RefusedError(f"it asks for {module}.{name}, which released checkpoints do not hold") from None

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
            return pid[1]
        if isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage" and pid[5:] in ((), (None,)):
            _, dtype, key, _, numel = pid[:5]
            if isinstance(dtype, torch.dtype) and isinstance(key, str) and type(numel) is int and numel >= 0:
                storage = _Storage(key, dtype, numel)
                if self.storages.setdefault(key, storage) != storage:
                    raise _RefusedError("it describes one storage in two ways")
                return storage
        raise _RefusedError("it holds a kind of storage that released checkpoints do not have")

    def load_build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], _AnchorGenerator):
            self.stack[-1].state = state

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list[Any]) -> None:
        if not all(isinstance(key, str | int) for key in items[::2]):
            raise _RefusedError("it has keys that are neither text nor whole numbers")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    dispatch |= {pickle.BUILD[0]: load_build, pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems}
    for _hashing in (pickle.DICT, pickle.ADDITEMS, pickle.FROZENSET):
        del dispatch[_hashing[0]]


def _unpickle(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """What the file holds, and as tensors those of its `model_weights` or, where there is none, its own."""
    try:
        with path.open("rb") as file:
            content, read = _read_zip(file) if zipfile.is_zipfile(file) else _read_legacy(file)
            holder = content.get("model_weights", content) if isinstance(content, dict) else None
            return content, _tensors(holder, read, path.stat().st_size) if isinstance(holder, dict) else {}
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


def _tensors(holder: Mapping[Any, Any], read: Callable[[_Storage], bytes], size: int) -> dict[str, Tensor]:
    described = {key: t for key, t in holder.items() if isinstance(key, str) and isinstance(t, _Described)}
    storages = {t.storage for t in described.values()}
    if sum(storage.nbytes for storage in storages) > size:
        raise _RefusedError("it announces more data than the file has")
    whole = {s: torch.frombuffer(bytearray(read(s)), dtype=s.dtype) for s in storages if s.numel}
    return {key: t.of(whole.get(t.storage, torch.zeros(0, dtype=t.storage.dtype))) for key, t in described.items()}


def _read_legacy(file: BinaryIO) -> tuple[Any, Callable[[_Storage], bytes]]:
    """Pickles: magic number, version, system, the objects, keys of storages; then each storage, its length first."""
    file.seek(0)
    head = io.BytesIO(file.read(_PICKLE_LIMIT))
    if _Unpickler(head).load() != _MAGIC or _Unpickler(head).load() != _PROTOCOL:
        raise _RefusedError("its first bytes are not those of a torch.save file")
    _Unpickler(head).load()
    objects = _Unpickler(head)
    content, keys = objects.load(), _Unpickler(head).load()
    places, at = {}, head.tell()
    for key in keys:
        file.seek(at)
        if int.from_bytes(file.read(8), "little", signed=True) != objects.storages[key].numel:
            raise _RefusedError("its data do not match its description")
        places[key] = at + 8
        at += 8 + objects.storages[key].nbytes
    if at > file.seek(0, os.SEEK_END):
        raise _RefusedError("it is truncated")

    def read(storage: _Storage) -> bytes:
        file.seek(places[storage.key])
        return file.read(storage.nbytes)

    return content, read


def _read_zip(file: BinaryIO) -> tuple[Any, Callable[[_Storage], bytes]]:
    archive = zipfile.ZipFile(file)

    def member(name: str, size: int) -> bytes:
        entry = archive.getinfo(name)
        if entry.file_size > size or entry.compress_type != zipfile.ZIP_STORED:  # torch.save does not compress
            raise _RefusedError("its data do not match its description")
        return archive.read(entry)

    (name,) = (n for n in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", n))
    content = _Unpickler(io.BytesIO(member(name, _PICKLE_LIMIT))).load()
    folder = name.removesuffix("data.pkl")
    return content, lambda storage: member(f"{folder}data/{storage.key}", storage.nbytes)
