"""Owns the head registry (entry-point group ``embedkit.heads``) and the contract of a head; knows no head by name.

A head is a class derived from ``torch.nn.Module``::

    class MyHead(nn.Module):
        reads = frozenset({"cls"})            # kinds of token set it can read
        fit_by = "gradient"                   # or "closed form"
        prefers = TokenPreference("cls")      # optional: which token set to take when the user names none
        fit_defaults = {"learning_rate": 1e-3}  # optional: see embedkit.fitting.FitOptions
        slice_order = "free"                  # optional: what it makes of the order of slices, see SliceOrder
        kinds = frozenset({"survival"})       # optional: kinds of task it learns; unless said, all but survival
        likelihood = "cox"                    # optional: how it learns survival, "cox" (1 logit) or "mtlr" (1 per edge)
        learns_masks = True                   # optional: it gives mask_logits, and learns them from masks of images

        def __init__(self, shape: BagShape, token_sets: tuple[str, ...], outputs: int, *, width: int = 64): ...
        def forward(self, bag: Bag) -> HeadOutput: ...

It must give the same result however far a bag is padded: masked slices may hold anything, a view may be masked
throughout. A head with ``fit_by = "closed form"`` also has ``features(bag) -> [batch features]`` (NaN where a view is
missing), ``fit(features, targets, *, kind, holdouts, class_weights)`` and ``read_out(features) -> logits``. ``fit``
returns what it chose on the holdouts as a dict of numbers and takes them again as keywords, then without choosing.

Many fits of a head are trained side by side (`torch.vmap` over stacked parameters), so ``forward`` should be a pure
function of parameters and bag; where it cannot be run so, its fits run one after the other and the run says so; so too
where it says in ``one_by_one`` why that is better. A head that first pools its tokens without parameters may have
``reduce(bag) -> bag``, on which ``forward`` gives the same as on the whole bag: linear in the tokens with weights that
sum to one over what they pool, since it is done on raw tokens, once per training, and dependent on ``token_sets``
alone, not on options. See `embedkit.pooling.pool_bag`.

A head with ``joint = True`` learns several targets at once: it is built for the logits of all side by side, with their
names and the number of each one's logits as options ``targets`` and ``widths``, and has ``combine(losses, chance,
leaves)``, see `embedkit.jointlosses`. For one of them it is built with its place among them as option ``place``.

A head with options that name files may have ``resolve_options(options)``, a class method that puts what they hold in
their place before training, so that a run needs no other file. A head may have ``evidence(bag, output) -> [batch views
slices patches]``, what each token adds to a logit: heatmaps come from there. A head that learns masks gives
``mask_logits`` of a bag with ``cover`` or ``clicks``, and need not do so of others; it reads patches on a square grid.
If it takes an option ``masks``, False by default, it is told there whether there will be any.
Built-in heads come through the same door as everyone's::

    [project.entry-points."embedkit.heads"]
    mine = "my_package:MyHead"
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.metadata
import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, cast, get_args

from torch import Tensor, nn

from embedkit.bags import Bag, BagShape
from embedkit.errors import HeadError
from embedkit.recipe import TokenKind, TokenSet
from embedkit.targets import KINDS

__all__ = [
    "GROUP",
    "MASK_OPTION",
    "Head",
    "HeadEntry",
    "HeadOutput",
    "SliceOrder",
    "TokenPreference",
    "check_output",
    "choose_token_set",
    "create_head",
    "is_joint",
    "learned_kinds",
    "learns_masks",
    "list_heads",
    "list_options",
    "load_head",
    "survival_likelihood",
]

GROUP = "embedkit.heads"
MASK_OPTION = "masks"
"""Of a head that learns masks only where it is told that there are some."""
FIT_WAYS = ("gradient", "closed form")
LIKELIHOODS = ("cox", "mtlr")
_EVERY_KIND: frozenset[str] = frozenset(KINDS)

SliceOrder = Literal["free", "positions", "sequence"]
"""What a head makes of the order of slices. ``free``: nothing, slices may be shuffled. ``positions``: it reads
``Bag.positions`` alone, slices may be shuffled together with them. ``sequence``: neighbours along the axis matter."""


@dataclass(frozen=True)
class HeadOutput:
    """What a head says of a bag.

    Attributes:
        logits: [batch outputs]; of a regression, the value in units of the standardised target.
        slice_attention: [batch views slices], softmax weights that sum to 1 over the real slices of each view.
        token_attention: [batch views slices patches], how much each token speaks for the answer: softmax weights,
            or signed contributions to the logit where the head has those.
        mask_logits: [batch views slices patches], the log odds of the share of each patch that the mask covers.
        embedding: [batch dim], the pooled vector that the last layer reads.
        auxiliary_logits: [batch outputs], a second answer that has the same loss in training; the mean of both losses
            is minimised. Nothing but training reads it.
    """

    logits: Tensor
    slice_attention: Tensor | None = None
    token_attention: Tensor | None = None
    mask_logits: Tensor | None = None
    embedding: Tensor | None = None
    auxiliary_logits: Tensor | None = None

    def select(self, outputs: slice) -> HeadOutput:
        """The same answer with some of the outputs alone."""
        auxiliary = self.auxiliary_logits
        chosen = None if auxiliary is None else auxiliary[:, outputs]
        return dataclasses.replace(self, logits=self.logits[:, outputs], auxiliary_logits=chosen)


class Head(Protocol):
    """A head class, as the module's docstring describes it."""

    reads: ClassVar[frozenset[str]]
    fit_by: ClassVar[str]

    def __call__(self, shape: BagShape, token_sets: Sequence[str], outputs: int, **options: Any) -> nn.Module: ...


@dataclass(frozen=True)
class TokenPreference:
    """Which of the cached token sets suits a head best.

    Attributes:
        kind: Kind of token set; where none is cached, any other that the head reads.
        depth: Depth of the layer as a part of the deepest cached one.
        grid: Side of the patch grid; None for the full grid.
    """

    kind: TokenKind = "cls"
    depth: float = 1.0
    grid: int | None = None


@dataclass(frozen=True)
class HeadEntry:
    """A registered head, not yet imported."""

    name: str
    distribution: str
    version: str
    value: str


def list_heads(entry_points: Iterable[importlib.metadata.EntryPoint] | None = None) -> dict[str, HeadEntry]:
    """Every registered head by name, sorted; imports none of them.

    Args:
        entry_points: Where to look; None for the installed distributions.

    Raises:
        HeadError: two distributions register one name.
    """
    return dict(_installed()) if entry_points is None else _collect(entry_points)


def load_head(name: str, entry_points: Iterable[importlib.metadata.EntryPoint] | None = None) -> Head:
    """Imports a head class by its registered name.

    Raises:
        HeadError: no head of that name, a name registered twice, an entry point that fails to import, or a thing that
            is not a head.
    """
    entries = list_heads(entry_points)
    if name not in entries:
        near = difflib.get_close_matches(name, entries, n=1, cutoff=0.5)
        raise HeadError(
            f"no head is called {name!r}; {f'did you mean {near[0]}? ' if near else ''}"
            f"installed: {', '.join(entries) or 'none (reinstall embedkit)'}"
        )
    entry = entries[name]
    try:
        loaded = importlib.metadata.EntryPoint(name, entry.value, GROUP).load()
    except Exception as error:
        raise HeadError(
            f"head {name!r} of {entry.distribution} could not be imported from {entry.value}:"
            f" {type(error).__name__}: {error}; repair or uninstall {entry.distribution}"
        ) from error
    _check_class(loaded, entry)
    return cast(Head, loaded)


def list_options(name: str) -> dict[str, Any]:
    """The options of the head called ``name`` with their defaults; those without a default must be given.

    Raises:
        HeadError: unknown head.
    """
    parameters = inspect.signature(load_head(name)).parameters.values()
    return {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}


def learned_kinds(name: str) -> frozenset[str]:
    """The kinds of task that a head learns.

    Raises:
        HeadError: as `load_head`.
    """
    kinds: frozenset[str] = getattr(load_head(name), "kinds", _EVERY_KIND - {"survival"})
    return kinds


def is_joint(name: str) -> bool:
    """Whether a head learns several targets at once.

    Raises:
        HeadError: as `load_head`.
    """
    return bool(getattr(load_head(name), "joint", False))


def learns_masks(name: str) -> bool:
    """Whether a head learns masks of images beside the label.

    Raises:
        HeadError: as `load_head`.
    """
    return bool(getattr(load_head(name), "learns_masks", False))


def survival_likelihood(name: str) -> str:
    """By which likelihood a head learns survival: ``cox`` or ``mtlr``.

    Raises:
        HeadError: as `load_head`.
    """
    likelihood: str = getattr(load_head(name), "likelihood", "cox")
    return likelihood


def choose_token_set(name: str, available: Sequence[TokenSet]) -> TokenSet:
    """The token set, of those available, that the head called ``name`` would rather read.

    Raises:
        HeadError: unknown head, or one that can read none of them.
    """
    head = load_head(name)
    preference: TokenPreference = getattr(head, "prefers", TokenPreference())
    readable = [found for found in available if found.kind in head.reads]
    if not readable:
        raise HeadError(
            f"head {name!r} reads {', '.join(sorted(head.reads))} tokens, but the cache holds"
            f" {', '.join(map(str, available)) or 'none'}; choose another head, or extract with"
            f" {'--cut 4' if head.reads == {'cut'} else '--tokens'}"
        )
    wanted_layer = preference.depth * max(found.layer for found in available)
    wanted_grid = math.inf if preference.grid is None else preference.grid

    def distance(found: TokenSet) -> tuple[bool, float, float, int]:
        grid = math.inf if found.grid is None else found.grid
        apart = 0.0 if grid == wanted_grid else abs(1 / grid - 1 / wanted_grid)
        return (found.kind != preference.kind, abs(found.layer - wanted_layer), apart, -found.layer)

    return min(readable, key=distance)


def create_head(
    name: str, shape: BagShape, token_sets: Sequence[str], outputs: int, *, options: Mapping[str, Any] | None = None
) -> nn.Module:
    """Builds the head called ``name`` for bags of this shape.

    Args:
        name: A registered name.
        shape: Sizes of the bags.
        token_sets: What the head reads; each must be in ``shape``.
        outputs: Width of the logits.
        options: The head's own keyword options.

    Raises:
        HeadError: unknown head, a token set that it cannot read, or an option that it does not take.
    """
    head = load_head(name)
    unreadable = [text for text in token_sets if TokenSet.parse(text).kind not in head.reads]
    if unreadable:
        raise HeadError(
            f"head {name!r} cannot read {', '.join(unreadable)}: it reads {', '.join(sorted(head.reads))} tokens;"
            " give it a token set of those kinds"
        )
    arguments = (shape.select(token_sets), tuple(token_sets), outputs)
    signature = inspect.signature(head)
    try:
        signature.bind(*arguments, **(options or {}))
    except TypeError as error:
        known = list_options(name)
        raise HeadError(
            f"head {name!r} cannot take options {dict(options or {})}: {error}; it has {', '.join(known) or 'none'}"
        ) from error
    return head(*arguments, **(options or {}))


def check_output(name: str, output: Any, bag: Bag, outputs: int) -> HeadOutput:
    """Checks that a head kept its contract on this bag.

    Raises:
        HeadError: not a `HeadOutput`, or a tensor of another shape than the contract's.
    """
    if not isinstance(output, HeadOutput):
        raise HeadError(f"head {name!r} returned {type(output).__name__}, expected embedkit.plugins.HeadOutput")
    logits = (len(bag), outputs)
    expected = {"logits": logits, "auxiliary_logits": logits, "slice_attention": tuple(bag.mask.shape)}
    for field, shape in expected.items():
        tensor = getattr(output, field)
        if tensor is not None and tuple(tensor.shape) != shape:
            raise HeadError(f"head {name!r} returned {field} of shape {tuple(tensor.shape)}, expected {shape}")
    for field in ("token_attention", "mask_logits"):
        tensor = getattr(output, field)
        if tensor is not None and (tensor.ndim != 4 or tensor.shape[:3] != bag.mask.shape):
            raise HeadError(
                f"head {name!r} returned {field} of shape {tuple(tensor.shape)},"
                f" expected {tuple(bag.mask.shape)} and patches"
            )
    return output


@functools.cache
def _installed() -> dict[str, HeadEntry]:
    """The heads of the installed distributions, searched for once per process: their metadata is slow to read."""
    return _collect(importlib.metadata.entry_points(group=GROUP))


def _collect(points: Iterable[importlib.metadata.EntryPoint]) -> dict[str, HeadEntry]:
    found: dict[str, HeadEntry] = {}
    for point in points:
        distribution = point.dist.name if point.dist is not None else "an unnamed distribution"
        version = point.dist.version if point.dist is not None else ""
        entry = HeadEntry(point.name, distribution, version, point.value)
        first = found.setdefault(point.name, entry)
        if first != entry:
            raise HeadError(
                f"head {point.name!r} is registered twice, by {first.distribution} ({first.value}) and by"
                f" {distribution} ({point.value}); expected one; uninstall one of them or rename its entry point"
            )
    return dict(sorted(found.items()))


def _check_class(loaded: object, entry: HeadEntry) -> None:
    """Raises HeadError for a thing that cannot be a head."""
    problem = ""
    kinds = get_args(TokenKind)
    reads, fit_by = getattr(loaded, "reads", None), getattr(loaded, "fit_by", None)
    if not (isinstance(loaded, type) and issubclass(loaded, nn.Module)):
        problem = "it is not a subclass of torch.nn.Module"
    elif not isinstance(reads, frozenset) or not reads or not reads <= set(kinds):
        problem = f"its `reads` is {reads!r}, expected a frozenset of kinds among {', '.join(kinds)}"
    elif fit_by not in FIT_WAYS:
        problem = f"its `fit_by` is {fit_by!r}, expected one of {', '.join(FIT_WAYS)}"
    elif (order := getattr(loaded, "slice_order", None)) not in (None, *get_args(SliceOrder)):
        problem = f"its `slice_order` is {order!r}, expected one of {', '.join(get_args(SliceOrder))}"
    elif not (isinstance(learned := getattr(loaded, "kinds", _EVERY_KIND), frozenset) and learned <= _EVERY_KIND):
        problem = f"its `kinds` is {learned!r}, expected a frozenset of kinds among {', '.join(KINDS)}"
    elif (likelihood := getattr(loaded, "likelihood", "cox")) not in LIKELIHOODS:
        problem = f"its `likelihood` is {likelihood!r}, expected one of {', '.join(LIKELIHOODS)}"
    elif fit_by == "closed form" and not all(hasattr(loaded, name) for name in ("features", "fit", "read_out")):
        problem = "it is fitted in closed form but lacks `features`, `fit` or `read_out`"
    if problem:
        raise HeadError(
            f"{entry.value}, registered as head {entry.name!r} by {entry.distribution}, is no head: {problem}"
        )
