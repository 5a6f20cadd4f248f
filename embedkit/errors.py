"""Owns every error that embedkit raises on purpose; knows nothing of what raises them.

    EmbedkitError
    ├── OptionError             an option has a value that means nothing (window, plane, slice choice)
    ├── ManifestError           a manifest or label table is unreadable or contradicts itself
    ├── VolumeError             an image cannot be read, or is not one grey 3D image
    ├── BackboneError           unknown backbone, weights that do not fit, hub out of reach
    ├── RecipeError             two recipes differ where they must agree
    ├── CacheError              a cache or one of its shards is damaged, incomplete or of a newer format
    ├── ExtractionError         no worker is left to extract with; a case that fails is on record and raises nothing
    ├── TaskError               a target cannot be learned as it stands (constant, one-member class, no label)
    ├── HeadError               unknown head, duplicate name, head that cannot read the tokens asked for
    ├── RunError                a run folder is incomplete or does not fit the cache
    │   └── DifferentRunError   a run that is to be kept is another than the training would make
    ├── SuiteError              a suite of tasks is unreadable, contradicts itself, or is not the one of its results
    ├── SearchError             an index is damaged, does not fit, or a query or filter is wrong
    └── RequestError            what the explore page asks for is not there, is too large, or must wait its turn

A message says what was found, what was expected and what to do. `RecallWarning` is no error: the index is there. Nor is
`StrayWarning`: the answer is there.
"""

from pathlib import Path
from typing import Literal

__all__ = [
    "BackboneError",
    "CacheError",
    "DifferentRunError",
    "EmbedkitError",
    "ExtractionError",
    "HeadError",
    "ManifestError",
    "OptionError",
    "RecallWarning",
    "RecipeError",
    "RequestError",
    "RunError",
    "SearchError",
    "StrayWarning",
    "SuiteError",
    "TaskError",
    "VolumeError",
]


class EmbedkitError(Exception):
    """Root of the tree: catch this to catch every error that embedkit raises on purpose."""


class OptionError(EmbedkitError):
    """An option has a value that means nothing."""


class RecallWarning(UserWarning):
    """An index was made, and finds fewer of the nearest than was asked for."""


class StrayWarning(UserWarning):
    """A DICOM series was read, and beside it lies a damaged file of which no series can be told; it may be a slice."""


class ManifestError(EmbedkitError):
    """A manifest or label table is unreadable or contradicts itself."""


class VolumeError(EmbedkitError):
    """An image cannot be read, or is not one grey 3D image.

    Names of files and folders, and what files say, can tell who the patient is: they are told to who runs the program,
    and kept nowhere. So the error carries them beside ``problem``, which has none of them in it.

    Attributes:
        problem: What is wrong and what to do.
        file: The file or folder that is to blame, where it is a single one.
        view: Of the case whose image it is, where that is known.
        found: In words, what the files themselves say: a name in a header, what a library quotes of it, other files.
    """

    def __init__(self, problem: str, *, file: Path | None = None, view: str = "", found: str = "") -> None:
        super().__init__(problem)
        self.problem, self.file, self.view, self.found = problem, file, view, found

    @property
    def reason(self) -> str:
        """The message without ``found``."""
        parts = [f"view {self.view}" if self.view else "", str(self.file) if self.file else "", self.problem]
        return ": ".join(part for part in parts if part)

    def __str__(self) -> str:
        return f"{self.reason} ({self.found})" if self.found else self.reason


class BackboneError(EmbedkitError):
    """Unknown backbone, weights that do not fit, or a hub out of reach."""


class RecipeError(EmbedkitError):
    """Two recipes differ where they must agree."""


class CacheError(EmbedkitError):
    """A cache or one of its shards is damaged, incomplete or of a newer format."""


class ExtractionError(EmbedkitError):
    """No worker is left to extract with; a case that fails is put on record and raises nothing."""


class TaskError(EmbedkitError):
    """A target cannot be learned as it stands."""


class HeadError(EmbedkitError):
    """Unknown head, duplicate head name, or a head that cannot read the tokens asked for."""


class RunError(EmbedkitError):
    """A run folder is incomplete or does not fit the cache."""


class DifferentRunError(RunError):
    """A run that is there already is another than the training would make.

    Attributes:
        difference: What differs, without the ways out.
    """

    def __init__(self, difference: str, ways_out: str) -> None:
        super().__init__(f"{difference}; {ways_out}")
        self.difference = difference


class SuiteError(EmbedkitError):
    """A suite of tasks is unreadable, contradicts itself, or is not the one whose results are in a folder."""


class SearchError(EmbedkitError):
    """An index is damaged, does not fit, or a query or filter is wrong."""


class RequestError(EmbedkitError):
    """What the explore page asks for is not there, is too large, or must wait its turn.

    Attributes:
        reason: Which of the three.
    """

    def __init__(self, message: str, *, reason: Literal["unknown", "too_large", "busy"] = "unknown") -> None:
        super().__init__(message)
        self.reason = reason
