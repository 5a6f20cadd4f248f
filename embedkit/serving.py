"""Owns `serve`: a loopback socket, the explore page on it, and a clean end; knows no route."""

from __future__ import annotations

import errno
import secrets
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from embedkit.errors import OptionError
from embedkit.termination import end_on_terminate

__all__ = ["UPLOAD_LIMIT_BYTES", "serve"]

UPLOAD_LIMIT_BYTES = 10**9
_HOST = "127.0.0.1"
_LAST_ANSWERS_S = 2


def serve(
    cache: str | Path,
    index: str | Path,
    runs: Sequence[str | Path] = (),
    *,
    labels: str | Path | None = None,
    port: int = 0,
    weights: str | Path | None = None,
    device: str = "auto",
    upload_limit_bytes: int = UPLOAD_LIMIT_BYTES,
    on_ready: Callable[[str], None] = print,
) -> None:
    """Serves a page to explore a cohort, on this machine alone, until it is interrupted.

    Args:
        cache: Folder or packed file.
        index: Of that cache.
        runs: Folders of runs whose predictions and heatmaps are shown.
        labels: A table by case_id whose columns are added to those of the index.
        port: Of 127.0.0.1; 0 takes a free one.
        weights: The backbone's local weights, as they were given to `extract`; needed only to query by a new image.
        device: Where the backbone runs on a new image.
        upload_limit_bytes: Most bytes of a new image.
        on_ready: Called with the page's address, which holds the token that lets one in.

    Raises:
        OptionError: starlette or uvicorn is not installed, the port is taken or not allowed, the weights are no file,
            the device cannot be used, or an option means nothing.
        CacheError, SearchError, RunError, RecipeError, ManifestError: as `embedkit.cohort.open_cohort`.
        KeyboardInterrupt: it was interrupted, and has ended in good order.
    """
    try:
        import uvicorn

        from embedkit.webapp import make_app
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn"):
            raise
        raise OptionError(
            f"the explore page needs {error.name}, which is not installed; pip install 'embedkit[serve]'"
        ) from error
    from embedkit.cohort import open_cohort
    from embedkit.planning import choose_device
    from embedkit.queryjob import QueryDesk

    if upload_limit_bytes < 1:
        raise OptionError(f"the limit of uploads is {upload_limit_bytes} bytes, expected 1 or more")
    if weights is not None and not Path(weights).is_file():
        raise OptionError(f"weights {weights} are no file; give the one that extract was given, or leave --weights out")
    choose_device(device)  # what cannot be used is told now, not by the first upload
    cohort = open_cohort(cache, index, runs, labels=labels)
    token = secrets.token_urlsafe(24)
    with (
        end_on_terminate(),
        _bind(port) as bound,
        QueryDesk(cohort.index, limit_bytes=upload_limit_bytes, weights=weights, device=device) as desk,
    ):
        app = make_app(cohort, desk, token=token)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            proxy_headers=False,
            timeout_graceful_shutdown=_LAST_ANSWERS_S,
        )
        on_ready(f"http://{_HOST}:{bound.getsockname()[1]}/?token={token}")
        uvicorn.Server(config).run(sockets=[bound])


def _bind(port: int) -> socket.socket:
    """A listening socket on the loopback interface."""
    if not 0 <= port <= 65535:
        raise OptionError(f"port {port} does not exist, expected 0 to 65535 (0 takes a free one)")
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((_HOST, port))
        bound.listen(128)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise OptionError(
                f"port {port} is taken by another program; choose another --port, or 0 for a free one"
            ) from error
        if error.errno == errno.EACCES:
            raise OptionError(f"port {port} is not allowed to this user; choose one above 1023, or 0") from error
        raise OptionError(f"cannot listen on {_HOST}:{port} ({error.strerror}); choose another --port") from error
    return bound
