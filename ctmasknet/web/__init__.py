"""A local page to try the models (extra ``demo``): `ctmasknet demo --web`."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ctmasknet.errors import ConfigError, import_extra
from ctmasknet.predictor import Precision
from ctmasknet.registry import DEFAULT_CLASSIFIER, DEFAULT_SEGMENTER, get_variant
from ctmasknet.web.case import LOWEST_THRESHOLD, NONE, Models
from ctmasknet.web.gate import Gate
from ctmasknet.web.page import CSS, build
from ctmasknet.web.uploads import Limits, empty, sweep
from ctmasknet.weights.manifest import variants_with_weights
from ctmasknet.zoo import DEFAULT

__all__ = ["serve"]

_ABANDONED = 600  # s; an upload that nobody read
_LOOK_EVERY = 60  # s


def serve(
    *,
    segmenter: str = DEFAULT,
    classifier: str = DEFAULT,
    threshold: float | None = None,
    device: str | None = None,
    precision: Precision = "auto",
    host: str = "127.0.0.1",
    port: int | None = None,
    max_upload_mb: int = 200,
    on_start: Callable[[str], None] | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Serve the page until `stop` is set, or Ctrl-C.

    Args:
        segmenter, classifier: chosen at first: a variant, a folder or Hub repository of weights, or ``"none"``.
        threshold: of the score, at first; None takes the weights' own.
        device, precision: as for `Predictor`.
        host, port: where to listen; without a port the first free one from 7860 on.
        max_upload_mb: the most that one upload may hold, all files together.
        on_start: called with the page's address.
        stop: ends the call.

    Raises:
        ConfigError: an impossible option, or the port is taken.
        WeightsError: the weights chosen are missing or damaged.
        MissingExtraError: gradio or matplotlib is not installed.
    """
    if max_upload_mb < 1:
        raise ConfigError(f"--max-upload-mb {max_upload_mb}: must be at least 1")
    if threshold is not None and not LOWEST_THRESHOLD <= threshold <= 1:
        raise ConfigError(f"--threshold {threshold}: the page takes {LOWEST_THRESHOLD} to 1")
    work = Path(tempfile.mkdtemp(prefix="ctmasknet-web-")).resolve()
    uploads = work / "uploads"
    uploads.mkdir()
    page = None
    try:
        with _environment(uploads, host):
            gradio = import_extra("gradio", "demo", "the page")
            import_extra("matplotlib", "demo", "the page")
            middleware = import_extra("starlette.middleware", "demo", "the page").Middleware
            names = variants_with_weights()
            first = DEFAULT_SEGMENTER if segmenter == DEFAULT else segmenter
            second = DEFAULT_CLASSIFIER if classifier == DEFAULT else classifier
            segmenters = [name for name in names if get_variant(name).task == "segmentation"]
            classifiers = [name for name in names if get_variant(name).task == "classification"]
            models = Models(
                tuple(dict.fromkeys([*segmenters, first] if first != NONE else segmenters)),
                tuple(dict.fromkeys([*classifiers, second] if second != NONE else classifiers)),
                device=device,
                precision=precision,
            )
            models.load("classification", second)
            limits = Limits(max_upload_mb)
            page = build(
                models,
                uploads,
                limits,
                segmenter=first,
                classifier=second,
                threshold=threshold,
            )
            try:
                _, address, _ = page.launch(
                    server_name=host,
                    server_port=port,
                    share=False,
                    quiet=True,
                    prevent_thread_lock=True,
                    inbrowser=False,
                    show_error=False,
                    max_file_size=limits.upload_bytes,
                    enable_monitoring=False,
                    ssr_mode=False,
                    mcp_server=False,
                    run_history=False,
                    footer_links=[],
                    num_workers=0,
                    theme=gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
                    css=CSS,
                    app_kwargs={"middleware": [middleware(Gate, upload_bytes=limits.upload_bytes)]},
                )
            except OSError as error:
                raise ConfigError(
                    f"cannot listen on {host}:{port or 'any port'} ({error}): choose another --port"
                ) from None
            if on_start is not None:
                on_start(address)
            ended = stop or threading.Event()
            while not ended.wait(_LOOK_EVERY):
                sweep(uploads, _ABANDONED, time.time())
    finally:
        if page is not None:
            page.close(verbose=False)
        empty(work)


@contextlib.contextmanager
def _environment(uploads: Path, host: str) -> Iterator[None]:
    """gradio's settings that have no argument; what was set before comes back."""
    direct = ",".join(filter(None, (os.environ.get("NO_PROXY"), "127.0.0.1", "localhost", host)))
    values = {
        "GRADIO_TEMP_DIR": str(uploads),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_RUN_HISTORY": "False",
        "GRADIO_ALLOWED_PATHS": "",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": direct,
        "no_proxy": direct,
    }
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
