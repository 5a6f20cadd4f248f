"""Owns which heads a training fits, on which token sets and with which options; fits nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from embedkit.bags import bag_shape
from embedkit.cache import Cache
from embedkit.errors import CacheError, HeadError
from embedkit.fitting import FitOptions
from embedkit.losses import count_outputs
from embedkit.members import build_member, complete_options
from embedkit.plugins import (
    MASK_OPTION,
    choose_token_set,
    is_joint,
    learned_kinds,
    list_heads,
    load_head,
    survival_likelihood,
)
from embedkit.recipe import TokenSet
from embedkit.sweeps import Candidate, list_candidates, require_sweep
from embedkit.targets import KINDS
from embedkit.tasks import Task

__all__ = ["BASELINES", "DEFAULT_HEADS", "HeadPlan", "TokenChoice", "match_heads", "plan_heads"]

BASELINES = ("logistic", "raptor")
"""Always trained and always in the table: what any head must beat."""
DEFAULT_HEADS = ("linear", "query", "abmil", "grid", "cox", "mtlr")
"""Each on the targets of the kinds that it learns."""

TokenChoice = Sequence[str] | Mapping[str, Sequence[str]] | None


@dataclass(frozen=True, eq=False)
class HeadPlan:
    """A head with the candidates of which the best is taken, the default one first."""

    head: str
    candidates: tuple[Candidate, ...]

    @property
    def token_sets(self) -> tuple[str, ...]:
        """Of the first candidate."""
        return self.candidates[0].token_sets

    @property
    def options(self) -> dict[str, Any]:
        """Of the first candidate."""
        return self.candidates[0].options

    @property
    def fit(self) -> FitOptions:
        """Of the first candidate."""
        return self.candidates[0].fit

    @property
    def by_gradient(self) -> bool:
        return load_head(self.head).fit_by == "gradient"

    def outputs(self, task: Task) -> int:
        """Width of the head's logits on a task."""
        return count_outputs(task.kind, task.outputs, task.targets, likelihood=survival_likelihood(self.head))


def plan_heads(
    cache: Cache,
    heads: Sequence[str] | None,
    token_sets: TokenChoice,
    head_options: Mapping[str, Mapping[str, Any]],
    fit_options: Mapping[str, Any],
    *,
    sweep: str | None = None,
    seed: int = 0,
) -> tuple[HeadPlan, ...]:
    """Decides what each head reads and which candidates it has; the arguments are those of `embedkit.training.train`.

    Returns:
        The baselines, then the heads, each once.

    Raises:
        HeadError: unknown head, a head that can read nothing of this cache, or options for a head not trained.
        CacheError: no stack in the cache, or a token set that it lacks.
        OptionError: a fit option or a sweep that does not exist, or a token set of another form.
    """
    if sweep is not None:
        require_sweep(sweep)
    if not cache.token_sets:
        raise CacheError(f"cache {cache.path} holds no stack yet; extract some cases first")
    wanted = DEFAULT_HEADS if heads is None else tuple(heads)
    names = tuple(dict.fromkeys((*BASELINES, *wanted)))
    for name in names:
        load_head(name)
    if strangers := sorted({*head_options, *(token_sets if isinstance(token_sets, Mapping) else ())} - set(names)):
        raise HeadError(
            f"options or token sets were given for {', '.join(strangers)}, but heads are {', '.join(names)}"
        )
    plans = []
    for name in names:
        options = complete_options(name, head_options.get(name, {}))
        reader = str(options.get("trunk", name))
        sets = _choose(cache, name, token_sets, reader=reader, required=heads is not None and name in heads)
        if not sets:
            continue
        with torch.random.fork_rng(devices=[]):
            kind = next(kind for kind in KINDS if kind in learned_kinds(name))
            width, tried = (2, options | {"widths": (1, 1)}) if is_joint(name) else (1, options)
            build_member(name, bag_shape(cache, sets), outputs=width, kind=kind, options=tried, times=(1.0,))
        defaults = [getattr(load_head(each), "fit_defaults", {}) for each in (reader, name)]
        base = Candidate(sets, options, FitOptions().replace(**{**defaults[0], **defaults[1], **fit_options}))
        candidates: tuple[Candidate, ...] = (base,)
        if sweep is not None:
            readings = _list_readings(cache, name, sets, fixed=token_sets is not None)
            if options.get(MASK_OPTION):
                readings = [each for each in readings if any(TokenSet.parse(text).kind != "cls" for text in each)]
            by_gradient = load_head(name).fit_by == "gradient"
            candidates = list_candidates(sweep, base, readings, by_gradient=by_gradient, seed=seed)
        plans.append(HeadPlan(name, candidates))
    return tuple(plans)


def match_heads(
    plans: Sequence[HeadPlan], tasks: Sequence[Task], heads: Sequence[str] | None
) -> dict[str, tuple[HeadPlan, ...]]:
    """The plans of each target by name: those of the heads that learn its kind of task.

    Args:
        plans: As `plan_heads` gives them.
        tasks: Of one training.
        heads: Those that were asked for by name; None for the default ones.

    Raises:
        HeadError: a head was asked for that learns none of the targets, or a target that none of them learns.
    """
    for name in heads or ():
        if not any(task.kind in learned_kinds(name) for task in tasks):
            raise _unfit(name, tasks[0])
    matched = {task.name: tuple(plan for plan in plans if task.kind in learned_kinds(plan.head)) for task in tasks}
    for task in tasks:
        if heads and not any(plan.head in heads for plan in matched[task.name]):
            raise _unfit(heads[0], task)
    return matched


def _unfit(name: str, task: Task) -> HeadError:
    fit = [head for head in list_heads() if task.kind in learned_kinds(head)]
    return HeadError(
        f"head {name!r} learns {', '.join(kind for kind in KINDS if kind in learned_kinds(name))}, but target"
        f" {task.name} is a {task.kind} task; heads that learn it: {', '.join(fit)}"
    )


def _choose(cache: Cache, name: str, token_sets: TokenChoice, *, reader: str, required: bool) -> tuple[str, ...]:
    """What one head reads; nothing for a head that was not asked for by name and can read nothing here.

    ``reader`` is the head whose preference counts: the trunk of one that has a trunk.
    """
    reads = load_head(name).reads
    given = token_sets.get(name) if isinstance(token_sets, Mapping) else token_sets
    if given is not None:
        bag_shape(cache, given)
        readable = tuple(text for text in given if TokenSet.parse(text).kind in reads)
        if readable or isinstance(token_sets, Mapping) or required:
            return readable or tuple(given)
    available = [TokenSet.parse(text) for text in cache.token_sets]
    if not required and not any(found.kind in reads for found in available):
        return ()
    return (str(choose_token_set(reader, available)),)


def _list_readings(cache: Cache, name: str, sets: tuple[str, ...], *, fixed: bool) -> list[tuple[str, ...]]:
    """What a sweep lets a head read: each set alone and all together of those given, else each that it can read."""
    if fixed:
        return [sets, *((one,) for one in sets)]
    return [(text,) for text in cache.token_sets if TokenSet.parse(text).kind in load_head(name).reads]
