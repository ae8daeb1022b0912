"""A page on this machine to try the models (extra ``demo``): `ctmasknet demo --web`."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, wraps
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any, get_args

from PIL import Image

from ctmasknet.data.scans import NIFTI_SUFFIXES, Volume, is_scan, open_volume
from ctmasknet.data.slices import Slice, read_slice
from ctmasknet.errors import ConfigError, CTMaskNetError, InputError, import_extra
from ctmasknet.evaluation.contributions import contribution_figure, roi_contributions
from ctmasknet.example import SLICE
from ctmasknet.models import Model
from ctmasknet.models.classifier import COVIDCTMaskNet
from ctmasknet.models.inference import Precision
from ctmasknet.overlay import grey
from ctmasknet.predictor import Predictor
from ctmasknet.registry import DEFAULT_CLASSIFIER, DEFAULT_SEGMENTER, DISCLAIMER, Task, get_variant
from ctmasknet.results import Prediction, VolumePrediction
from ctmasknet.weights.manifest import variants_with_weights
from ctmasknet.zoo import DEFAULT, class_names

log = logging.getLogger(__name__)

NONE = "none"
DEFAULTS = (DEFAULT_SEGMENTER, DEFAULT_CLASSIFIER)
OVERLAY, SCORE_MAP, CONTRIBUTIONS, MONTAGE = "Overlay", "Score map", "RoI contributions", "Montage"
UNITS = {"as the file says": None, "Hounsfield units": "hu", "stretch its own range": "range"}
MAX_BYTES, MAX_FILES = 500_000_000, 2000  # of one upload: a series
KEPT_UPLOADS = 10  # of the largest size; beyond, none is taken
KEPT_SECONDS = 3600  # what a visitor sent, after the last click
CSS = """
footer {display: none !important}
#status {padding: .5em .8em; border-radius: 6px; border: 1px solid var(--border-color-primary)}
#status:has(strong) {border: 2px solid #D55E00}
#picture img {max-height: 75vh; object-fit: contain}
"""
HELP = f"A picture, DICOM file, series or NIfTI scan, up to {MAX_BYTES // 1_000_000} MB. "
HELP += "A montage takes thresholds at the next Predict."
Shown = dict[Any, Any]  # by component of the page
Point = tuple[float, float]  # score and NMS threshold


@dataclass(eq=False)
class Case:
    """What a visitor looks at: a slice, or a scan; its files lie in `folder` until it is dropped."""

    name: str
    folder: Path
    content: Slice | Volume
    notes: tuple[str, ...] = ()
    predictor: Predictor | None = None  # of the last Predict
    scan: VolumePrediction | None = None
    stopped: threading.Event = field(default_factory=threading.Event)

    def slice(self, index: int) -> Slice:
        """The slice, or the one at `index` of the scan."""
        if isinstance(self.content, Slice):
            return self.content
        if index not in self.content.names:
            raise InputError(f"{self.name}: there is no slice {index}, a gap in the scan")
        return replace(self.content.read(index), source=f"{self.name}-{index}")

    def drop(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def open_case(paths: Sequence[str], work: Path, units: str | None) -> Case:
    """Read an upload: one picture, one DICOM file, the files of a series, or a NIfTI file or pair.

    Raises:
        InputError: nothing of the kind, or beyond the limits; the text names the file as the visitor knows it.
    """
    if not paths:
        raise InputError("nothing to predict: choose a file")
    name = Path(paths[0]).name if len(paths) == 1 else f"{len(paths)} files"
    if len(paths) > MAX_FILES or sum(Path(path).stat().st_size for path in paths) > MAX_BYTES:
        limit = f"{MAX_BYTES // 1_000_000} MB or {MAX_FILES} files"
        raise InputError(f"{name}: more than {limit} in one upload. Send less, or use ctmasknet predict.")
    folder = Path(tempfile.mkdtemp(dir=work))
    try:
        for number, path in enumerate(paths):
            target = folder / Path(path).name
            shutil.copyfile(path, target.with_name(f"{number}-{target.name}") if target.exists() else target)
        files = sorted(folder.iterdir())
        header = [file for file in files if file.name.lower().endswith(NIFTI_SUFFIXES)]
        first = header[0] if header else files[0] if len(files) == 1 else folder
        if first.is_dir() or is_scan(first):
            volume = open_volume(first, units=units)
            problems = tuple(_own(folder, text) for text in volume.problems)
            names = {index: _own(folder, text) for index, text in volume.names.items()}
            return Case(name, folder, replace(volume, source=name, names=names, problems=problems), problems)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            one = replace(read_slice(first, units=units), source=name)
        return Case(name, folder, one, tuple(_own(folder, str(warning.message)) for warning in caught))
    except CTMaskNetError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise type(error)(_own(folder, str(error))) from None


def _own(folder: Path, text: str) -> str:
    """A message without our folders."""
    return text.replace(f"{folder}{os.sep}", "").replace(str(folder), "the upload")


@dataclass
class _Gate:
    """Keeps out what other sites make a browser send here, and uploads beyond the limits."""

    app: Any
    work: Path

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        app = self.app
        if scope["type"] == "http" and (reason := self.refusal(scope)):
            app = import_extra("starlette.responses", "demo", "the page").PlainTextResponse(reason, 403)
        await app(scope, receive, send)

    def refusal(self, scope: Any) -> str:
        """Why a request is refused; "" if it is not."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host, site = headers.get("host", ""), headers.get("sec-fetch-site", "none")
        foreign = headers.get("origin", f"http://{host}") != f"http://{host}"
        foreign |= site in ("cross-site", "same-site") and headers.get("sec-fetch-mode") != "navigate"
        # A name other than this machine's that leads here all the same is a trick (DNS rebinding).
        if foreign or host.rsplit(":", 1)[0] not in ("127.0.0.1", "localhost"):
            return "only this page itself may ask"
        if scope["method"] == "POST":
            size = headers.get("content-length", "")
            if not size.isdecimal() or int(size) > MAX_BYTES + 1_000_000:  # what a form adds
                return f"more than {MAX_BYTES // 1_000_000} MB in one upload"
            kept = [file.stat().st_size for file in self.work.rglob("*") if file.is_file()]
            if sum(kept) > KEPT_UPLOADS * MAX_BYTES or len(kept) > KEPT_UPLOADS * MAX_FILES:
                return "too much is kept here: start the page anew, or try again in an hour"
        return ""


def _draw(view: str, prediction: Prediction, classifier: Model | None) -> Image.Image:
    """A view of a slice."""
    if view == OVERLAY:
        return prediction.plot()
    if view == SCORE_MAP and prediction.score_map is not None:
        figure = import_extra("matplotlib.figure", "demo", "the page").Figure(figsize=(6, 5), layout="constrained")
        shown = figure.subplots().imshow(prediction.score_map, cmap="magma", vmin=0)
        figure.colorbar(shown, shrink=0.8, label="mask logits, maximum over all RoIs")
    elif view == CONTRIBUTIONS and isinstance(classifier, COVIDCTMaskNet) and prediction.roi_batch is not None:
        found = roi_contributions(classifier, prediction.roi_batch)
        figure = contribution_figure(prediction.image, found, class_names(classifier))
    else:
        raise InputError(f"{view}: the model it shows was not chosen. Choose one and press Predict.")
    stream = BytesIO()
    figure.savefig(stream, format="png", dpi=160)
    return Image.open(stream)


def _words(name: str, summary: str, notes: Sequence[str]) -> str:
    return f"<h3>{escape(name)}: {escape(summary)}</h3>" + "".join(f"<p>{escape(note)}</p>" for note in notes)


def _table(rows: Sequence[Sequence[str]]) -> str:
    cells = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def _build(
    predictor_of: Callable[[str, str], tuple[Predictor, Point]],
    offered: Sequence[list[str]],
    given: Sequence[float | None],
    work: Path,
) -> Any:
    """The page as `gradio.Blocks`; the first of the models `offered` are chosen, thresholds as `given` or their own."""
    gr = import_extra("gradio", "demo", "the page")

    def guarded(handle: Callable[..., Shown]) -> Callable[..., Shown]:
        """Never a traceback on the page: one line of ours, or one that points to the log."""

        @wraps(handle)
        def safe(*arguments: Any) -> Shown:
            try:
                return handle(*arguments)
            except CTMaskNetError as error:
                reason = str(error)
            except Exception:
                log.exception("%s", handle.__name__)
                reason = "Something went wrong; the log of the program says what."
            return {status: f"<strong>{escape(reason)}</strong>"}

        return safe

    @guarded
    def on_open(paths: list[str] | None, unit: str, before: Case | None) -> Shown:
        case = open_case(paths or [], work, UNITS[unit])
        if before is not None:
            before.drop()
        scan = isinstance(case.content, Volume)
        indices = sorted(case.content.names) if isinstance(case.content, Volume) else [0]
        middle, what = indices[len(indices) // 2], f"a scan of {len(indices)} slices" if scan else "one slice"
        return {
            state: case,
            status: escape(" ".join([f"{case.name}: {what}. Press Predict.", *case.notes[:5]])),
            view: gr.update(choices=[MONTAGE] * scan + [OVERLAY, SCORE_MAP, CONTRIBUTIONS], value=OVERLAY),
            at: gr.update(minimum=indices[0], maximum=max(indices[-1], 1), value=middle, visible=scan),
            picture: grey(case.slice(middle).pixels),
            facts: "",
            files: gr.update(visible=False),
        }

    def shown(case: Case, predictor: Predictor, what: str, index: int, *point: float) -> Shown:
        """Picture and facts; of a single slice also files."""
        predictor.score_threshold, predictor.nms_threshold = point
        if case.scan is not None and what == MONTAGE:
            words = _words(case.name, case.scan.summary, (*case.scan.problems, *case.scan.caveats))
            tables = case.scan.involvement_rows(), case.scan.lesion_rows()
            return {picture: case.scan.plot(), facts: words + "".join(map(_table, tables))}
        predictor.score_map = what == SCORE_MAP
        prediction = predictor(case.slice(index))
        words = _words(prediction.source, prediction.summary, [prediction.class_line, *prediction.caveats])
        rows = [["lesion", "score", "area, px", "box x1 y1 x2 y2, px"]] if len(prediction.scores) else []
        for found in prediction.to_dict()["lesions"]:
            box = " ".join(f"{value:.0f}" for value in found["box"])
            rows.append([found["class"], f"{found['score']:.3f}", str(found["area_px"]), box])
        drawn = {picture: _draw(what, prediction, predictor.classifier), facts: words + _table(rows)}
        if case.scan is None:
            written = prediction.save(case.folder / "results")
            drawn[files] = gr.update(value=[str(path) for path in written], visible=True)
        return drawn

    @guarded
    def on_predict(case: Case | None, seg: str, cls: str, *settings: Any, progress: Any = gr.Progress()) -> Shown:  # noqa: B008
        what, index, *point = settings
        if case is None:
            raise InputError("nothing is here any more: choose a file")
        case.predictor, case.scan = None, None
        case.stopped.clear()
        predictor, _ = predictor_of(seg, cls)

        def count(done: int, total: int) -> None:
            progress((done, total), unit="slices")
            if case.stopped.is_set():
                raise InputError(f"{case.name}: stopped after {done} of {total} slices")

        result: Shown = {status: f"{escape(case.name)}: predicted."}
        if isinstance(case.content, Volume):
            predictor.score_threshold, predictor.nms_threshold = point
            predictor.score_map = False
            case.scan, what = predictor.volume(case.content, progress=count), MONTAGE
            written = case.scan.save(case.folder / "results", case.name)
            result |= {view: MONTAGE, files: gr.update(value=[str(path) for path in written], visible=True)}
        result |= shown(case, predictor, what, index, *point)
        case.predictor = predictor
        return result

    @guarded
    def on_show(case: Case | None, *settings: Any) -> Shown:
        if case is None:
            return {}
        if case.predictor is None:
            return {picture: grey(case.slice(settings[1]).pixels)}
        return shown(case, case.predictor, *settings)

    @guarded
    def on_slide(case: Case | None, what: str, *settings: Any) -> Shown:
        """A slice of the scan instead of its montage."""
        what = OVERLAY if what == MONTAGE else what
        return {**on_show(case, what, *settings), view: what}

    @guarded
    def on_models(case: Case | None, seg: str, cls: str) -> Shown:
        _, (score, overlap) = predictor_of(seg, cls)
        if case is not None:
            case.predictor = None  # what is shown stays what was predicted
        return {status: f"{escape(seg)} and {escape(cls)}: press Predict.", cut: score, nms: overlap}

    _, own = predictor_of(offered[0][0], offered[1][0])
    score, overlap = (mine if value is None else value for value, mine in zip(given, own, strict=True))
    with gr.Blocks(title="ctmasknet", analytics_enabled=False, delete_cache=(60, KEPT_SECONDS)) as page:
        state = gr.State(None, time_to_live=KEPT_SECONDS, delete_callback=lambda case: case and case.drop())
        gr.Markdown(f"## ctmasknet: lesions in chest CT slices\n**{DISCLAIMER}**")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                many: dict[str, Any] = {"file_count": "multiple", "height": 150, "elem_id": "upload"}
                upload = gr.File([str(SLICE)], label="Slice or scan", **many)
                with gr.Row():
                    go = gr.Button("Predict", variant="primary", elem_id="predict", min_width=100)
                    stop = gr.Button("Stop", elem_id="stop", min_width=60)
                with gr.Accordion("Models and thresholds", open=False):
                    seg = gr.Dropdown([*offered[0]], value=offered[0][0], label="Segmenter")
                    cls = gr.Dropdown([*offered[1]], value=offered[1][0], label="Classifier")
                    cut = gr.Slider(0, 1, score, step=0.01, label="Score threshold", elem_id="threshold")
                    nms = gr.Slider(0, 1, overlap, step=0.01, label="NMS threshold")
                    units = gr.Dropdown([*UNITS], value=next(iter(UNITS)), label="Values of the files")
                gr.Markdown(HELP)
            with gr.Column(scale=3, min_width=320):
                status = gr.HTML(elem_id="status")
                view = gr.Radio([OVERLAY, SCORE_MAP, CONTRIBUTIONS], value=OVERLAY, show_label=False, elem_id="view")
                at = gr.Slider(0, 1, 0, step=1, label="Slice", visible=False, elem_id="slice")
                buttons = ["download", "fullscreen"]
                picture = gr.Image(format="png", show_label=False, buttons=buttons, elem_id="picture")
                facts = gr.HTML(elem_id="facts")
                label = "Results, as ctmasknet predict writes them"
                files = gr.File(label=label, visible=False, interactive=False, elem_id="files")
        everything, settings = [state, status, view, at, picture, facts, files, cut, nms], [view, at, cut, nms]
        # One at a time: the thresholds of a predictor, and warnings, belong to the whole process.
        common: dict[str, Any] = {"api_visibility": "private", "concurrency_id": "models", "concurrency_limit": 1}
        go.click(on_predict, [state, seg, cls, *settings], everything, show_progress_on=status, **common)
        common |= {"show_progress": "minimal"}
        gr.on([page.load, upload.change, units.input], on_open, [upload, units, state], everything, **common)
        gr.on([seg.input, cls.input], on_models, [state, seg, cls], everything, **common)
        moved = [view.input, cut.change, nms.change]  # `input` misses the number beside a slider
        for triggers, handle in ((moved, on_show), ([at.change], on_slide)):
            gr.on(triggers, handle, [state, *settings], everything, trigger_mode="always_last", **common)
        stop.click(lambda case: case and case.stopped.set(), state, None, api_visibility="private", queue=False)
    return page


@contextlib.contextmanager
def _cleaner(folder: str) -> Iterator[None]:
    """Deletes `folder` even if this process is killed: another waits for the end of this one."""
    code = "import shutil, sys; sys.stdin.read(); shutil.rmtree(sys.argv[1], ignore_errors=True)"
    command = [sys.executable, "-S", "-c", code, folder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True):
        yield


def serve(
    *,
    segmenter: str = DEFAULT,
    classifier: str = DEFAULT,
    score_threshold: float | None = None,
    nms_threshold: float | None = None,
    device: str | None = None,
    precision: Precision = "float32",
    port: int | None = None,
    on_start: Callable[[str], None] = print,
    stop: threading.Event | None = None,
) -> None:
    """Serve the page on 127.0.0.1 until `stop` is set, or Ctrl-C.

    Args:
        segmenter, classifier: chosen at first: whatever names weights for `Predictor`, or ``"none"``.
        score_threshold, nms_threshold: at first; None takes the weights' own.
        device, precision: as for `Predictor`.
        port: where to listen; without one the first free one from 7860 on.
        on_start: called with the page's address.
        stop: ends the call.

    Raises:
        ConfigError: an impossible option, or the port is taken.
        WeightsError: the weights chosen are missing or damaged.
        MissingExtraError: gradio or matplotlib is not installed.
    """
    import_extra("matplotlib", "demo", "the page")
    gr = import_extra("gradio", "demo", "the page")

    offered = []
    for task, given, default in zip(get_args(Task), (segmenter, classifier), DEFAULTS, strict=True):
        known = [name for name in variants_with_weights() if get_variant(name).task == task]
        offered.append(list(dict.fromkeys([default if given == DEFAULT else given, *known, NONE])))

    @cache
    def predictor_of(seg: str, cls: str) -> tuple[Predictor, Point]:
        made = Predictor(*(None if n == NONE else n for n in (seg, cls)), device=device, precision=precision)
        return made, (made.score_threshold or 0.5, made.nms_threshold or 0.5)

    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # nothing from other hosts
    options: dict[str, Any] = {"share": False, "ssr_mode": False, "run_history": False, "theme": theme, "css": CSS}
    with tempfile.TemporaryDirectory(prefix="ctmasknet-page-", ignore_cleanup_errors=True) as made, _cleaner(made):
        os.environ["GRADIO_TEMP_DIR"] = made  # where gradio puts uploads; it has no argument for it
        page = _build(predictor_of, offered, (score_threshold, nms_threshold), Path(made))
        gate = import_extra("starlette.middleware", "demo", "the page").Middleware(_Gate, Path(made))
        options |= {"app_kwargs": {"middleware": [gate]}, "max_file_size": MAX_BYTES}
        options |= {"quiet": True, "prevent_thread_lock": True}
        try:
            _, address, _ = page.launch(server_name="127.0.0.1", server_port=port, **options)
            on_start(address)
            (stop or threading.Event()).wait()
        except OSError as error:
            raise ConfigError(f"cannot listen on port {port or 7860} ({error}): choose another --port") from None
        finally:
            page.close(verbose=False)
            del os.environ["GRADIO_TEMP_DIR"]
