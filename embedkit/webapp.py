"""Owns the explore page's application: addresses, parameters and answers; every number comes from elsewhere.

Ids in an address are looked up among those known and never become paths. What goes wrong is answered as
``{"error": message}``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from embedkit.cohort import Cohort, Subject
from embedkit.errors import EmbedkitError, RequestError
from embedkit.overlays import BoundedStore, Overlays
from embedkit.projection import list_projections, project_vectors
from embedkit.queryjob import QueryDesk
from embedkit.slicepairs import Comparer
from embedkit.webguard import Guard

__all__ = ["make_app"]

_STATIC = Path(__file__).parent / "static"
_MOST_NEIGHBOURS = 100
_MOST_MAP_BYTES = 64 << 20
_MOST_ANNOUNCEMENT_BYTES = 4 << 20
_STATUS = {"unknown": 404, "too_large": 413, "busy": 409}

_log = logging.getLogger(__name__)


def make_app(cohort: Cohort, desk: QueryDesk, *, token: str) -> Starlette:
    """The application that serves a cohort.

    Args:
        cohort: What is shown.
        desk: Takes queries by new images; its owner closes it.
        token: Every request must carry it; see `embedkit.webguard`.
    """
    answers = _Answers(cohort, desk)
    reads: dict[str, Callable[[Request], Response]] = {
        "/api/cohort": answers.cohort,
        "/api/column": answers.column,
        "/api/map": answers.map,
        "/api/filter": answers.filter,
        "/api/case": answers.case,
        "/api/preview": answers.preview,
        "/api/neighbours": answers.neighbours,
        "/api/compare": answers.compare,
        "/api/heat": answers.heat,
        "/api/overlay": answers.overlay,
        "/api/upload/{key}": answers.upload,
    }
    routes = [
        Route("/", _index_page),
        *(Route(path, answer) for path, answer in reads.items()),
        Route("/api/upload", answers.open_upload, methods=["POST"]),
        Route("/api/upload/{key}/file", answers.receive_file, methods=["POST"]),
        Route("/api/upload/{key}/start", answers.start_upload, methods=["POST"]),
        Route("/api/upload/{key}/cancel", answers.cancel_upload, methods=["POST"]),
        Mount("/static", StaticFiles(directory=_STATIC)),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, token=token)],
        exception_handlers={
            EmbedkitError: _answer_error,
            HTTPException: _answer_http_error,
            Exception: _answer_unforeseen,
        },
    )


class _Answers:
    """One method per address; those that read run in threads."""

    def __init__(self, cohort: Cohort, desk: QueryDesk) -> None:
        self._cohort, self._desk = cohort, desk
        self._overlays = Overlays(cohort)
        self._comparer = Comparer(cohort)
        self._maps = BoundedStore(_MOST_MAP_BYTES)

    def cohort(self, _request: Request) -> Response:
        limit = {"upload_limit_bytes": self._desk.limit_bytes, "projections": list_projections()}
        return JSONResponse(self._cohort.describe() | limit)

    def column(self, request: Request) -> Response:
        return JSONResponse(self._cohort.column(_text(request, "name")))

    def map(self, request: Request) -> Response:
        projection = request.query_params.get("projection", "pca")

        def make() -> Any:
            return project_vectors(self._cohort.index.read_vectors(), projection)

        places = self._maps.get(projection, make, lambda found: int(found.nbytes))
        return JSONResponse({"x": places[:, 0].tolist(), "y": places[:, 1].tolist()})

    def filter(self, request: Request) -> Response:
        allowed = self._cohort.index.select_cases(_where(request))
        return JSONResponse({"allowed": np.flatnonzero(allowed).tolist()})

    def case(self, request: Request) -> Response:
        subject = self._subject(request)
        cohort = self._cohort
        return JSONResponse(
            {
                "name": subject.name,
                "patient_known": subject.patient is not None,
                "labels": {} if subject.vector is not None else cohort.labels(subject.case_id),
                "stacks": cohort.stacks(subject),
                "predictions": cohort.predictions(subject),
            }
        )

    def preview(self, request: Request) -> Response:
        subject = self._subject(request)
        view = _text(request, "view")
        previews = subject.cache.preview(subject.stack(view))
        if previews is None:
            raise RequestError("this cache keeps no previews to show; extract with --preview 128")
        if "row" in request.query_params:
            row = _number(request, "row", 0, low=0, high=len(previews) - 1)
            previews = previews[row : row + 1]
        return Response(previews.tobytes(), media_type="application/octet-stream")

    def neighbours(self, request: Request) -> Response:
        found = self._cohort.neighbours(
            self._subject(request),
            k=_number(request, "k", 10, low=1, high=_MOST_NEIGHBOURS),
            where=_where(request),
            exclude_same_patient=request.query_params.get("exclude_same_patient") == "1",
        )
        return JSONResponse({"neighbours": found})

    def compare(self, request: Request) -> Response:
        return JSONResponse(self._comparer.compare(self._subject(request), _text(request, "with")))

    def heat(self, request: Request) -> Response:
        row = _number(request, "row", 0, low=0, high=1 << 30)
        heat = self._comparer.heat(self._subject(request), _text(request, "with"), _text(request, "view"), row)
        return JSONResponse(heat)

    def overlay(self, request: Request) -> Response:
        class_name = request.query_params.get("class") or None
        return JSONResponse(self._overlays.find(_text(request, "run"), self._subject(request), class_name=class_name))

    def upload(self, request: Request) -> Response:
        return JSONResponse(self._desk.job(request.path_params["key"]).describe())

    async def open_upload(self, request: Request) -> Response:
        view, sizes, patient = _read_announcement(await _read_body(request, _MOST_ANNOUNCEMENT_BYTES))
        job = await run_in_threadpool(lambda: self._desk.open_job(view=view, sizes=sizes, patient=patient))
        return JSONResponse(job.describe(), 201)

    async def receive_file(self, request: Request) -> Response:
        upload = self._desk.receiving(request.path_params["key"]).upload
        path = upload.begin_file(_text(request, "name"))
        upload.require_room(int(request.headers.get("content-length", 0)))
        try:
            async for chunk in request.stream():
                await run_in_threadpool(upload.append, path, chunk)
        except ClientDisconnect:
            upload.remove()
            raise
        return JSONResponse({"received": upload.received_bytes})

    async def start_upload(self, request: Request) -> Response:
        return JSONResponse(self._desk.start(request.path_params["key"]).describe(), 202)

    async def cancel_upload(self, request: Request) -> Response:
        return JSONResponse(self._desk.cancel(request.path_params["key"]).describe())

    def _subject(self, request: Request) -> Subject:
        """What is looked at: ``upload=KEY`` or ``case=ID``."""
        key = request.query_params.get("upload")
        return self._cohort.subject(_text(request, "case")) if key is None else self._desk.subject(key)


async def _index_page(_request: Request) -> Response:
    return FileResponse(_STATIC / "index.html")


def _text(request: Request, name: str) -> str:
    value = request.query_params.get(name)
    if value is None:
        raise HTTPException(400, f"the address lacks {name}=...")
    return value


def _number(request: Request, name: str, default: int, *, low: int, high: int) -> int:
    text = request.query_params.get(name, str(default))
    if not text.isascii() or not text.isdecimal() or not low <= int(text[:12]) <= high:
        raise HTTPException(400, f"{name} is {text[:40]!r}, expected a whole number from {low} to {high}")
    return int(text)


def _where(request: Request) -> str | None:
    return request.query_params.get("where", "").strip() or None


def _read_announcement(body: bytes) -> tuple[str | None, list[int], str | None]:
    """The view, the sizes of the files that will be sent, and whose image they are, where that is told."""
    try:
        told = json.loads(body)
        view, sizes, patient = told["view"], told["sizes"], told.get("patient")
        names = all(name is None or isinstance(name, str) for name in (view, patient))
        good = names and all(type(size) is int and size >= 0 for size in sizes)
    except (ValueError, KeyError, TypeError, AttributeError):
        good = False
    if not good:
        expected = '{"view": null, "sizes": [bytes, ...], "patient": null}'
        raise HTTPException(400, f"the announcement is not what was expected: {expected}")
    return view, sizes, (patient or "").strip() or None


async def _read_body(request: Request, most_bytes: int) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > most_bytes:
            raise HTTPException(413, f"the announcement is longer than {most_bytes} bytes; send fewer files")
    return body


def _answer_error(_request: Request, error: Exception) -> Response:
    status = _STATUS[error.reason] if isinstance(error, RequestError) else 400
    return JSONResponse({"error": str(error)}, status)


def _answer_http_error(_request: Request, error: Exception) -> Response:
    refused = cast(HTTPException, error)
    return JSONResponse({"error": refused.detail}, refused.status_code)


def _answer_unforeseen(_request: Request, error: Exception) -> Response:
    _log.error("unforeseen error while answering", exc_info=error)
    message = f"unforeseen {type(error).__name__}; the terminal of embedkit serve says more"
    return JSONResponse({"error": message}, 500)
