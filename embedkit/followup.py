"""Owns how two columns of labels, a time and whether it ended with the event, become the targets of a survival task.

Also which times a task's survival is stated at. Knows no case table, no patient and no split.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embedkit.errors import OptionError, TaskError
from embedkit.targets import count_noun, encode_numbers, list_some

__all__ = ["choose_times", "encode_followup", "require_within_followup"]

Floats = NDArray[np.float64]

_EVENT_WORDS = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0, "false": 0.0, "true": 1.0}
_STATED_QUANTILES = np.linspace(0.1, 0.9, 9)


def encode_followup(
    target: str, times: pl.Series, event: str, happened: pl.Series, case_ids: Sequence[str]
) -> NDArray[np.float64]:
    """float64 [cases 2]: how long each case was followed, and 1 where that ended with the event, 0 where censored.

    Args:
        target: Column of the times, for messages.
        times: [cases], no null.
        event: Column of the events, for messages.
        happened: [cases], no null: 0 and 1, or truth values.
        case_ids: Of the same cases.

    Raises:
        TaskError: a time that is no finite number above 0, an event that is neither 0 nor 1, or no event at all.
    """
    numbers = encode_numbers(target, times, case_ids)
    pairs = zip(case_ids, numbers.tolist(), strict=True)
    if early := [f"{case}: {value:g}" for case, value in pairs if value <= 0]:
        raise TaskError(
            f"target {target} is 0 or below in {count_noun(len(early), 'case')}{list_some(early)}, expected times above"
            " 0 for a survival task; correct the label table, or leave the cell empty where the time is unknown"
        )
    texts = [str(value).lower() for value in happened.to_list()]
    if strange := [f"{case}: {text}" for case, text in zip(case_ids, texts, strict=True) if text not in _EVENT_WORDS]:
        raise TaskError(
            f"event column {event} is neither 0 nor 1 in {count_noun(len(strange), 'case')}{list_some(strange)},"
            " expected 1 where the time ended with the event and 0 where it was censored; recode the column, or leave"
            " the cell empty where it is unknown"
        )
    events = np.array([_EVENT_WORDS[text] for text in texts])
    if not events.any():
        raise TaskError(
            f"event column {event} is 0 in all {count_noun(len(events), 'labelled case')}, expected 1 for some: without"
            " an event there is nothing to learn or to score; choose another column, or add cases with the event"
        )
    return np.stack([numbers, events], axis=1)


def require_within_followup(target: str, times: Sequence[float], followup: Floats) -> None:
    """Stops where survival is stated at a time beyond which no case was followed.

    Raises:
        OptionError: the last time is that late.
    """
    longest = float(followup[:, 0].max())
    if times[-1] >= longest:
        raise OptionError(
            f"survival of target {target} is to be stated at {times[-1]:g}, but no case was followed longer than"
            f" {longest:g}; expected times below that"
        )


def choose_times(target: str, followup: Floats, times: Sequence[float] | None) -> tuple[float, ...]:
    """The times at which the survival of each case is stated: the given ones, else deciles of the times of events.

    Deciles are rounded to three digits, which only serves their names; nothing is fitted to them.

    Args:
        target: For messages.
        followup: As `encode_followup` gives it.
        times: Above 0 and rising; None for the deciles.

    Raises:
        OptionError: times that are not so.
    """
    if times is not None:
        chosen = [float(time) for time in times]
        if not chosen or chosen[0] <= 0 or not all(np.isfinite(chosen)) or sorted(set(chosen)) != chosen:
            listed = ", ".join(f"{time:g}" for time in chosen) or "none"
            raise OptionError(
                f"survival of target {target} is to be stated at the times {listed}; expected one or more above 0,"
                " each later than the one before"
            )
        return tuple(chosen)
    longest = float(followup[:, 0].max())
    deciles = np.quantile(followup[followup[:, 1] == 1, 0], _STATED_QUANTILES)
    rounded = {float(f"{time:.3g}") for time in deciles.tolist()}
    return tuple(sorted(time for time in rounded if 0 < time < longest)) or (float(deciles[0]),)
