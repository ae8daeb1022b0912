"""Pictures: a slice with lesions drawn on it and text below, and a montage of a scan. Pillow only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from ctmasknet.errors import ConfigError
from ctmasknet.registry import DISCLAIMER

Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Bools = npt.NDArray[np.bool_]
Rect = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels of the picture, half-open

CLASS_COLOURS: dict[str, Colour] = {
    "lesion": (230, 159, 0),  # orange
    "GGO": (86, 180, 233),  # sky blue
    "consolidation": (213, 94, 0),  # vermillion
}
"""Colours by lesion class out of Okabe and Ito's palette, which colour-blind people tell apart."""

_OTHER_COLOURS: tuple[Colour, ...] = ((0, 158, 115), (240, 228, 66), (204, 121, 167), (0, 114, 178))
_FILL, _BOX, _BACKING = 71, 191, 184  # opacity of 255; ground glass stays visible under the fill
_SMALLEST_SIDE = 768  # a picture's longer side is enlarged to at least this
_TILE, _CAPTION, _COLUMNS = 288, 20, 4  # of a montage: side of a tile and height of its caption, tiles in a row
_WHOLE = _COLUMNS * _TILE
_PAGE, _INK, _FAINT_INK = (1240, 1754), (0, 0, 0), (90, 90, 90)  # of a report: A4 at 150 dpi
_STRIP = (18, 18, 20)
_TEXT = (240, 240, 240)
_FAINT_TEXT = (160, 160, 165)

Tile = tuple[str, npt.NDArray[np.uint8], npt.NDArray[np.uint8]]
"""Of a montage: caption, slice (H, W) in grey, label of the lesion at each pixel (H, W), 0 for none."""


class Lesion(NamedTuple):
    """A lesion to draw: its mask (H, W) bool, its box xyxy in pixels of the slice, what to write beside it."""

    mask: Bools
    box: npt.NDArray[np.float32]
    text: str
    colour: Colour


class _Style:
    """Sizes in pixels of the picture that follow from the size of the slice on it."""

    def __init__(self, width: int, height: int) -> None:
        # The geometric mean: text fits long narrow pictures too, and grows with large ones.
        side = (width * height) ** 0.5
        body = max(17, round(side / 46))
        small = max(12, round(0.65 * body))
        self.body, self.small, self.label = map(ImageFont.load_default, (body, small, max(13, round(0.75 * body))))
        self.row, self.fine_row = round(1.3 * body), round(1.35 * small)  # distance between lines of text
        self.pad = max(8, body // 2)
        self.line = max(1, round(side / 640))  # width of contours
        self.margin = max(3, self.pad // 3)  # round the text of a label
        _, top, _, bottom = self.label.getbbox("Hg0")
        self.label_height = int(bottom) - int(top) + 2 * self.margin


def grey(image: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """0..1 -> 0..255."""
    return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)


def class_colour(class_names: Sequence[str], label: int) -> Colour:
    """The colour of a lesion class, index = label, background first."""
    return CLASS_COLOURS.get(class_names[label], _OTHER_COLOURS[(label - 1) % len(_OTHER_COLOURS)])


def overlay(
    image: npt.NDArray[np.float32],
    lesions: Sequence[Lesion],
    *,
    headlines: Sequence[str],
    notes: Sequence[str],
    scale: int | None = None,
) -> Image.Image:
    """Draw lesions on a slice, and below it text and notes.

    Masks are translucent with a crisp contour, boxes are outlined, texts stand on a dark backing beside their box,
    placed in the order of the lesions where they cover neither each other nor, if possible, a lesion; those left
    without room are counted below.

    Args:
        image: (H, W) in 0..1.
        lesions: the most important first.
        headlines: what there is to say, a line or more each.
        notes: small print, to which the disclaimer is added.
        scale: pixels of the picture per pixel of the slice, >= 1. Default: the smallest that makes the longer
            side at least 768, so that text is legible; larger slices keep their size.

    Returns:
        RGB, H * scale plus the text high, and W * scale wide (wider only if the text needs it; the slice is
        then centred).

    Raises:
        ConfigError: `scale` is not a whole number >= 1.
    """
    height, width = image.shape
    if scale is None:
        scale = -(-_SMALLEST_SIDE // max(height, width))
    if not isinstance(scale, int) or scale < 1:
        raise ConfigError(f"scale={scale!r}: must be a whole number of at least 1, or None")
    size = (width * scale, height * scale)
    picture = Image.fromarray(grey(image)).resize(size, Image.Resampling.BICUBIC).convert("RGB")
    style = _Style(*size)
    boxes = [_scaled(lesion.box, size, scale) for lesion in lesions]
    for colour in dict.fromkeys(lesion.colour for lesion in lesions):
        _paint(picture, [lesion.mask for lesion in lesions if lesion.colour == colour], colour, scale, style.line)
    draw = ImageDraw.Draw(picture, "RGBA")
    for lesion, (x1, y1, x2, y2) in zip(lesions, boxes, strict=True):
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), outline=(*lesion.colour, _BOX), width=(style.line + 1) // 2)
    placed = _place_labels(lesions, boxes, size, scale, style)
    for (x1, y1, x2, y2), lesion in placed:
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), fill=(0, 0, 0, _BACKING))
        draw.rectangle((x1, y1, x1 + style.margin // 2, y2 - 1), fill=lesion.colour)
        place = x1 + 2 * style.margin, (y1 + y2) // 2
        draw.text(place, lesion.text, fill=(255, 255, 255), font=style.label, anchor="lm")
    if len(placed) < len(lesions):
        notes = (f"{len(lesions) - len(placed)} of {len(lesions)} scores not shown for lack of room.", *notes)
    return _with_text(picture, style, headlines, notes)


def montage(tiles: Sequence[Tile], class_names: Sequence[str], headline: str, notes: Sequence[str] = ()) -> Image.Image:
    """Slices of a scan side by side, each over its caption, with a line of text and notes below."""
    return _with_text(_mosaic(tiles, class_names), _Style(_WHOLE, _WHOLE), [headline], notes)


def report(
    title: str,
    headline: str,
    tiles: Sequence[Tile],
    class_names: Sequence[str],
    tables: Sequence[Sequence[Sequence[str]]],
    notes: Sequence[str] = (),
) -> Image.Image:
    """A page, A4 upright at 150 dpi: title, a line of text, up to 12 slices, tables, notes and the disclaimer.

    A table is rows of cells, the head first. Notes without room are counted.
    """
    page = Image.new("RGB", _PAGE, (255, 255, 255))
    draw = ImageDraw.Draw(page)
    large, body, small = (ImageFont.load_default(size=size) for size in (34, 20, 17))
    left, bottom, inner = 60, _PAGE[1] - 60, _PAGE[0] - 120
    y = _write(draw, left, 45, _wrap(title, large, inner), large, 46, _INK)
    y = _write(draw, left, y, _wrap(headline, body, inner), body, 28, _INK)
    shown = ImageOps.contain(_mosaic(tiles, class_names), (inner, 850))
    page.paste(shown, (left, y + 14))
    y += shown.height + 36
    for head, *rows in tables:
        widths = [max(map(body.getlength, cells)) for cells in zip(head, *rows, strict=True)]
        gap = min(40, (inner - sum(widths)) / len(widths))
        for row in (head, *rows):
            x = float(left)
            for cell, width in zip(row, widths, strict=True):
                draw.text((x, y), cell, fill=_FAINT_INK if row is head else _INK, font=body)
                x += width + gap
            y += 27
        y += 18
    lines = [line for note in notes for line in _wrap(note, small, inner)]
    room = (bottom - y) // 22 - 1
    if len(lines) > room:
        lines[room - 1 :] = [f"and {len(lines) - room + 1} more lines of notes"]
    _write(draw, left, y, [*lines, *_wrap(DISCLAIMER, small, inner)], small, 22, _FAINT_INK)
    return page


def _mosaic(tiles: Sequence[Tile], class_names: Sequence[str]) -> Image.Image:
    columns = min(_COLUMNS, max(len(tiles), 1))
    cell = _TILE + _CAPTION
    picture = Image.new("RGB", (columns * _TILE, -(-len(tiles) // columns) * cell), _STRIP)
    font = _Style(_WHOLE, _WHOLE).small
    draw = ImageDraw.Draw(picture)
    for place, (caption, image, labels) in enumerate(tiles):
        x, y = place % columns * _TILE, place // columns * cell
        shown = Image.fromarray(image).convert("RGB")
        for label in np.unique(labels[labels > 0]).tolist():
            contour = max(1, round(max(shown.size) / _TILE))  # it must survive the reduction
            _paint(shown, [labels == label], class_colour(class_names, label), 1, contour)
        shown = ImageOps.pad(shown, (_TILE, _TILE), color=_STRIP)
        picture.paste(shown, (x, y))
        draw.text((x + 4, y + _TILE + _CAPTION // 2), caption, fill=_TEXT, font=font, anchor="lm")
    return picture


def _paint(picture: Image.Image, masks: Sequence[Bools], colour: Colour, scale: int, line: int) -> None:
    """Draw masks (H, W) of one colour, translucent with a crisp contour, on a picture of H * scale by W * scale."""
    # One layer of each for all masks: where they overlap the slice must not disappear.
    fill = np.zeros((picture.height, picture.width), np.uint8)
    contour = np.zeros_like(fill)
    for mask in masks:
        bounds = Image.fromarray(mask.astype(np.uint8)).getbbox()
        if bounds is None:
            continue
        left, top = max(bounds[0] - 2, 0), max(bounds[1] - 2, 0)  # two pixels round it: the reach of the enlargement
        shape, edge = _enlarge(mask[top : bounds[3] + 2, left : bounds[2] + 2], scale, line)
        height, width = shape.shape
        at = slice(top * scale, top * scale + height), slice(left * scale, left * scale + width)
        fill[at][shape] = _FILL
        contour[at][edge] = 255
    picture.paste(colour, mask=Image.fromarray(fill))
    picture.paste(colour, mask=Image.fromarray(contour))


def _enlarge(mask: Bools, scale: int, line: int) -> tuple[Bools, Bools]:
    """(h, w) bool -> two (h * scale, w * scale) bool: the shape and its inner contour; none along the border."""
    size = mask.shape[1] * scale, mask.shape[0] * scale
    soft = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
    shape = np.asarray(soft) >= 128
    inside = np.asarray(soft.filter(ImageFilter.MinFilter(2 * line + 1))) >= 128
    return shape, shape & ~inside


def _scaled(box: npt.NDArray[np.float32], size: tuple[int, int], scale: int) -> Rect:
    width, height = size
    x1, y1, x2, y2 = (round(float(value) * scale) for value in box)
    x1, y1 = min(max(x1, 0), width - 1), min(max(y1, 0), height - 1)
    return x1, y1, max(min(x2, width), x1 + 1), max(min(y2, height), y1 + 1)


def _place_labels(
    lesions: Sequence[Lesion], boxes: Sequence[Rect], size: tuple[int, int], scale: int, style: _Style
) -> list[tuple[Rect, Lesion]]:
    """Where texts find room; none of them overlaps another or leaves the slice."""
    width, height = size
    h = style.label_height
    marked = np.any([lesion.mask for lesion in lesions], axis=0)
    taken = np.zeros((height, width), bool)
    placed: list[tuple[Rect, Lesion]] = []
    for lesion, box in zip(lesions, boxes, strict=True):
        w = round(style.label.getlength(lesion.text)) + 3 * style.margin
        if w > width or h > height:
            continue
        free: list[tuple[float, Rect]] = []
        for rank, (x, y) in enumerate(_positions(box, w, h, style.line)):
            x, y = min(max(x, 0), width - w), min(max(y, 0), height - h)
            if not taken[y : y + h, x : x + w].any():
                hidden = marked[y // scale : -(-(y + h) // scale), x // scale : -(-(x + w) // scale)].mean()
                free.append((hidden + 0.04 * rank, (x, y, x + w, y + h)))
        if free:
            x1, y1, x2, y2 = min(free)[1]
            taken[y1:y2, x1:x2] = True
            placed.append(((x1, y1, x2, y2), lesion))
    return placed


def _positions(box: Rect, w: int, h: int, gap: int) -> Iterator[tuple[int, int]]:
    """Upper left corners for a w x h label of a box: above and below it, beside it, further off, inside."""
    (x1, y1, x2, y2), step = box, h + gap
    for away in range(0, 3 * step, step):
        yield from ((x, y) for y in (y1 - step - away, y2 + gap + away) for x in (x1, x2 - w))
        yield from ((x, y) for x in (x2 + gap, x1 - gap - w) for y in (y1 + away, y2 - h - away))
    yield from ((x1 + gap, y) for y in range(y1 + gap, y2 - h, step))


def _with_text(picture: Image.Image, style: _Style, headlines: Sequence[str], notes: Sequence[str]) -> Image.Image:
    """The picture with its text and the disclaimer below, see `overlay`."""
    width = max(picture.width, 52 * style.pad)
    inner = width - 2 * style.pad
    lines = [line for text in headlines for line in _wrap(text, style.body, inner)]
    small = [line for note in (*notes, DISCLAIMER) for line in _wrap(note, style.small, inner)]
    height = len(lines) * style.row + len(small) * style.fine_row + 3 * style.pad
    canvas = Image.new("RGB", (width, picture.height + height), _STRIP)
    canvas.paste(picture, ((width - picture.width) // 2, 0))
    draw = ImageDraw.Draw(canvas)
    y = _write(draw, style.pad, picture.height + style.pad, lines, style.body, style.row, _TEXT)
    _write(draw, style.pad, y + style.pad, small, style.small, style.fine_row, _FAINT_TEXT)
    return canvas


def _write(draw: ImageDraw.ImageDraw, x: int, y: int, lines: Sequence[str], font: Font, row: int, fill: Colour) -> int:
    """Lines of text, each in the middle of a row of pixels; where the next row begins."""
    for line in lines:
        draw.text((x, y + row // 2), line, fill=fill, font=font, anchor="lm")
        y += row
    return y


def _wrap(text: str, font: Font, width: float) -> list[str]:
    """Break at spaces so that no line is wider than `width`; a single word that is gets cut short."""
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        while len(word) > 1 and font.getlength(word) > width:
            word = word[:-2] + "…"
        lines.append(word)
    return lines or [""]
