"""Owns which candidates a sweep tries for a head; fits nothing, the choice is made elsewhere, by inner splits alone."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from embedkit.errors import OptionError
from embedkit.fitting import FitOptions

__all__ = ["SWEEPS", "Candidate", "list_candidates", "require_sweep"]


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to fit a head: what it reads, its own options, and how it is fitted."""

    token_sets: tuple[str, ...]
    options: dict[str, Any]
    fit: FitOptions


@dataclass(frozen=True)
class _Grid:
    """What is varied, and how many candidates are kept at most.

    Attributes:
        rates: Factors on the learning rate.
        decays: Weight decays beside the head's own.
        dropouts: Dropout rates beside the head's own.
        sizes: Factors on the widths of the head, all at once.
        most: Candidates; of more, a part is drawn.
    """

    rates: tuple[float, ...]
    decays: tuple[float, ...]
    dropouts: tuple[float, ...]
    sizes: tuple[float, ...]
    most: int


SWEEPS: Mapping[str, _Grid] = {
    "small": _Grid((1, 0.3, 3), (0.1,), (0.5,), (1,), 36),
    "large": _Grid((1, 0.1, 0.3, 3), (1e-3, 0.1, 0.5), (0.0, 0.5), (1, 0.5, 2), 240),
}
"""By name: dozens of candidates, or hundreds."""
_WIDTHS = ("width", "hidden", "attention_width")


def require_sweep(name: str) -> None:
    """Stops where no sweep has that name.

    Raises:
        OptionError: it has not.
    """
    if name not in SWEEPS:
        raise OptionError(f"sweep is {name!r}, expected {' or '.join(SWEEPS)}")


def list_candidates(
    name: str, base: Candidate, token_sets: Sequence[tuple[str, ...]], *, by_gradient: bool, seed: int
) -> tuple[Candidate, ...]:
    """The candidates of one head, ``base`` first.

    Args:
        name: Of the sweep.
        base: The head as it would be fitted without a sweep.
        token_sets: What it may read.
        by_gradient: A head in closed form is tried on the token sets alone.
        seed: Which are drawn where there are more than the sweep's number.
    """
    grid = SWEEPS[name]
    readings = list(dict.fromkeys([base.token_sets, *token_sets]))
    if not by_gradient:
        return tuple(Candidate(each, base.options, base.fit) for each in readings)
    fits = [
        base.fit.replace(learning_rate=base.fit.learning_rate * rate, weight_decay=decay)
        for rate in grid.rates
        for decay in dict.fromkeys([base.fit.weight_decay, *grid.decays])
    ]
    found = [
        Candidate(reading, options, fit)
        for reading, options, fit in itertools.product(readings, _vary_options(grid, base.options), fits)
    ]
    if len(found) > grid.most:
        drawn = np.random.default_rng(seed).choice(len(found) - 1, grid.most - 1, replace=False) + 1
        found = [found[0], *(found[place] for place in sorted(drawn.tolist()))]
    return tuple(found)


def _vary_options(grid: _Grid, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The head's options with other dropout rates and sizes, where it has such; its own first."""
    own = options.get("dropout")
    dropouts = [own] if own is None else list(dict.fromkeys([own, *grid.dropouts]))
    widths = [name for name in _WIDTHS if isinstance(options.get(name), int)]
    return [
        {**options, **{name: max(1, round(options[name] * size)) for name in widths}}
        | ({} if dropout is None else {"dropout": dropout})
        for dropout in dropouts
        for size in (grid.sizes if widths else (1,))
    ]
