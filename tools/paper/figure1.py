"""Figure 1: the parts of a variant."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from ctmasknet.evaluation.evaluate import Table
from ctmasknet.models.config import model_config
from ctmasknet.registry import DEFAULT_CLASSIFIER, VARIANTS, get_variant
from ctmasknet.zoo import create_model
from paper.drawing import FAINT, FONT, INK, matplotlib_of
from paper.request import Made, Request, only_one


def make(request: Request) -> Made:
    (name,) = only_one(request.weights or (DEFAULT_CLASSIFIER,), "Figure 1")
    parts = tensor_shapes(name)
    rows = tuple((part, shape.replace("\n", "; ")) for part, shape in parts.items())
    table = Table(f"Figure 1. {VARIANTS[name].title}: shapes", (("part", "s"), ("shape", "s")), rows)
    return Made(table, architecture_figure(name))


def architecture_figure(name: str) -> Any:
    """Figure 1: the parts of a variant with the shapes of their tensors for a 512 x 512 slice.

    Shapes are recorded in a forward pass, not written down; parts that a truncated body leaves out are dashed.

    Args:
        name: one of `list_models()`.

    Returns:
        A matplotlib figure.

    Raises:
        ConfigError: unknown variant.
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib = matplotlib_of()
    variant = get_variant(name)
    shapes = tensor_shapes(name)
    config = model_config(variant)
    with matplotlib.rc_context(FONT):
        figure, axes = _canvas(matplotlib, 7.2, 4.1)
        draw = _Blocks(matplotlib, axes)
        axes.set(xlim=(0, 100), ylim=(0, 57))
        axes.axis("off")
        axes.set_title(f"{variant.title}: {variant.num_values / 1e6:.2f}M values", loc="left", pad=2)
        # Body, left to right; FPN below it.
        names = ["stem", "block 1", "block 2", "block 3", "block 4"]
        starts = [16.5 + 16.6 * index for index in range(len(names))]
        draw.box(1, 40, 12, 11, "slice", shapes["input"], "#FFFFFF")
        for index, (part, start) in enumerate(zip(names, starts, strict=True)):
            kept = index <= variant.stages
            label = shapes[part] if kept else "left out"
            draw.box(start, 40, 13, 11, part, label, "#D6E9F5" if kept else "#FFFFFF", dashed=not kept)
            draw.arrow(13 if index == 0 else starts[index - 1] + 13, 45.5, start, 45.5, kept)
        draw.bracket(starts[0], starts[-1] + 13, 53, f"{variant.backbone.replace('resnet', 'ResNet')} body")
        levels = variant.levels
        height = 9
        draw.box(1, 25, 30, height, "feature pyramid", shapes["fpn"], "#FCE8C5")
        for index in range(variant.stages - levels + 1, variant.stages + 1):
            middle = starts[index] + 6.5
            if index < variant.stages:
                draw.line([(middle, 40), (middle, 36.5)])
            else:
                draw.line([(middle, 40), (middle, 36.5), (16, 36.5)])
                draw.arrow(16, 36.5, 16, 25 + height)
        draw.box(36, 25, 27, height, "RPN", shapes["rpn"], "#D9EFE7")
        draw.arrow(31, 29.5, 36, 29.5)
        draw.box(68, 25, 31, height, "RoIAlign, box head", shapes["box"], "#D9EFE7")
        draw.arrow(63, 29.5, 68, 29.5)
        if variant.task == "segmentation":
            draw.box(68, 6, 31, 11, "mask head", shapes["mask"], "#F6D9C6")
            draw.arrow(83.5, 25, 83.5, 17)
            draw.box(30, 6, 31, 11, "lesions", "boxes, scores, labels, masks", "#FFFFFF")
            draw.arrow(68, 11.5, 61, 11.5)
        else:
            draw.box(
                68, 6, 31, 11, "RoI batch", f"{variant.roi_batch} ranked RoIs x 5\nscore, dx, dy, dw, dh", "#F6D9C6"
            )
            draw.arrow(83.5, 25, 83.5, 17)
            draw.box(33, 6, 29, 11, "module S", shapes["s"], "#F6D9C6")
            draw.arrow(68, 11.5, 62, 11.5)
            draw.box(1, 6, 26, 11, "class logits", f"{config.image_classes}: control,\npneumonia, COVID-19", "#FFFFFF")
            draw.arrow(33, 11.5, 27, 11.5)
        anchors = len(config.anchors(levels)[0][0]) * len(config.anchors(levels)[1][0])
        note = f"Maps as channels x height x width. {anchors} anchors per cell, stride {variant.stride} px"
        note += f" at the coarsest of {levels} levels." if levels > 1 else "."
        axes.text(1, 1, note, fontsize=7, color=INK, va="bottom")
    return figure


@torch.no_grad()
def tensor_shapes(name: str) -> dict[str, str]:
    """Shapes of what each part puts out, seen in a forward pass of a 512 x 512 slice."""
    variant = get_variant(name)
    # Two RoIs are enough to see the shapes, and quick.
    few: dict[str, Any] = {"rpn_pre_nms_top_n_test": 2, "rpn_post_nms_top_n_test": 2, "box_score_thresh": -0.01}
    model = create_model(name, **few)
    seen: dict[str, tuple[int, ...]] = {}
    watched = {"stem": model.backbone.body.maxpool, "rpn": model.rpn.head, "box": model.roi_heads.box_roi_pool}
    watched |= {f"block {n}": getattr(model.backbone.body, f"layer{n}") for n in range(1, variant.stages + 1)}
    watched |= {"box head": model.roi_heads.box_head}
    if variant.task == "segmentation":
        watched |= {"mask in": model.roi_heads.mask_roi_pool, "mask": model.roi_heads.mask_predictor}
    features: list[tuple[int, ...]] = []

    def record(part: str) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            first = output[0][0] if part == "rpn" else output
            seen[part] = tuple(first.shape)

        return hook

    hooks = [module.register_forward_hook(record(part)) for part, module in watched.items()]
    levels = model.backbone.register_forward_hook(
        lambda _, __, out: features.extend(tuple(v.shape) for v in out.values())
    )
    model([torch.zeros(3, 512, 512)])
    for hook in [*hooks, levels]:
        hook.remove()
    text = {part: _times(shape[1:]) for part, shape in seen.items()}
    fpn = f"{_times(features[0][1:])}"
    if len(features) > 1:
        sides = ", ".join(str(shape[-1]) for shape in features)
        fpn = f"{features[0][1]} maps of side {sides}"
    anchors = seen["rpn"][1]
    text |= {
        "input": "3 x 512 x 512",
        "fpn": fpn,
        "rpn": f"{anchors} scores, {4 * anchors} deltas\nper cell; up to 1000 RoIs",
    }
    hidden = seen["box head"][1]
    text["box"] = f"{_times(seen['box'][1:])} per RoI\n{hidden} {hidden}, class and box".replace(
        f"{hidden} {hidden}", f"{hidden}, {hidden}"
    )
    if variant.task == "segmentation":
        text["mask"] = f"{_times(seen['mask in'][1:])} per RoI\nlogits {_times(seen['mask'][1:])}"
    else:
        s = model.module_s
        text["s"] = f"{s.fc1.in_features}, {s.fc1.out_features}, {s.fc2.out_features}, {s.logits.out_features}"
    return text


class _Blocks:
    """Boxes and arrows of Figure 1."""

    def __init__(self, matplotlib: ModuleType, axes: Any) -> None:
        self._patches, self._axes = matplotlib.patches, axes

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        title: str,
        text: str,
        colour: str,
        *,
        dashed: bool = False,
    ) -> None:
        ink = FAINT if dashed else INK
        style = {"linestyle": "--" if dashed else "-", "edgecolor": ink, "facecolor": colour, "linewidth": 0.8}
        shape = "round,pad=0,rounding_size=1"
        self._axes.add_patch(self._patches.FancyBboxPatch((x, y), width, height, boxstyle=shape, **style))
        lines = text.count("\n") + 1
        middle = y + height / 2
        self._axes.text(
            x + width / 2,
            middle + 1.35 * lines,
            title,
            ha="center",
            va="center",
            fontsize=8,
            color=ink,
            fontweight="bold",
        )
        self._axes.text(
            x + width / 2, middle - 1.5, text, ha="center", va="center", fontsize=6.8, color=ink, linespacing=1.15
        )

    def arrow(self, x1: float, y1: float, x2: float, y2: float, solid: bool = True) -> None:
        style = {"arrowstyle": "-|>", "color": INK if solid else FAINT, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0}
        style["linestyle"] = "-" if solid else "--"
        self._axes.annotate("", (x2, y2), (x1, y1), arrowprops=style)

    def line(self, points: Sequence[tuple[float, float]]) -> None:
        self._axes.plot(*zip(*points, strict=True), color=INK, linewidth=0.9, solid_joinstyle="miter")

    def bracket(self, x1: float, x2: float, y: float, text: str) -> None:
        self._axes.plot([x1, x1, x2, x2], [y - 1, y, y, y - 1], color=INK, linewidth=0.7)
        self._axes.text((x1 + x2) / 2, y + 0.6, text, ha="center", va="bottom", fontsize=7.5)


def _canvas(matplotlib: ModuleType, width: float, height: float) -> tuple[Any, Any]:
    figure = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _times(shape: Sequence[int]) -> str:
    return " x ".join(str(side) for side in shape)
