"""Owns who may ask the page's server, and what a browser may do with its answers; knows no route.

The server listens on the loopback interface alone, which does not by itself keep out other users of the machine, nor
pages of other origins in the user's own browser. So every request must carry the token (first in the address that is
printed, from then on in a cookie), must be addressed to a loopback name (against DNS rebinding), and must come from the
page itself where it changes anything. A policy forbids the browser every request elsewhere.
"""

from __future__ import annotations

import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Guard"]

_LOOPBACK_NAMES = {"127.0.0.1", "localhost", "::1"}
_POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; form-action 'self';"
    " frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, *, token: str) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
            await send(message)

        refusal = self._refuse(Request(scope))
        await (self._app if refusal is None else refusal)(scope, receive, send_guarded)

    def _refuse(self, request: Request) -> Response | None:
        """The answer to a request that goes no further; None for one that does."""
        host = request.headers.get("host", "")
        if _host_name(host) not in _LOOPBACK_NAMES:
            return _error(421, f"this server answers on 127.0.0.1 and localhost only, not as {host[:100]!r}")
        if request.method not in ("GET", "HEAD") and not _is_same_origin(request.headers):
            return _error(403, "this request did not come from the page itself")
        cookie = f"embedkit-{urlsplit(f'//{host}').port or 80}"
        given = request.query_params.get("token")
        if given is not None and request.url.path == "/" and self._is_token(given):
            entry = RedirectResponse("/", 303)
            entry.set_cookie(cookie, self._token, httponly=True, samesite="strict", path="/")
            return entry
        if self._is_token(request.cookies.get(cookie, "")):
            return None
        words = "open the whole address that embedkit serve printed, with its token; a later start has another one"
        return PlainTextResponse(f"embedkit: {words}\n", 403) if request.url.path == "/" else _error(403, words)

    def _is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode(), self._token.encode())


def _host_name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_same_origin(headers: Headers) -> bool:
    """True unless a browser says that another page made the request; what is no browser sends neither header."""
    origin = headers.get("origin")
    site = headers.get("sec-fetch-site", "same-origin")
    return site == "same-origin" and (origin is None or origin.partition("://")[2] == headers.get("host"))


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status)
