"""The way out: a folder that `from_pretrained` reads, card and golden file included, and a commit to a Hub repository.

A card is the README.md that travels with a set of weights. A golden file holds an input and the outputs that weights
gave when they were saved, to check them after a journey: `golden.safetensors` has `digest` (32,) uint8, the
`state_digest` of the weights; `image` (H, W) uint8, a synthetic slice (no patient's); and what the model made of it on
the CPU in float32. A segmenter: the best `RECORDED` detections without a score threshold, NMS at 0.5, as boxes (N, 4),
scores (N,), labels (N,) and mask areas (N,) in pixels. A classifier: logits and probabilities (K,), and boxes, scores
and labels of the best `RECORDED` RoIs of its batch.

Rounding differs between processors and versions of torch, and may exchange detections of nearly the same score, so a
recorded detection is compared with the nearest that is found, to the tolerances below. Wrong weights miss by more.
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCardData
from safetensors.torch import load_file, save
from torch import Tensor

from ctmasknet.errors import ConfigError, CTMaskNetError, WeightsError, shown, typed
from ctmasknet.example import example_slice
from ctmasknet.models import LesionMaskRCNN, Model
from ctmasknet.models.detector import Detector
from ctmasknet.models.inference import Inference, Protocol
from ctmasknet.output import json_bytes, write_files
from ctmasknet.registry import DISCLAIMER, Variant, get_variant
from ctmasknet.weights.assemble import assemble, build
from ctmasknet.weights.files import (
    CARD_NAME,
    CONFIG_NAME,
    FORMAT,
    GOLDEN_NAME,
    INT8_NAME,
    WEIGHTS_NAME,
    StoredWeights,
    checked_metadata,
    inherited,
    is_finite,
    read_weights,
    sha256_of,
    state_digest,
)
from ctmasknet.weights.hub import explained, hub_source

FAILURES_NAME = "failures.png"
_TRAVEL = (CARD_NAME, CONFIG_NAME, GOLDEN_NAME, INT8_NAME, WEIGHTS_NAME, FAILURES_NAME)
_DTYPES = {"float32": torch.float32, "float16": torch.float16}


class Published(NamedTuple):
    """Weights on the Hub at a commit; `sha256` and `bytes` are those of `model.safetensors` as the Hub states them."""

    variant: str
    repository: str
    revision: str
    sha256: str
    bytes: int

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}"


def save_pretrained(model: Model, folder: str | os.PathLike[str], said: dict[str, Any], dtype: str) -> Path:
    """What `Detector.save_pretrained` does; `said` of the metadata, None where nothing is."""
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype={dtype!r}: use {' or '.join(map(repr, _DTYPES))}")
    metadata = still_true(model) | {key: value for key, value in said.items() if value is not None}
    metadata.pop("int8", None)  # that file is not written here: tools/quantize.py makes it anew
    if said["metrics"] is not None:
        measured = said["metrics"].items()
        plain = {str(name): value.item() if hasattr(value, "item") else value for name, value in measured}
        metadata["metrics"] = typed("metrics", plain, dict[str, int | float])
    facts: dict[str, Any] = {"config": model.config.to_dict(), "metadata": metadata, "dtype": dtype}
    return write_weights(folder, model.state_dict(), variant=model.variant.name, **facts)


def write_weights(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    variant: str,
    config: Mapping[str, Any],
    metadata: Mapping[str, Any],
    dtype: str = "float32",
    golden: bool = True,
) -> Path:
    """Write weights with their config, card and golden file into `folder`: all of them or, on failure, none.

    Args:
        tensors: the state dict; floating-point values are stored as `dtype`.
        metadata: plain values under the keys classes, operating_point, temperature, metrics, training, dataset,
            license, note (for the card), caveat (shown with every prediction) and derived_from (see `inherited`).
        golden: False leaves the golden file out, whose outputs take a run of the model.
    """
    folder = Path(folder)
    metadata = checked_metadata(folder / CONFIG_NAME, dict(metadata))
    stored = {
        key: (t.to(_DTYPES[dtype]) if t.is_floating_point() else t).detach().cpu().contiguous()
        for key, t in tensors.items()
    }
    contents = {folder / WEIGHTS_NAME: save(stored, metadata={"format": "pt"})}
    if golden:
        with torch.random.fork_rng(devices=[]):  # what random values the model starts from is nobody's affair
            model = build(get_variant(variant), config).eval()
        model.load_state_dict(stored)  # the golden outputs belong to the values as stored
        model.metadata = metadata
        contents[folder / GOLDEN_NAME] = save(golden_outputs(model))
    contents[folder / CARD_NAME] = model_card(get_variant(variant), metadata).encode()
    facts = {"library": "ctmasknet", "format": FORMAT, "variant": variant, "config": dict(config)}
    contents[folder / CONFIG_NAME] = json_bytes(facts | {"metadata": metadata}, indent=2)
    write_files(contents)
    if not golden:
        (folder / GOLDEN_NAME).unlink(missing_ok=True)  # it is of other weights
    return folder


def push_folder(
    folder: str | os.PathLike[str], repository: str, *, private: bool = False, failures: bytes | None = None
) -> Published:
    """Publish a folder of weights: model, config, card and golden file, in one commit; nothing else in it travels.

    The folder is checked first, as by `check_folder`. A missing card or golden file is made on the way.

    Args:
        repository: ``"owner/name"``, made if missing.
        private: make a new repository private.
        failures: see `packed`.
    """
    target = hub_source(repository)
    if target is None or "@" in repository:
        raise WeightsError(f"{repository!r} is not a repository id: give owner/name")
    model, files = packed(folder, repository, failures)
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    api = HfApi()
    explained(target, lambda: api.create_repo(repository, private=private, exist_ok=True))
    message = f"{model.variant.name} {model.metadata.get('note', '')}".strip()[:72]
    try:
        commit = explained(target, lambda: api.create_commit(repository, operations, commit_message=message))
    except ValueError as error:  # the client's word for a card whose metadata the Hub refuses
        raise WeightsError(
            f"{Path(folder) / CARD_NAME}: the Hub refuses the card: {' '.join(str(error).split())}"
        ) from None
    there = explained(target, lambda: api.get_paths_info(repository, [WEIGHTS_NAME], revision=commit.oid))
    sha256 = sha256_of(Path(folder) / WEIGHTS_NAME)
    lfs = getattr(there[0], "lfs", None) if there else None
    if lfs is None or lfs.sha256 != sha256:
        raise WeightsError(f"{repository}@{commit.oid}: the Hub holds other weights than those sent: push again")
    return Published(model.variant.name, repository, commit.oid, sha256, lfs.size)


def packed(
    folder: str | os.PathLike[str], repository: str, failures: bytes | None = None
) -> tuple[Model, dict[str, bytes]]:
    """The model of a folder, checked as by `check_folder`, and by name the content of the files that travel.

    Args:
        failures: a picture for the card's known failures, as PNG; None takes the folder's ``failures.png``, if any.
    """
    model, folder = check_folder(folder), Path(folder)
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.name in _TRAVEL}
    files |= {} if failures is None else {FAILURES_NAME: failures}
    card = files.get(CARD_NAME) or model_card(model.variant, model.metadata).encode()
    for said, instead in ((FOLDER, repository), (_NO_PICTURES, _PICTURES if FAILURES_NAME in files else _NO_PICTURES)):
        card = card.replace(said.encode(), instead.encode())
    files[CARD_NAME] = card
    if GOLDEN_NAME not in files:
        files[GOLDEN_NAME] = save(golden_outputs(model))
    return model, files


def check_folder(folder: str | os.PathLike[str]) -> Model:
    """Load a folder as a stranger would, golden file included if there is one."""
    stored = read_weights(folder)
    return verified(stored) if stored.path.with_name(GOLDEN_NAME).is_file() else assemble(stored, {})


def still_true(model: Model) -> dict[str, Any]:
    """A model's metadata, as far as they hold for its values as they are now; of changed ones, see `inherited`.

    What was set in `model.metadata` after the weights were loaded stays in any case, and so do the classes.
    """
    digest, said = model.loaded or (None, {})
    if digest is None or digest == state_digest(model.state_dict()):
        return dict(model.metadata)
    since = {key: value for key, value in model.metadata.items() if key == "classes" or value != said.get(key)}
    return inherited(said, model.variant.name) | since


FOLDER = "PATH OF THIS FOLDER"
"""Stands in a card for the place the weights are loaded from, until they are pushed to a repository."""

_DATASET_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)

_USE = {
    "segmentation": "lesions = model([image])[0]  # boxes, labels, scores, masks",
    "classification": "result = model([image])[0]  # logits, probabilities, RoI batch",
}

_FAILURES = """## Known failures

Seen on phantoms and on the validation slices of the default weights; expect them of other segmenters, too.

- Small lesions, a few millimetres wide, are missed.
- Neighbours that nearly touch are often united in one box, and a large lesion is sometimes split.
- Motion: breathing or a heartbeat during the scan doubles vessels, which are marked although the slice is healthy.
- Another window than the lung's: in a picture stored in the mediastinal window bone is marked, and lesions are not.
- Exchanged grey levels, air white and bone black, give nonsense, and no error says so.

Pictures: `docs/failures.png` in the repository of ctmasknet."""
_NO_PICTURES, _PICTURES = _FAILURES.splitlines()[-1], f"![Slices on which these weights fail]({FAILURES_NAME})"


def model_card(variant: Variant, metadata: Mapping[str, Any]) -> str:
    """Markdown with the YAML header the Hugging Face Hub reads; only what `metadata` states is claimed.

    A `dataset` that is a Hub id also goes into the header's list; a sentence only names the data of the figures.
    """
    parts = [
        f"---\n{_card_header(variant, metadata).to_yaml()}\n---",
        f"# {variant.name}",
        f"{variant.title}, after *Lightweight Model For The Prediction of COVID-19 Through The Detection And "
        "Segmentation of Lesions in Chest CT Scans* (A. Ter-Sarkisov, 2020).",
        DISCLAIMER,
        *(str(metadata[key]) for key in ("note", "caveat") if metadata.get(key)),
        "## Use",
        "```python\nimport ctmasknet\n\n"
        f'model = ctmasknet.create_model("{variant.name}", weights="{FOLDER}")\n{_USE[variant.task]}\n```',
        "Input: a list of (3, H, W) float tensors in 0..1, the lung window [-1350, 150] HU mapped to 0..1 and repeated "
        "over three channels.",
    ]
    if classes := metadata.get("classes"):
        parts.append("Classes: " + ", ".join(f"{i} {name}" for i, name in enumerate(classes)) + ".")
    if point := metadata.get("operating_point"):
        words = {"score_threshold": "score above", "nms_threshold": "NMS at"}
        thresholds = ", ".join(f"{words[key]} {value}" for key, value in point.items())
        parts.append(f"Operating point, to which a model with these weights is set: {thresholds}.")
    if temperature := metadata.get("temperature"):
        parts.append(f"Probabilities: softmax of logits / {temperature:.4g}, fitted on validation data.")
    if variant.task == "segmentation":
        parts.append(_FAILURES)
    origins = metadata.get("derived_from", ())
    if metadata.get("dataset") or origins:
        parts += ["## Data", str(metadata.get("dataset") or "Not stated."), *map(_said_of, origins)]
    for title, head, key in (("Training", "setting", "training"), ("Measured", "metric", "metrics")):
        if metadata.get(key):
            rows = [f"| {name} | {value} |" for name, value in metadata[key].items()]
            parts += [f"## {title}", "\n".join([f"| {head} | value |", "| --- | --- |", *rows])]
    if metadata.get("int8"):
        parts += ["## In int8", str(metadata["int8"]["measured"])]
    parts += ["## Licence", f"{metadata.get('license', 'not stated')} (weights)."]
    terms = {before["license"] for before in origins if "license" in before} - {metadata.get("license")}
    if terms:
        parts.append(f"The weights that training started from are {', '.join(sorted(terms))}: those terms apply, too.")
    return "\n\n".join(parts) + "\n"


def _said_of(before: Mapping[str, Any]) -> str:
    """An entry of `derived_from` as a sentence or two."""
    said = f"Training started from weights of {before.get('variant') or 'an unknown variant'}"
    said += f" ({before.get('license', 'licence not stated')})."
    said += f" Their data: {before['dataset']}" if "dataset" in before else ""
    return said + (f" {before['caveat']}" if "caveat" in before else "")


def _card_header(variant: Variant, metadata: Mapping[str, Any]) -> ModelCardData:
    task = "image-segmentation" if variant.task == "segmentation" else "image-classification"
    dataset, metrics = str(metadata.get("dataset") or ""), metadata.get("metrics", {})
    known_id = _DATASET_ID.fullmatch(dataset) is not None
    results = [
        EvalResult(
            task_type=task,
            dataset_type=dataset if known_id else "other",
            dataset_name=textwrap.shorten(dataset or "not stated", 200, placeholder=" ..."),
            metric_type=name,
            metric_value=value,
        )
        for name, value in metrics.items()
    ]
    return ModelCardData(
        license=metadata.get("license"),
        library_name="ctmasknet",
        pipeline_tag=task,
        tags=["chest-ct", "covid-19", "medical-imaging", variant.task, "mask-rcnn"],
        datasets=[dataset] if known_id else None,
        metrics=list(metrics) or None,
        model_name=variant.name if results else None,
        eval_results=results or None,
    )


RECORDED = 16
_MOST_PIXELS = 2**24
_NMS_THRESHOLD = 0.5
_TOLERANCES = {  # fraction of the value recorded, plus so much; boxes and areas in pixels
    "boxes": (0.0, 0.5),
    "scores": (0.0, 0.01),
    "labels": (0.0, 0.0),
    "areas": (0.05, 8.0),
    "logits": (0.01, 0.05),
    "probabilities": (0.0, 0.01),
}
_DAMAGED = "The weights or this installation are damaged: ctmasknet doctor, then download them again"
OF_THE_IMAGE = ("logits", "probabilities")
"""Outputs that have no row per region."""


def golden_outputs(model: Model) -> dict[str, Tensor]:
    """The content of a golden file for a model on the CPU in float32."""
    image = torch.from_numpy(example_slice().image[::2, ::2].copy())
    return {"digest": _digest(model), "image": image} | _outputs(model, image, RECORDED)


def verified(stored: StoredWeights) -> Model:
    """The model of stored weights, as it was saved, once their golden file is seen to be of them: outputs and digest.

    Raises:
        WeightsError: it is not, or there is none.
    """
    model, path = assemble(stored, {}), stored.path.with_name(GOLDEN_NAME)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file, so the weights cannot be verified: load them without verify=True")
    try:
        recorded = load_file(path)
        if problem := _problem(model, recorded):
            raise WeightsError(f"{path}: {problem}")
    except CTMaskNetError:
        raise
    except Exception as error:  # what a damaged file may hold cannot be foreseen
        raise WeightsError(f"{path}: not a readable golden file ({error}). Download or copy it again.") from None
    if model.int8_network is not None:
        model.int8_network(model)
    return model


def _problem(model: Model, golden: Mapping[str, Tensor]) -> str | None:
    recorded = dict(golden)
    image, digest = recorded.pop("image", None), recorded.pop("digest", None)
    if image is None or image.dim() != 2 or image.dtype != torch.uint8 or image.numel() > _MOST_PIXELS:
        return "holds no (H, W) uint8 image: not a golden file of this library"
    found = _outputs(model, image, 2 * RECORDED)
    if set(found) != set(recorded):
        return f"holds {', '.join(map(shown, sorted(recorded)))}, not {', '.join(sorted(found))}"
    for key, value in recorded.items():
        count = len(found[key]) if key in OF_THE_IMAGE else len(recorded["scores"])
        if value.dtype != found[key].dtype or value.shape != (count, *found[key].shape[1:]):
            return "the shapes in it contradict each other: not a golden file of this library"
    if difference := _difference(recorded, found):
        return f"the model does not reproduce its recorded outputs: {difference}. {_DAMAGED}"
    if digest is None or not torch.equal(digest, _digest(model)):
        return "recorded of other weights, by their SHA-256: download the folder again"
    return None


def _digest(model: Model) -> Tensor:
    return torch.tensor(list(bytes.fromhex(state_digest(model.state_dict()))), dtype=torch.uint8)


def _outputs(model: Model, image: Tensor, count: int) -> dict[str, Tensor]:
    inference = Inference(model)
    (reading,) = inference.read([(image.float() / 255).expand(3, -1, -1)])
    if not is_finite(reading.scores):
        name = model.variant.name
        raise WeightsError(f"{name}: what these weights compute is not finite. Download or train them again")
    if isinstance(model, LesionMaskRCNN):
        (found,) = inference.detect(reading, Protocol(0.0, _NMS_THRESHOLD, model.roi_heads.mask_score, count))
        result = vars(found) | {"areas": found.masks.flatten(1).sum(1).float()}
        del result["masks"]
    else:
        result = inference.classify(reading)
        del result["deltas"]
    return {key: (value if key in OF_THE_IMAGE else value[:count]).clone() for key, value in result.items()}


def _difference(recorded: dict[str, Tensor], found: dict[str, Tensor]) -> str | None:
    if len(found["scores"]) < len(recorded["scores"]):
        return f"{len(found['scores'])} regions are found, not {len(recorded['scores'])}"
    rows = nearest(recorded, found, box=_TOLERANCES["boxes"][1], score=_TOLERANCES["scores"][1])
    for key, value in recorded.items():
        fraction, rest = _TOLERANCES[key]
        gap = (value - (found[key] if key in OF_THE_IMAGE else found[key][rows])).abs()
        if not (gap <= fraction * value.abs() + rest).all():
            return f"{key} differ by up to {gap.max().item():.3g}"
    return None


def nearest(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], *, box: float, score: float) -> Tensor:
    """(N,) for each expected region the row of the given one of its class that is nearest in box and score.

    Args:
        expected, given: boxes (N, 4), scores (N,), labels (N,); at least as many given as expected.
        box, score: distances that weigh the same.
    """
    distance = (expected["boxes"][:, None] - given["boxes"]).abs().amax(-1) / box
    distance += (expected["scores"][:, None] - given["scores"]).abs() / score
    distance[expected["labels"][:, None] != given["labels"]] += 1e9
    return distance.argmin(1) if distance.numel() else torch.zeros(0, dtype=torch.int64)


Detector.publisher = sys.modules[__name__]
