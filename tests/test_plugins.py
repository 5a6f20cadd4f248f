"""The head registry: finds, names, refuses; and the contract of what a head returns."""

from __future__ import annotations

import importlib.metadata
import sys
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import nn

from embedkit.bags import Bag, BagShape
from embedkit.errors import HeadError
from embedkit.plugins import (
    GROUP,
    HeadOutput,
    check_output,
    choose_token_set,
    create_head,
    list_heads,
    load_head,
)
from embedkit.recipe import TokenSet

BUILT_IN = (
    "abmil", "conv", "cox", "dsmil", "fusion", "grid", "gridattention", "gru", "linear", "logistic", "mha", "mlp",
    "mtlr", "query", "raptor", "tail", "text", "transformer", "transmil",
)  # fmt: skip


class GoodHead(nn.Module):
    reads: ClassVar[frozenset[str]] = frozenset({"cls"})
    fit_by: ClassVar[str] = "gradient"


class Homeless(nn.Module):
    fit_by = "gradient"


class Undecided(nn.Module):
    reads = frozenset({"cls"})
    fit_by = "magic"


class Unread(nn.Module):
    reads = frozenset({"voxels"})
    fit_by = "gradient"


class Unfitted(nn.Module):
    reads = frozenset({"cls"})
    fit_by = "closed form"


class Disordered(nn.Module):
    reads = frozenset({"cls"})
    fit_by = "gradient"
    slice_order = "any"


@pytest.fixture
def strangers(monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of an importable module that holds the heads above."""
    module = ModuleType("stranger_heads")
    for item in (GoodHead, Homeless, Undecided, Unread, Unfitted, Disordered):
        setattr(module, item.__name__, item)
    module.number = 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


def entry(name: str, value: str, distribution: str = "stranger") -> importlib.metadata.EntryPoint:
    point = importlib.metadata.EntryPoint(name, value, GROUP)
    dist = cast(Any, SimpleNamespace(name=distribution, version="1.0"))
    return point._for(dist)  # type: ignore[attr-defined,no-any-return]


def test_the_built_in_heads_are_installed_under_their_names() -> None:
    found = list_heads()
    assert set(BUILT_IN) <= set(found)
    assert list(found) == sorted(found)
    assert found["grid"].distribution == "embedkit"
    assert load_head("grid").__name__ == "GridHead"  # type: ignore[attr-defined]


def test_a_strangers_head_comes_through_the_same_door(strangers: str) -> None:
    entries = [entry("mine", f"{strangers}:GoodHead")]
    assert load_head("mine", entries) is cast(Any, GoodHead)
    assert list_heads(entries)["mine"].version == "1.0"


def test_an_unknown_head_lists_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(HeadError, match=r"no head is called 'abmill'; did you mean abmil\? installed: abmil, conv"):
        load_head("abmill")
    with pytest.raises(HeadError, match="no head is called 'zzz'; installed: abmil"):
        load_head("zzz")
    with pytest.raises(HeadError, match=r"installed: none \(reinstall embedkit\)"):
        load_head("grid", [])


def test_one_name_from_two_distributions_is_refused_naming_both(strangers: str) -> None:
    twice = [entry("grid", "embedkit.heads.grid:GridHead", "embedkit"), entry("grid", f"{strangers}:GoodHead", "rival")]
    with pytest.raises(HeadError, match=r"'grid' is registered twice, by embedkit \(.*\) and by rival \(.*GoodHead\)"):
        list_heads(twice)
    assert list(list_heads([twice[1], twice[1]])) == ["grid"]


def test_an_entry_point_that_fails_to_import_tells_the_cause() -> None:
    with pytest.raises(HeadError, match="of stranger could not be imported from no_such_module:X: ModuleNotFoundError"):
        load_head("lost", [entry("lost", "no_such_module:X")])
    with pytest.raises(HeadError, match="AttributeError"):
        load_head("lost", [entry("lost", "embedkit.heads.grid:Nothing")])


@pytest.mark.parametrize(
    ("thing", "problem"),
    [
        ("number", "not a subclass of torch.nn.Module"),
        ("Homeless", "its `reads` is None"),
        ("Unread", r"its `reads` is frozenset\(\{'voxels'\}\), expected a frozenset of kinds among cls, patch"),
        ("Undecided", "its `fit_by` is 'magic', expected one of gradient, closed form"),
        ("Disordered", "its `slice_order` is 'any', expected one of free, positions, sequence"),
        ("Unfitted", "lacks `features`, `fit` or `read_out`"),
    ],
)
def test_a_thing_that_is_no_head_is_refused_with_the_reason(strangers: str, thing: str, problem: str) -> None:
    with pytest.raises(HeadError, match=problem):
        load_head("bad", [entry("bad", f"{strangers}:{thing}")])


SHAPE = BagShape({"cls:2": (1, 3), "patch@2:1": (4, 3), "attention:2": (2, 4)}, {"patch@2:1": (2, 2)}, ("t1/axial",))


def test_a_head_is_built_for_the_token_sets_it_is_given() -> None:
    head = create_head("linear", SHAPE, ["cls:2"], 2, options={"dropout": 0.5})
    assert sum(parameter.numel() for parameter in head.parameters()) == 2 * 3 + 2


def test_token_sets_of_a_kind_that_a_head_cannot_read_are_refused() -> None:
    with pytest.raises(HeadError, match="'linear' cannot read attention:2: it reads cls, patch tokens"):
        create_head("linear", SHAPE, ["attention:2"], 1)


def test_an_option_that_a_head_lacks_is_refused_naming_those_it_has() -> None:
    with pytest.raises(HeadError, match=r"'grid' cannot take options \{'depth': 3\}.*it has hidden, width, dropout"):
        create_head("grid", SHAPE, ["patch@2:1"], 1, options={"depth": 3})


def sets(*names: str) -> list[TokenSet]:
    return [TokenSet.parse(name) for name in names]


@pytest.mark.parametrize(
    ("head", "available", "chosen"),
    [
        ("linear", ("cls:4", "cls:12", "patch@4:8"), "cls:12"),
        ("linear", ("patch@4:8", "patch@4:12"), "patch@4:12"),
        ("grid", ("cls:12", "patch@4:4", "patch@4:8", "patch@4:12"), "patch@4:8"),
        ("grid", ("cls:12", "patch@8:8", "patch@4:8", "patch:8"), "patch@4:8"),
        ("grid", ("cls:12",), "cls:12"),
        ("raptor", ("cls:12", "patch:12", "patch@4:12", "patch:8"), "patch:12"),
        ("raptor", ("patch@8:12", "patch@4:12", "cls:12"), "patch@8:12"),
        ("logistic", ("patch@4:8", "cls:12"), "cls:12"),
    ],
)
def test_each_head_takes_the_token_set_that_suits_it(head: str, available: tuple[str, ...], chosen: str) -> None:
    assert str(choose_token_set(head, sets(*available))) == chosen


def test_a_head_that_can_read_nothing_of_a_cache_says_what_it_reads() -> None:
    with pytest.raises(HeadError, match="'grid' reads cls, patch tokens, but the cache holds cut:8; choose another"):
        choose_token_set("grid", sets("cut:8"))
    with pytest.raises(HeadError, match=r"'tail' reads cut tokens, but the cache holds cls:12; .*extract with --cut 4"):
        choose_token_set("tail", sets("cls:12"))


BAG = Bag({}, torch.ones(2, 1, 3, dtype=torch.bool), torch.zeros(2, 1, 3), ("a", "b"))


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        (torch.zeros(2, 1), "Tensor, expected embedkit.plugins.HeadOutput"),
        (HeadOutput(torch.zeros(2)), r"logits of shape \(2,\), expected \(2, 1\)"),
        (HeadOutput(torch.zeros(2, 1), auxiliary_logits=torch.zeros(1)), r"auxiliary_logits of shape \(1,\), expected"),
        (HeadOutput(torch.zeros(2, 1), torch.zeros(2, 3)), r"slice_attention of shape \(2, 3\), expected \(2, 1, 3\)"),
        (HeadOutput(torch.zeros(2, 1), None, torch.zeros(2, 1, 4, 5)), r"token_attention of shape \(2, 1, 4, 5\)"),
    ],
)
def test_an_output_that_breaks_the_contract_is_refused(output: object, problem: str) -> None:
    with pytest.raises(HeadError, match=f"head 'mine' returned {problem}"):
        check_output("mine", output, BAG, 1)


def test_an_output_that_keeps_the_contract_passes() -> None:
    output = HeadOutput(torch.zeros(2, 1), torch.zeros(2, 1, 3), torch.zeros(2, 1, 3, 7))
    assert check_output("mine", output, BAG, 1) is output
