"""ImageNet weights for a model's ResNet body, from timm's Hub repositories (`a1_in1k`, Apache-2.0)."""

from __future__ import annotations

import logging
from typing import Any

from ctmasknet.errors import WeightsError
from ctmasknet.weights.assemble import Model
from ctmasknet.weights.download import HubSource, discard, fetch, hub_source, is_commit
from ctmasknet.weights.files import WEIGHTS_NAME, is_finite, read_tensors
from ctmasknet.weights.manifest import backbone_entry

log = logging.getLogger(__name__)

_BEYOND_A_BODY = ("layer2.", "layer3.", "layer4.", "fc.")  # what a cut ResNet may lack


def load_backbone(model: Model, revision: str | None = None) -> str:
    """Start a model's body from timm's ImageNet weights; FPN, RPN and heads keep their values.

    Args:
        revision: another commit of timm's repository than the manifest's, whose SHA-256 then is not checked.

    Returns:
        Repository and commit the weights came from.

    Raises:
        WeightsError: no network and not in the cache, damaged, or not a ResNet of this depth.
    """
    entry = backbone_entry(model.variant.backbone)
    source: HubSource | None = HubSource(entry.repository, entry.revision)
    sha256: dict[str, str] = {WEIGHTS_NAME: entry.sha256}
    if revision is not None:
        source, sha256 = hub_source(entry.repository, revision), {}
    if source is None:
        raise WeightsError(f"{entry.repository}: not a repository id: reinstall ctmasknet")
    folder = fetch(source, (WEIGHTS_NAME,), sha256=sha256)
    place = f"{source.repository}@{folder.name if is_commit(folder.name) else source.revision}"
    try:
        tensors = read_tensors(folder / WEIGHTS_NAME)
    except WeightsError as error:
        discard(folder, (WEIGHTS_NAME,))
        raise WeightsError(f"{place}: {error} It was not kept in the cache.") from None
    body: Any = model.backbone.body
    expected = body.state_dict()
    missing = [k for k in expected if k not in tensors and not k.endswith("num_batches_tracked")]
    extra = [k for k in tensors if k not in expected and not k.startswith(_BEYOND_A_BODY)]
    wrong = [k for k, t in tensors.items() if k in expected and t.shape != expected[k].shape]
    if missing or extra or wrong:
        first = (missing or extra or wrong)[0]
        what = "lacks" if missing else "holds an unexpected" if extra else "holds a misshapen"
        raise WeightsError(f"{place}: not a {model.variant.backbone}: {what} {first}")
    fitting = {key: tensors[key] for key in expected if key in tensors}
    if not all(map(is_finite, fitting.values())):
        raise WeightsError(f"{place}: holds NaN or infinite values")
    body.load_state_dict(fitting, strict=False)
    log.info("%s: the body starts from %s (ImageNet)", model.variant.name, place)
    return place
