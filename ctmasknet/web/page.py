"""The page itself, in gradio: controls on the left, what the models say on the right."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

from ctmasknet.data.slices import read_slice
from ctmasknet.errors import CTMaskNetError, InputError, import_extra
from ctmasknet.example import example_slice
from ctmasknet.registry import DISCLAIMER
from ctmasknet.web import pictures
from ctmasknet.web.case import LOWEST_THRESHOLD, NONE, Case, Cases, Models, Result, predict_case
from ctmasknet.web.uploads import Limits, read_upload

log = logging.getLogger(__name__)

OVERLAY, SCORE_MAP, CONTRIBUTIONS, MONTAGE = "Overlay", "Score map", "RoI contributions", "Montage"
UNITS = {"as the file says": None, "Hounsfield units": "hu", "stretch its own range": "range"}
SESSION_SECONDS = 3600

CSS = """
.message {padding: .6em .8em; border-radius: 6px; border: 1px solid var(--border-color-primary)}
.message.bad {border: 2px solid #D55E00; font-weight: 600}
#picture img {max-width: 100%; max-height: 70vh; display: block}
#facts table {border-collapse: collapse; margin: .6em 0} #facts caption {text-align: left; font-weight: 600}
#facts td, #facts th, #facts tr {padding: .15em .8em .15em 0; text-align: left; border: none}
#facts td.bar {width: 14em} #facts td.bar div {height: .7em; background: #7A7A7A}
#facts .note {opacity: .75; margin: .2em 0; font-size: .9em}
#facts a.download {display: inline-block; margin: .6em .6em 0 0; padding: .35em .8em; border-radius: 6px;
  border: 1px solid var(--border-color-primary); text-decoration: none}
footer {display: none !important}
"""


def build(
    models: Models,
    uploads: Path,
    limits: Limits,
    *,
    segmenter: str,
    classifier: str,
    threshold: float | None = None,
    cases: Cases | None = None,
) -> Any:
    """The page as `gradio.Blocks`.

    Args:
        models: what is on offer.
        uploads: the folder uploads arrive in (gradio's GRADIO_TEMP_DIR).
        limits: how much an upload may hold.
        segmenter, classifier, threshold: what the controls show at first.
        cases: where visitors' cases are kept.
    """
    gr = import_extra("gradio", "demo", "the page")
    kept = Cases() if cases is None else cases

    def guarded(handle: Callable[..., Any]) -> Callable[..., Any]:
        """Never a traceback on the page: one line of ours, or a line that points to the log."""

        @wraps(handle)
        def safe(*arguments: Any) -> Any:
            try:
                return handle(*arguments)
            except CTMaskNetError as error:
                return pictures.message(str(error), bad=True), gr.skip()
            except Exception:
                log.exception("%s", handle.__name__)
                return pictures.message("Something went wrong; the log of the server says what.", bad=True), gr.skip()

        return safe

    def accepted(case: Case, token: str | None) -> tuple[Any, ...]:
        kept.drop(token)
        indices = sorted(case.slices)
        middle = indices[len(indices) // 2]
        scan = case.volume is not None
        words = [f"{case.name}: {len(indices)} slice{'' if len(indices) == 1 else 's'} read. Press Predict."]
        words += list(case.notes[:5]) + [f"{len(case.failed)} slices could not be read."] * bool(case.failed)
        views = [MONTAGE] * scan + [OVERLAY, SCORE_MAP, CONTRIBUTIONS]
        return (
            kept.add(case),
            pictures.message(" ".join(words)),
            None,
            gr.update(choices=views, value=views[0]),
            gr.update(minimum=indices[0], maximum=max(indices[-1], indices[0] + 1), value=middle, visible=scan),
            pictures.plain(case.slice(middle).pixels, f"{case.name}, not yet predicted"),
            "",
        )

    def refused(error: Exception) -> tuple[Any, ...]:
        text = str(error)
        if not isinstance(error, CTMaskNetError):
            log.error("reading an upload failed", exc_info=error)
            text = "The file could not be read; the log of the server says why."
        return gr.skip(), pictures.message(text, bad=True), None, gr.skip(), gr.skip(), gr.skip(), gr.skip()

    def on_upload(files: list[dict[str, Any]] | None, units: str, token: str | None) -> tuple[Any, ...]:
        try:
            paths = [str(file["path"]) for file in files or []]
            if not paths:
                raise InputError("no file arrived: upload it again")
            return accepted(read_upload(paths, uploads, limits, units=UNITS[units]), token)
        except Exception as error:
            return refused(error)

    def on_example(token: str | None) -> tuple[Any, ...]:
        try:
            made = example_slice()
            note = f"It has {len(made.masks)} lesions drawn in."
            return accepted(Case.of_slice(read_slice(made.image), "example", (note,)), token)
        except Exception as error:
            return refused(error)

    def shown(result: Result, view: str, index: int, cut: float) -> tuple[str, str]:
        models_used = f"Models: {result.segmenter}, {result.classifier}; NMS {result.predictor.nms_threshold:g}."
        scan = result.scan(cut)
        if view == MONTAGE and scan is not None:
            return pictures.picture(scan.plot(), scan.summary), pictures.scan_facts(scan, models_used)
        prediction = result.prediction(index, cut)
        words = pictures.facts(prediction, models_used)
        if scan is not None:
            words += pictures.scan_facts(scan, "")
        if view == SCORE_MAP:
            logits = result.score_map(index)
            drawn = (
                pictures.message("no segmenter was chosen")
                if logits is None
                else pictures.score_map(prediction, logits)
            )
        elif view == CONTRIBUTIONS:
            found = result.contributions(index)
            drawn = (
                pictures.message("no classifier was chosen")
                if found is None
                else pictures.contributions(prediction, *found)
            )
        else:
            drawn = pictures.picture(prediction.plot(), prediction.summary)
        return drawn, words

    @guarded
    def on_show(token: str | None, view: str, index: float, cut: float) -> tuple[Any, Any]:
        if token is None:
            return gr.skip(), gr.skip()
        case = kept.get(token)
        if case.result is None:
            return pictures.plain(case.slice(int(index) if case.volume else 0).pixels, case.name), ""
        return shown(case.result, view, int(index) if case.volume else 0, float(cut))

    def on_predict(token: str | None, seg: str, cls: str, nms: float) -> Iterator[str]:
        try:
            case = kept.get(token)
            for done, total in predict_case(case, models, seg, cls, nms):
                yield pictures.message(f"Predicting {case.name}: {done} of {total}")
            yield pictures.message(f"{case.name}: predicted.")
        except CTMaskNetError as error:
            yield pictures.message(str(error), bad=True)
        except Exception:
            log.exception("predicting")
            yield pictures.message("Something went wrong; the log of the server says what.", bad=True)

    def on_segmenter(name: str) -> tuple[Any, Any]:
        try:
            point = models.operating_point(name)
        except CTMaskNetError as error:
            raise gr.Error(str(error), print_exception=False) from None
        if point is None:
            return gr.skip(), gr.skip()
        return max(point[0], LOWEST_THRESHOLD), point[1]

    point = models.operating_point(segmenter) or (0.5, 0.5)
    with gr.Blocks(title="ctmasknet", analytics_enabled=False) as page:
        gr.Markdown(f"## ctmasknet: lesions in chest CT slices\n{DISCLAIMER}")
        token = gr.State(None, time_to_live=SESSION_SECONDS, delete_callback=kept.drop)
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                file = gr.File(
                    label=f"Slice, DICOM series or scan, at most {limits.upload_mb} MB",
                    file_count="multiple",
                    height=170,
                )
                units = gr.Dropdown(list(UNITS), value=next(iter(UNITS)), label="Values (set before uploading)")
                take = gr.Button("Take the example", elem_id="example")
                seg = gr.Dropdown([*models.names["segmentation"], NONE], value=segmenter, label="Segmenter")
                cls = gr.Dropdown([*models.names["classification"], NONE], value=classifier, label="Classifier")
                nms = gr.Slider(0, 1, point[1], step=0.01, label="NMS threshold, at Predict")
                with gr.Row():
                    go = gr.Button("Predict", variant="primary", elem_id="predict")
                    stop = gr.Button("Stop", elem_id="stop")
            with gr.Column(scale=3, min_width=480):
                status = gr.HTML(pictures.message("Upload a file, or take the example."), elem_id="status")
                start = max(point[0], LOWEST_THRESHOLD) if threshold is None else threshold
                cut = gr.Slider(LOWEST_THRESHOLD, 1, start, step=0.01, label="Score threshold", elem_id="threshold")
                view = gr.Radio([OVERLAY, SCORE_MAP, CONTRIBUTIONS], value=OVERLAY, show_label=False, elem_id="view")
                index = gr.Slider(0, 1, 0, step=1, label="Slice", visible=False, elem_id="slice")
                image = gr.HTML(elem_id="picture")
                words = gr.HTML(elem_id="facts")

        quiet = {"api_visibility": "private", "show_progress": "minimal"}
        loaded = [token, status, file, view, index, image, words]
        file.upload(on_upload, [file, units, token], loaded, preprocess=False, **quiet)
        take.click(on_example, [token], loaded, **quiet)
        seg.input(on_segmenter, seg, [cut, nms], **quiet)
        view_of, drawn = [token, view, index, cut], [image, words]
        running = go.click(on_predict, [token, seg, cls, nms], status, **quiet)
        running.then(on_show, view_of, drawn, **quiet)
        stop.click(lambda: pictures.message("Stopped."), None, status, cancels=[running], **quiet)
        # Not `input`, which the number beside a slider does not send.
        for control in (view, index, cut):
            control.change(on_show, view_of, drawn, trigger_mode="always_last", **quiet)
        page.queue(max_size=64, default_concurrency_limit=4)

    async def only_uploads(path: Any) -> Any:
        """In place of gradio's, which fetches any address that a request names."""
        if path is not None and "://" in str(path):
            raise gr.Error("addresses are not fetched here", print_exception=False)
        return path if path is None else str(path)

    for block in page.blocks.values():
        block.async_move_resource_to_block_cache = only_uploads
    return page
