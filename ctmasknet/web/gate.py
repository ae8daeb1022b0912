"""What stands between the network and gradio: only the routes the page needs, bounded bodies, strict headers.

gradio itself would also serve files out of its cache, fetch addresses it is given, and keep runs in the browser.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

_API = "/gradio_api/"
ROUTES = ("/", "/config", "/theme.css", "/manifest.json", "/favicon.ico")
"""What is served under exactly these paths."""

PREFIXES = (
    "/assets/",
    "/static/",
    "/svelte/",
    *(_API + name for name in ("queue/", "heartbeat/", "upload", "startup-events", "app_id", "cancel", "reset")),
)
"""What is served below these."""

_OTHER_BODY = 1_000_000  # bytes, of a request that is no upload
_MULTIPART = 1_000_000  # bytes, what the form adds to the files

HEADERS = {
    # Everything from here: a page that asked another host for a font or a script would tell it who looks at what.
    "content-security-policy": "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'none'; form-action 'self'; base-uri 'self'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}


class Gate:
    """ASGI middleware.

    Args:
        app: what is behind it.
        upload_bytes: the largest upload, all files together.
    """

    def __init__(self, app: App, upload_bytes: int) -> None:
        self.app = app
        self.upload_bytes = upload_bytes

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Let the request through, or answer it here: 404, 411 (no length) or 413 (too long)."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None
        path = scope["path"]
        if path not in ROUTES and not path.startswith(PREFIXES):
            return await _answer(send, 404, "not here")
        if scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            length = dict(scope["headers"]).get(b"content-length", b"")
            upload = path.startswith(_API + "upload")
            if not length.isdigit():
                return await _answer(send, 411, "the length of the body is missing")
            if int(length) > (self.upload_bytes + _MULTIPART if upload else _OTHER_BODY):
                limit = f"{self.upload_bytes / 1e6:.0f} MB"
                return await _answer(send, 413, f"more than {limit} in one upload. Send less.")

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [(name, value) for name, value in message["headers"] if name.lower().decode() not in HEADERS]
                message["headers"] = kept + [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            await send(message)

        return await self.app(scope, receive, with_headers)


async def _answer(send: Send, status: int, text: str) -> None:
    body = text.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
