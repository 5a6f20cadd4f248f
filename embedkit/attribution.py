"""Owns attribution: how much each token of a case speaks for a logit, by one of several methods; knows no file."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from embedkit.bags import Bag
from embedkit.errors import HeadError, OptionError
from embedkit.members import Member, fitted_tensors
from embedkit.plugins import HeadOutput
from embedkit.recipe import TokenSet

__all__ = ["METHODS", "SIGNED", "Method", "mean_scores", "randomise_member", "require_method", "score_tokens"]

Method = Literal["contribution", "gradient", "occlusion", "attention", "backbone"]
"""How tokens are scored. Of the head's answer: ``contribution``, ``gradient`` and ``occlusion``, see `score_tokens`;
of where it looks, whatever it answers: ``attention`` and ``backbone``."""
METHODS: tuple[Method, ...] = get_args(Method)
SIGNED = frozenset[str]({"contribution", "gradient", "occlusion"})
"""Methods whose scores speak for a class, or against it where they are negative."""

_MOST_BLOCKS = 1024
_MOST_TOKENS = 1 << 24  # read by a head in all passes of an occlusion: seconds on one core
_TAIL_COST = 256  # a token through the blocks of a tail takes as long as so many through a head
_STEPS = 5  # of integrated gradients: with three the maps of head tail found what finer ones find
_BATCH_ELEMENTS = 1 << 24  # of the tokens of one pass, 64 MiB


def require_method(name: str) -> None:
    """Stops where no method has that name.

    Raises:
        OptionError: it has not.
    """
    if name not in METHODS:
        raise OptionError(f"there is no method {name!r} to score tokens by; expected one of {', '.join(METHODS)}")


def score_tokens(
    member: Member, bag: Bag, output: int, *, method: Method = "contribution", rows: Tensor | None = None
) -> Tensor:
    """How much each token speaks for one logit.

    ``contribution``: what it adds to the logit by the head's own account, exact; of a head that has none, integrated
    gradients (Sundararajan et al., arXiv 1703.01365): the gradient times how far the token is from the average one,
    its mean on the straight way there from a case of average tokens; they sum to what the logit gains on that way.
    ``gradient``: gradient of the logit times how far the token is from the average one (Shrikumar et al., arXiv
    1605.01713). ``occlusion``: by how much the logit falls when the token is replaced by the average one (Zeiler and
    Fergus, arXiv 1311.2901), in blocks of neighbouring slices and patches where single tokens would take too long, a
    block's fall shared out among its tokens. ``attention``: the head's attention over tokens; of a head that attends
    to slices alone, each slice's attention shared out among its patches by what speaks for the logit there.
    ``backbone``: the class token's attention in the backbone's last block, weighed by the head's slice attention where
    it has one (AnyMC3D, arXiv 2512.12887): the same for every class.

    The average token is that of the training where tokens are standardised, else that of the case. Of survival, the
    logit is the mean of all logits, each of which speaks for an earlier event.

    Args:
        member: A fitted head.
        bag: As it came from the cache.
        output: Place of the logit.
        method: One of `METHODS`.
        rows: The token set ``attention`` [batch views slices patches], for ``backbone`` alone.

    Returns:
        [batch views slices patches], on the grid of the head's patches, or of ``rows``; 0 on masked slices.

    Raises:
        HeadError: ``attention`` of a head that has none.
        OptionError: no such method, or ``backbone`` without ``rows``.
    """
    require_method(method)
    prepared = member.prepare(bag)
    if method == "backbone":
        if rows is None:
            raise OptionError("method backbone needs the rows of the token set attention, but none were given")
        scores = _weigh_rows(member, prepared, rows)
    else:
        scores = _SCORERS[method](member, prepared, output)
    return scores.detach().float().masked_fill(~prepared.mask[..., None], 0.0)


def mean_scores(parts: Sequence[Tensor]) -> Tensor:
    """The mean of scores [batch views slices patches] on square grids, on the finest, coarse places shared out."""
    finest = max(part.shape[3] for part in parts)
    return torch.stack([_share_out(part, finest) for part in parts]).mean(0)


def randomise_member(member: Member, *, seed: int) -> Member:
    """The same head with all that was learned undone: the numbers of every fitted tensor in another order.

    A heatmap that tells why a head answers as it does must change with it (Adebayo et al., "Sanity checks for saliency
    maps", arXiv 1810.03292).
    """
    shuffled = copy.deepcopy(member)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for values in fitted_tensors(shuffled):
            order = torch.randperm(values.numel(), generator=generator).to(values.device)
            values.copy_(values.flatten()[order].view_as(values))
    return shuffled


def _answer(member: Member, prepared: Bag, output: int) -> Tensor:
    """The logit explained [batch], in the unit of the member's logits."""
    logits = cast(HeadOutput, member.head(prepared)).logits
    chosen = logits[:, output] if member.curve is None else logits.mean(1)
    return chosen * member.sharpness


def _contribute(member: Member, prepared: Bag, output: int) -> Tensor:
    if not hasattr(member.head, "evidence"):
        return _integrate_gradients(member, prepared, output)
    outputs = [output] if member.curve is None else range(member.curve.outputs)
    each = [cast(Any, member.head).evidence(prepared, place) for place in outputs]
    return torch.stack(each).mean(0).detach() * member.sharpness


def _gradient_times_token(member: Member, prepared: Bag, output: int) -> Tensor:
    return _multiply(prepared, _measure_distance(member, prepared), _find_slopes(member, prepared, output))


def _integrate_gradients(member: Member, prepared: Bag, output: int) -> Tensor:
    """By the midpoint rule."""
    distance = _measure_distance(member, prepared)
    total = {name: torch.zeros_like(apart) for name, apart in distance.items()}
    for step in range(_STEPS):
        left = 1 - (step + 0.5) / _STEPS
        tokens = {name: values - left * distance[name] for name, values in prepared.tokens.items()}
        for name, slope in _find_slopes(member, dataclasses.replace(prepared, tokens=tokens), output).items():
            total[name] += slope / _STEPS
    return _multiply(prepared, distance, total)


def _find_slopes(member: Member, prepared: Bag, output: int) -> dict[str, Tensor]:
    """The gradient of the logit by every token."""
    tokens = {name: values.detach().requires_grad_() for name, values in prepared.tokens.items()}
    with torch.enable_grad():
        answer = _answer(member, dataclasses.replace(prepared, tokens=tokens), output).sum()
        found = torch.autograd.grad(answer, list(tokens.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(tokens, found, strict=True))


def _measure_distance(member: Member, prepared: Bag) -> dict[str, Tensor]:
    """Token set -> how far each token is from the average one; 0 on masked slices and for what is no patch."""
    found = {}
    for name, values in prepared.tokens.items():
        apart = values.detach() - _average_token(member, prepared, name)
        apart = apart.masked_fill(~prepared.mask[..., None, None], 0.0)
        apart[:, :, :, : _first_patch(prepared, name)] = 0.0
        found[name] = apart
    return found


def _multiply(prepared: Bag, distance: dict[str, Tensor], slopes: dict[str, Tensor]) -> Tensor:
    """[batch views slices patches]: the products; that of a slice's lone token is shared out among its patches."""
    products = [(apart * slopes[name]).sum(-1)[..., _first_patch(prepared, name) :] for name, apart in distance.items()]
    patches = max(part.shape[3] for part in products)
    return torch.stack([part.expand(-1, -1, -1, patches) / (patches // part.shape[3]) for part in products]).sum(0)


def _occlude(member: Member, prepared: Bag, output: int) -> Tensor:
    return torch.cat([_occlude_case(member, _pick_case(prepared, number), output) for number in range(len(prepared))])


def _occlude_case(member: Member, case: Bag, output: int) -> Tensor:
    """[1 views slices patches]: the fall of the logit in the block of each token, per real token of the block."""
    patches = max(values.shape[3] - _first_patch(case, name) for name, values in case.tokens.items())
    blocks = _form_blocks(case, patches)
    averages = {name: _average_token(member, case, name) for name in case.tokens}
    elements = sum(values.numel() for values in case.tokens.values())
    batches = torch.split(blocks, max(1, _BATCH_ELEMENTS // elements))
    with torch.no_grad():
        whole = _answer(member, case, output)
        falls = [whole - _answer(member, _cover(case, some, averages), output) for some in batches if len(some)]
    each = torch.cat([whole.new_zeros(0), *falls]) / blocks.sum((1, 2, 3))
    return torch.einsum("n,nvsp->vsp", each, blocks.to(each))[None]


def _form_blocks(case: Bag, patches: int) -> Tensor:
    """Bool [blocks views slices patches]: every real token in one block, neighbours together where there are many."""
    _, views, slices = case.mask.shape
    side = math.isqrt(patches)
    height, width = (side, side) if side * side == patches else (1, patches)
    tokens = max(1, int(case.mask.sum()) * patches)
    most = _MOST_TOKENS // tokens // (1 if case.tail is None else _TAIL_COST)
    thick, broad = 1, 1
    while _count_blocks(views, (slices, height, width), thick, broad) > max(1, min(_MOST_BLOCKS, most)):
        if thick >= slices and broad >= max(height, width):
            break
        if broad >= max(height, width) or (thick < slices and slices / thick > max(height, width) / broad):
            thick *= 2
        else:
            broad *= 2
    along = torch.arange(slices) // thick
    down, across = torch.arange(height) // broad, torch.arange(width) // broad
    place = (down[:, None] * (int(across.max()) + 1) + across).flatten()
    owner = along[:, None] * (int(place.max()) + 1) + place
    owner = owner + torch.arange(views)[:, None, None] * (int(owner.max()) + 1)
    owner = owner.to(case.mask.device).masked_fill(~case.mask[0, ..., None], -1)
    numbers = torch.arange(int(owner.max()) + 1, device=owner.device)
    blocks = owner == numbers.view(-1, 1, 1, 1)
    return blocks[blocks.any(3).any(2).any(1)]


def _count_blocks(views: int, sizes: tuple[int, int, int], thick: int, broad: int) -> int:
    slices, height, width = sizes
    return views * -(-slices // thick) * -(-height // broad) * -(-width // broad)


def _cover(case: Bag, blocks: Tensor, averages: dict[str, Tensor]) -> Bag:
    """One case per block, in which the average token stands for the tokens of the block.

    A class token beside patches is left as it is: it belongs to no block.
    """
    count = len(blocks)
    tokens = {}
    for name, values in case.tokens.items():
        first = _first_patch(case, name)
        if values.shape[3] - first != blocks.shape[3]:
            tokens[name] = values.expand(count, -1, -1, -1, -1)
            continue
        patches = torch.where(blocks[..., None], averages[name], values[:, :, :, first:])
        kept = values[:, :, :, :first].expand(count, -1, -1, -1, -1)
        tokens[name] = torch.cat([kept, patches], 3) if first else patches
    mask, positions = case.mask.expand(count, -1, -1), case.positions.expand(count, -1, -1)
    return dataclasses.replace(case, tokens=tokens, mask=mask, positions=positions, case_ids=case.case_ids * count)


def _attend(member: Member, prepared: Bag, output: int) -> Tensor:
    with torch.no_grad():
        found = cast(HeadOutput, member.head(prepared))
    if found.token_attention is not None:
        return found.token_attention
    if found.slice_attention is None:
        raise HeadError(
            f"head {member.name!r} weighs neither slices nor patches by attention, so it has none to show;"
            f" choose another method ({', '.join(name for name in METHODS if name != 'attention')}) or head"
        )
    positive = _contribute(member, prepared, output).clamp(min=0)
    share = positive / positive.sum(3, keepdim=True).clamp(min=torch.finfo(positive.dtype).tiny)
    if share.shape[3] == 1:
        share = torch.ones_like(share)
    return found.slice_attention[..., None] * share


def _weigh_rows(member: Member, prepared: Bag, rows: Tensor) -> Tensor:
    with torch.no_grad():
        found = cast(HeadOutput, member.head(prepared)).slice_attention
    if found is None:
        found = prepared.mask / prepared.mask.sum(2, keepdim=True).clamp(min=1)
    return found.float()[..., None] * rows.to(found.device).float()


_SCORERS: dict[str, Callable[[Member, Bag, int], Tensor]] = {
    "contribution": _contribute,
    "gradient": _gradient_times_token,
    "occlusion": _occlude,
    "attention": _attend,
}


def _average_token(member: Member, prepared: Bag, token_set: str) -> Tensor:
    """[batch views 1 1 dim] what stands for no information."""
    first = _first_patch(prepared, token_set)
    values = prepared.tokens[token_set].detach()[:, :, :, first:]
    if member.standardiser is not None and TokenSet.parse(token_set).kind != "cut":
        return values.new_zeros(values.shape[-1])
    real = prepared.mask[..., None, None]
    counts = (real.sum((2, 3), keepdim=True) * values.shape[3]).clamp(min=1)
    return values.masked_fill(~real, 0.0).sum((2, 3), keepdim=True) / counts


def _first_patch(bag: Bag, token_set: str) -> int:
    """Cut tokens open with the class token and registers, which have no place in the image."""
    cut = TokenSet.parse(token_set).kind == "cut"
    return bag.tail.shape.prefix if cut and bag.tail is not None else 0


def _pick_case(bag: Bag, number: int) -> Bag:
    one = slice(number, number + 1)
    tokens = {name: values[one] for name, values in bag.tokens.items()}
    return dataclasses.replace(
        bag, tokens=tokens, mask=bag.mask[one], positions=bag.positions[one], case_ids=bag.case_ids[one]
    )


def _share_out(scores: Tensor, patches: int) -> Tensor:
    """Scores [batch views slices patches] on a finer square grid, with the same sum over every slice."""
    if scores.shape[3] == patches:
        return scores
    side, wanted = math.isqrt(scores.shape[3]), math.isqrt(patches)
    line = torch.arange(wanted) * side // wanted
    places = (line[:, None] * side + line).flatten()
    counts = places.bincount(minlength=side * side).to(scores)
    return (scores / counts)[..., places]
