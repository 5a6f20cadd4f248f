"""Bags: every slice in its place, blanks and absent views masked, whatever the lengths of the stacks."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedkit.bags import BagStore, bag_shape, list_views, load_bags, stream_bags
from embedkit.errors import CacheError


@dataclass
class MemorySource:
    """A token source of arrays: (case, view) -> cls [slices dim]; patches are the class token plus their number."""

    arrays: dict[tuple[str, str], np.ndarray[Any, Any]]
    blank: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    patches: int = 4
    reads: int = 0

    @property
    def stacks(self) -> pl.DataFrame:
        rows = [
            (number, case, view, "axial", len(array))
            for number, ((case, view), array) in enumerate(self.arrays.items())
        ]
        return pl.DataFrame(rows, ["stack", "case_id", "view", "plane", "count"], orient="row")

    @property
    def token_sets(self) -> dict[str, Any]:
        dim = next(iter(self.arrays.values())).shape[1]
        return {"cls:2": SimpleNamespace(shape=(dim,)), "patch@2:1": SimpleNamespace(shape=(self.patches, dim))}

    def read(self, stack: int, token_set: str) -> np.ndarray[Any, Any]:
        self.reads += 1
        array = list(self.arrays.values())[stack].astype(np.float16)
        if token_set == "cls:2":
            return array
        return array[:, None] + np.arange(self.patches, dtype=np.float16)[:, None]

    def slices(self, stack: int) -> Any:
        key = list(self.arrays)[stack]
        count = len(self.arrays[key])
        blank = np.isin(np.arange(count), self.blank.get(key, []))
        return SimpleNamespace(positions_mm=np.arange(count, dtype=np.float32) * 2 + 10, blank=blank)


def filled(slices: int, value: float, dim: int = 3) -> np.ndarray[Any, Any]:
    """[slices dim] holding value + slice number."""
    return np.full((slices, dim), value) + np.arange(slices)[:, None]


SOURCE = MemorySource(
    {("b", "flair"): filled(3, 100), ("a", "flair"): filled(2, 200), ("a", "pre"): filled(1, 300)},
    {("b", "flair"): [1]},
)


def load(source: MemorySource = SOURCE, case_ids: tuple[str, ...] = ("a", "b")) -> BagStore:
    return load_bags(source, case_ids, ["cls:2", "patch@2:1"])


def test_tokens_mask_and_positions_stand_where_they_belong() -> None:
    bag = load().batch([1, 0])
    assert bag.case_ids == ("b", "a")
    assert bag.tokens["cls:2"].shape == (2, 2, 3, 1, 3)
    assert bag.tokens["cls:2"].dtype == torch.float16
    assert bag.mask.tolist() == [
        [[True, False, True], [False, False, False]],
        [[True, True, False], [True, False, False]],
    ]
    assert bag.tokens["cls:2"][:, :, :, 0, 0].tolist() == [[[100, 0, 102], [0, 0, 0]], [[200, 201, 0], [300, 0, 0]]]
    assert bag.tokens["patch@2:1"][1, 0, 1, :, 0].tolist() == [201, 202, 203, 204]
    assert bag.positions[0, 0].tolist() == [0, 0.5, 1]
    assert bag.positions[1, :, 0].tolist() == [0, 0.5]


def test_a_blank_slice_is_masked_and_its_tokens_are_zero_even_if_it_had_some() -> None:
    bag = load().batch([1])
    assert not bag.mask[0, 0, 1]
    assert (bag.tokens["patch@2:1"][0, 0, 1] == 0).all()


def test_the_slices_axis_is_only_as_long_as_the_batch_needs() -> None:
    store = load()
    assert store.batch([0]).mask.shape == (1, 2, 2)
    assert store.batch([1]).mask.shape == (1, 2, 3)
    blank_at_end = MemorySource({("a", "t1"): filled(4, 0)}, {("a", "t1"): [2, 3]})
    assert load_bags(blank_at_end, ["a"], ["cls:2"]).batch([0]).mask.tolist() == [[[True, True]]]


def test_a_case_without_any_stack_or_with_blank_slices_alone_is_masked_throughout() -> None:
    source = MemorySource({("a", "t1"): filled(2, 1)}, {("a", "t1"): [0, 1]})
    store = load_bags(source, ["a", "nobody"], ["cls:2"])
    bag = store.batch([0, 1])
    assert not bag.mask.any()
    assert (bag.tokens["cls:2"] == 0).all()
    assert bag.mask.shape == (2, 1, 1)


def test_the_shape_names_views_grids_and_sizes() -> None:
    shape = bag_shape(SOURCE, ["cls:2", "patch@2:1"])
    assert shape.views == ("flair/axial", "pre/axial") == list_views(SOURCE)
    assert shape.token_sets == {"cls:2": (1, 3), "patch@2:1": (4, 3)}
    assert shape.grids == {"patch@2:1": (2, 2)}
    assert shape.select(["cls:2"]).token_sets == {"cls:2": (1, 3)}
    assert bag_shape(MemorySource(SOURCE.arrays, patches=6), ["patch@2:1"]).grids == {"patch@2:1": (1, 6)}


def test_views_can_be_chosen_and_ordered() -> None:
    store = load_bags(SOURCE, ["a"], ["cls:2"], views=["pre/axial", "t2/axial"])
    bag = store.batch([0])
    assert bag.tokens["cls:2"][0, :, 0, 0, 0].tolist() == [300, 0]
    assert bag.mask[0, :, 0].tolist() == [True, False]


def test_an_absent_token_set_is_named_beside_those_that_there_are() -> None:
    with pytest.raises(CacheError, match=r"patch@4:8 is not in the cache, which holds cls:2, patch@2:1; choose among"):
        load_bags(SOURCE, ["a"], ["patch@4:8"])


def test_only_the_token_sets_asked_for_are_gathered() -> None:
    assert list(load().batch([0], ["cls:2"]).tokens) == ["cls:2"]


def test_segments_name_the_case_and_view_of_every_row_and_leave_out_blanks() -> None:
    store = load()
    values = store.table("cls:2")[:, 0, 0].tolist()
    found = dict(zip(values, store.segments().tolist(), strict=True))
    assert found == {100: 2, 101: -1, 102: 2, 200: 0, 201: 0, 300: 1}


def test_batches_cover_every_case_once_and_are_alike_in_length() -> None:
    source = MemorySource({(f"c{n}", "t1"): filled(1 + n % 7, n) for n in range(40)})
    store = load_bags(source, [f"c{n}" for n in range(40)], ["cls:2"])
    cases = list(range(0, 40, 2))
    for generator in (None, torch.Generator().manual_seed(0)):
        parts = list(store.batches(cases, 6, generator=generator))
        assert sorted(torch.cat(parts).tolist()) == list(range(20))
        assert all(len(part) <= 6 for part in parts)
        padded = sum(store.batch(torch.tensor(cases)[part]).mask.numel() for part in parts)
        assert padded < 1.35 * sum(1 + n % 7 for n in cases)
    first, second = (
        [part.tolist() for part in store.batches(cases, 6, generator=torch.Generator().manual_seed(seed))]
        for seed in (1, 2)
    )
    assert first != second


def test_streaming_gives_the_same_bags_in_bounded_pieces() -> None:
    source = MemorySource({(f"c{n}", "t1"): filled(1 + n % 5, n) for n in range(20)})
    ids = [f"c{n}" for n in range(20)]
    whole = load_bags(source, ids, ["cls:2"])
    pieces = list(stream_bags(source, ids, ["cls:2"], chunk_bytes=100))
    assert [case for piece in pieces for case in piece.case_ids] == ids
    assert len(pieces) > 5
    assert all(piece.tokens["cls:2"].nbytes <= 100 for piece in pieces)
    for number, case in enumerate(ids):
        piece = next(piece for piece in pieces if case in piece.case_ids)
        row = piece.case_ids.index(case)
        expected = whole.batch([number])
        slices = expected.mask.shape[2]
        assert torch.equal(piece.tokens["cls:2"][row, :, :slices], expected.tokens["cls:2"][0])
        assert not piece.mask[row, :, slices:].any()
    assert list(stream_bags(source, [], ["cls:2"])) == []


def test_every_stack_is_read_once_per_token_set() -> None:
    source = MemorySource(SOURCE.arrays)
    store = load(source)
    for _ in range(3):
        store.batch([0, 1])
    assert source.reads == 6


def test_a_bag_changes_dtype_but_keeps_its_mask() -> None:
    bag = load().batch([0]).to(dtype=torch.bfloat16)
    assert bag.tokens["cls:2"].dtype == bag.positions.dtype == torch.bfloat16
    assert bag.mask.dtype == torch.bool


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=5), st.randoms())
def test_any_ragged_set_of_stacks_comes_back_slice_by_slice(stacks: list[list[bool]], shuffle: Any) -> None:
    arrays = {(f"c{n}", "t1"): filled(len(blank), 10 * n + 1) for n, blank in enumerate(stacks)}
    blank = {(f"c{n}", "t1"): [i for i, empty in enumerate(flags) if empty] for n, flags in enumerate(stacks)}
    store = load_bags(MemorySource(arrays, blank), [case for case, _ in arrays], ["cls:2"])
    order = list(range(len(stacks)))
    shuffle.shuffle(order)
    bag = store.batch(order)
    for row, case in enumerate(order):
        real = [10 * case + 1 + number for number, empty in enumerate(stacks[case]) if not empty]
        assert bag.tokens["cls:2"][row, 0, :, 0, 0][bag.mask[row, 0]].tolist() == real
    assert (bag.tokens["cls:2"][~bag.mask] == 0).all()
