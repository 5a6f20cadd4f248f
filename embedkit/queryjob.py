"""Owns the query by a new image: receives it, extracts it in a thread, one at a time; knows no web page.

Whatever was sent, and the cache made of it, lies in one temporary folder that goes with the process.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from torch import Tensor

from embedkit.cohort import Subject
from embedkit.errors import OptionError, RequestError
from embedkit.features import Backbone, BackboneInfo, BackboneOutput, LayerTokens
from embedkit.imagequeries import embed_query, extract_query, load_query_backbone, query_view
from embedkit.index import Index
from embedkit.pipeline import explain_failure
from embedkit.slices import plan_stacks
from embedkit.uploads import Upload
from embedkit.volumes import read_volume

__all__ = ["QueryDesk", "QueryJob"]

State = Literal["receiving", "running", "done", "failed", "cancelled"]


@dataclass(eq=False)
class QueryJob:
    """One query by a new image.

    Attributes:
        key: Names it; not to be guessed.
        view: Which view the image is.
        patient: Whose it is; None where nobody told.
        upload: The files.
        state: Where it stands.
        stage: What is being done, in words.
        done, total: Slices; 0 of 0 where not known yet.
        error: Why it failed.
        subject: What can be looked at once it is done.
    """

    key: str
    view: str
    patient: str | None
    upload: Upload
    state: State = "receiving"
    stage: str = "receiving"
    done: int = 0
    total: int = 0
    error: str = ""
    subject: Subject | None = None
    started: float = field(default_factory=time.monotonic)
    stop: threading.Event = field(default_factory=threading.Event)

    def describe(self) -> dict[str, Any]:
        """Its state as plain values."""
        return {
            "upload": self.key,
            "state": self.state,
            "stage": self.stage,
            "done": self.done,
            "total": self.total,
            "error": self.error,
            "seconds": round(time.monotonic() - self.started, 1),
        }


class QueryDesk:
    """Takes queries by new images: one is received or computed at a time, the last one done is kept to look at.

    A context manager: leaving it stops what is computed and removes every file.
    """

    def __init__(
        self, index: Index, *, limit_bytes: int, weights: str | Path | None = None, device: str = "auto"
    ) -> None:
        """Takes the index to search, most bytes of an upload, and the backbone's weights and device."""
        self.limit_bytes = limit_bytes
        self._index, self._weights, self._device = index, weights, device
        self._folder = tempfile.TemporaryDirectory(prefix="embedkit-serve-")
        self._lock = threading.Lock()
        self._job: QueryJob | None = None
        self._thread: threading.Thread | None = None
        self._backbone: Backbone | None = None

    @property
    def folder(self) -> Path:
        """Where uploads lie; gone once the desk is closed."""
        return Path(self._folder.name)

    def open_job(self, *, view: str | None, sizes: Sequence[int], patient: str | None = None) -> QueryJob:
        """A new query, in the place of the one before.

        Args:
            view: Which view the image is; None where the index knows only one.
            sizes: Bytes of the files that will come, as far as told.
            patient: Whose image it is, by the ids of the index; None where nobody tells.

        Raises:
            RequestError: another one is being computed, or the files are larger than may be.
            SearchError: the index has no such view.
        """
        chosen = query_view(self._index, view)
        with self._lock:
            if self._job is not None and self._job.state == "running":
                raise RequestError("another scan is being computed; wait for it, or cancel it", reason="busy")
            self._discard()
            key = secrets.token_urlsafe(16)
            upload = Upload(self.folder / secrets.token_hex(8), limit_bytes=self.limit_bytes)
            upload.require_room(sum(sizes))
            self._job = QueryJob(key, chosen, patient, upload)
            return self._job

    def job(self, key: str) -> QueryJob:
        """The query of this key.

        Raises:
            RequestError: there is none, or another took its place.
        """
        job = self._job
        if job is None or not secrets.compare_digest(job.key.encode(), key.encode()):
            raise RequestError("there is no such upload, or another one took its place; send the scan again")
        return job

    def receiving(self, key: str) -> QueryJob:
        """The query of this key, while it still takes files.

        Raises:
            RequestError: as `job`, or it takes no more files.
        """
        job = self.job(key)
        if job.state != "receiving":
            raise RequestError(f"this upload is {job.state} and takes no more files; begin another one", reason="busy")
        return job

    def subject(self, key: str) -> Subject:
        """What a query that is done gives to look at.

        Raises:
            RequestError: as `job`, or it is not done.
        """
        job = self.job(key)
        if job.subject is None:
            raise RequestError(f"this upload is not ready to be looked at: it is {job.state}")
        return job.subject

    def start(self, key: str) -> QueryJob:
        """Begins to compute a query whose files are all there."""
        job = self.receiving(key)
        with self._lock:
            job.state, job.stage = "running", "checking the image"
            self._thread = threading.Thread(target=self._work, args=(job,), name="embedkit-query", daemon=True)
            self._thread.start()
        return job

    def cancel(self, key: str) -> QueryJob:
        """Stops a query; one being computed ends after the batch of slices in hand."""
        job = self.job(key)
        job.stop.set()
        if job.state == "receiving":
            job.state, job.stage = "cancelled", "cancelled"
            job.upload.remove()
        return job

    def close(self) -> None:
        """Stops what is computed and removes every file."""
        if self._job is not None:
            self._job.stop.set()
        if self._thread is not None:
            self._thread.join()
        self._discard()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _discard(self) -> None:
        job, self._job = self._job, None
        if job is not None:
            if job.subject is not None:
                job.subject.cache.close()
            job.upload.remove()
            shutil.rmtree(_cache_folder(job), ignore_errors=True)

    def _work(self, job: QueryJob) -> None:
        """Runs in the thread; whatever goes wrong becomes the job's error."""
        state, error = self._settle(job)
        job.upload.remove()
        job.error, job.stage, job.state = error, state, state  # told last: the files are gone by then

    def _settle(self, job: QueryJob) -> tuple[State, str]:
        """How a job ended, and its error."""
        try:
            job.subject = self._compute(job)
        except Exception as error:  # the page must hear of it, and the next query must have its turn
            message = explain_failure(error)
        else:
            return "done", ""
        return ("cancelled", "") if job.stop.is_set() else ("failed", job.upload.reword(message))

    def _compute(self, job: QueryJob) -> Subject:
        image = job.upload.resolve()
        stacks = plan_stacks({job.view: read_volume(image)}, self._index.recipe)
        job.total = sum(len(stack.indices) for stack in stacks)
        job.stage = "loading the backbone"
        if self._backbone is None:
            self._backbone = load_query_backbone(self._index, weights=self._weights, device=self._device)
        job.stage = "computing tokens"
        counted = _CountedBackbone(self._backbone, job)
        out = _cache_folder(job)
        cache = extract_query(self._index, image, out, counted, view=job.view, device=self._device)
        job.done, job.stage = job.total, "searching"
        return Subject(cache, "query", "new scan", embed_query(self._index, cache), job.patient)


def _cache_folder(job: QueryJob) -> Path:
    return job.upload.folder.with_name(f"{job.upload.folder.name}-cache")


class _CountedBackbone:
    """A backbone that tells a job how far it is, and stops where the job is to stop."""

    def __init__(self, backbone: Backbone, job: QueryJob) -> None:
        self._backbone, self._job = backbone, job

    @property
    def info(self) -> BackboneInfo:
        return self._backbone.info

    def forward_layers(self, images: Tensor, layers: Sequence[int], *, attention: bool = False) -> BackboneOutput:
        if self._job.stop.is_set():
            raise OptionError("cancelled")
        output = self._backbone.forward_layers(images, layers, attention=attention)
        self._job.done = min(self._job.done + len(images), self._job.total)
        return output

    def run_tail(self, sequence: Tensor, layer: int) -> LayerTokens:
        return self._backbone.run_tail(sequence, layer)
