"""Tests of int8 tokens: what is restored is near what was there, the same everywhere, finite, and of the size told."""

from __future__ import annotations

import errno
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from embedkit.cache import StackTokens, check_stack, create_cache, open_cache, write_shard
from embedkit.errors import CacheError, OptionError
from embedkit.features import BackboneInfo
from embedkit.quantisation import (
    QuantisedTokens,
    bytes_per_slice,
    bytes_per_stack,
    dequantise_tokens,
    quantise_tokens,
    token_set_bytes,
)
from embedkit.recipe import Recipe, TokenSet
from embedkit.spill import allocate_spilled

INFO = BackboneInfo(
    "vit",
    "builtin:1",
    224,
    (0.5,),
    (0.5,),
    depth=2,
    dims=(384, 384),
    grids=((16, 16), (16, 16)),
    class_tokens=1,
    register_tokens=4,
    attention_heads=6,
    has_tail=True,
)
finite = st.floats(-65504, 65504, width=16, allow_nan=False, allow_infinity=False)


def restore(stored: QuantisedTokens) -> Any:
    return dequantise_tokens(stored.values, stored.scales, stored.channels, what="stack 0")


def shown(tokens: Any) -> Any:
    return np.zeros(len(tokens), bool)


def residual_stream(slices: int = 12, patches: int = 49, dim: int = 192) -> Any:
    """Tokens as a transformer has them: channels far from zero, a few channels huge, a few tokens of huge norm."""
    random = np.random.default_rng(4)
    tokens = random.standard_normal((slices, patches, dim)) + random.standard_normal(dim) * 3
    tokens[..., 7] *= 40
    tokens[..., 11] += 120
    tokens[:, 5, [3, 60, 90]] += 200
    return tokens.astype(np.float16)


def relative_error(restored: Any, tokens: Any) -> float:
    return float(np.linalg.norm(restored.astype(float) - tokens.astype(float)) / np.linalg.norm(tokens.astype(float)))


# --- how near --------------------------------------------------------------------------------------------------------


def test_outlier_channels_and_tokens_cost_the_others_nothing() -> None:
    tokens = residual_stream()
    restored = restore(quantise_tokens(tokens, shown(tokens)))
    ordinary = np.ones(tokens.shape[1:], bool)
    ordinary[5] = False
    ordinary[:, [7, 11, 3, 60, 90]] = False
    wrong = (restored.astype(float) - tokens.astype(float))[:, ordinary]
    assert np.sqrt((wrong**2).mean()) < 0.012  # their spread is 1
    plain = np.abs(tokens.astype(float)).max(-1, keepdims=True) / 127  # one scale per token and nothing else
    assert np.sqrt(((np.rint(tokens / plain) * plain - tokens.astype(float))[:, ordinary] ** 2).mean()) > 0.2
    assert relative_error(restored, tokens) < 0.005


def test_a_rare_value_costs_its_own_token_little() -> None:
    tokens = np.random.default_rng(1).standard_normal((40, 25, 32)).astype(np.float16)
    tokens[..., 3] = 0
    tokens[6, 7, 3] = 5  # the only time that this channel speaks
    restored = restore(quantise_tokens(tokens, shown(tokens)))
    assert abs(float(restored[6, 7, 3]) - 5) < 0.05
    assert np.abs(restored[6, 7].astype(float) - tokens[6, 7].astype(float)).max() < 0.06


def test_attention_keeps_its_small_values() -> None:
    logits = np.random.default_rng(2).standard_normal((10, 3, 196)) * 3
    attention = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).astype(np.float16)
    assert relative_error(restore(quantise_tokens(attention, shown(attention))), attention) < 0.02


@settings(max_examples=150, deadline=None)
@given(tokens=arrays(np.float16, st.tuples(*[st.integers(1, 5)] * 3), elements=finite))
def test_any_finite_tokens_come_back_finite_and_within_half_a_step(tokens: Any) -> None:
    stored = quantise_tokens(tokens, shown(tokens))
    restored = restore(stored)
    assert restored.dtype == np.float16 and restored.shape == tokens.shape and np.isfinite(restored).all()
    step = stored.scales[..., None].astype(float) * stored.channels[1].astype(float)
    rounding = 2.0**-11 * np.abs(restored.astype(float)) + 2.0**-24
    centre = np.abs(stored.channels[0].astype(float)) * 1e-6
    assert (np.abs(restored.astype(float) - tokens.astype(float)) <= step * 0.5001 + rounding + centre).all()


@pytest.mark.parametrize("shape", [(1, 6), (4, 1, 6)])
def test_channels_that_do_not_vary_are_exact(shape: tuple[int, ...]) -> None:
    tokens = np.broadcast_to(np.array([0, 1.5, -65504, 65504, 6e-8, 0.1], np.float16), shape)
    assert np.array_equal(restore(quantise_tokens(tokens, shown(tokens))), tokens)


def test_what_is_stored_is_as_the_format_says() -> None:
    tokens = residual_stream(3, 7, 100)
    stored = quantise_tokens(tokens, shown(tokens))
    assert (stored.values.dtype, stored.values.shape) == (np.int8, (3, 7, 100)) and stored.values.min() >= -127
    assert (stored.scales.dtype, stored.scales.shape) == (np.float32, (3, 7))
    assert (stored.channels.dtype, stored.channels.shape) == (np.float16, (2, 100))
    assert np.array_equal(stored.channels[0], tokens.reshape(-1, 100).astype(float).mean(0).astype(np.float16))
    assert (np.abs(stored.values).max(-1) == 127).all()


# --- the same everywhere ---------------------------------------------------------------------------------------------


def test_restoring_is_what_the_format_document_says_bit_by_bit() -> None:
    tokens = residual_stream()
    stored = quantise_tokens(tokens, shown(tokens))
    centre, scale = stored.channels.astype(np.float32)
    plain = stored.values.astype(np.float32) * stored.scales[..., None] * scale + centre
    assert np.array_equal(restore(stored), plain.clip(-65504, 65504).astype(np.float16))


def test_any_part_of_a_stack_is_restored_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = residual_stream()
    stored = quantise_tokens(tokens, shown(tokens))
    whole = restore(stored)
    for part in (slice(0, 1), slice(5, 11)):
        some = QuantisedTokens(stored.values[part], stored.scales[part], stored.channels)
        assert np.array_equal(restore(some), whole[part])
    monkeypatch.setattr("embedkit.quantisation._BLOCK", 1000)  # many blocks, the last one short
    assert np.array_equal(restore(stored), whole)


def test_the_number_of_threads_and_the_blocks_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = residual_stream(40)
    threads = torch.get_num_threads()
    found = []
    try:
        for count, block in ((1, 1 << 18), (2, 1 << 18), (2, 5000)):
            torch.set_num_threads(count)
            monkeypatch.setattr("embedkit.quantisation._BLOCK", block)
            found.append(quantise_tokens(tokens, shown(tokens)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert np.array_equal(found[0].values, other.values)
        assert np.array_equal(found[0].scales, other.scales)
        assert np.array_equal(found[0].channels, other.channels)


def test_blank_slices_change_nothing_in_the_others() -> None:
    tokens = residual_stream(6)
    blank = np.array([True, False, False, True, False, False])
    with_zeros, with_noise = tokens.copy(), tokens.copy()
    with_zeros[blank] = 0
    with_noise[blank] = 30000
    first, second = (quantise_tokens(each, blank) for each in (with_zeros, with_noise))
    assert np.array_equal(first.channels, second.channels)
    assert np.array_equal(first.values[~blank], second.values[~blank])
    assert np.array_equal(first.scales[~blank], second.scales[~blank])
    assert relative_error(restore(second)[blank], with_noise[blank]) < 0.01
    only_blank = quantise_tokens(tokens, np.ones(6, bool))
    assert np.array_equal(only_blank.values, quantise_tokens(tokens, np.zeros(6, bool)).values)


def test_tokens_that_cannot_be_written_to_are_taken() -> None:
    tokens = residual_stream(3)
    tokens.flags.writeable = False
    stored = quantise_tokens(tokens, shown(tokens))
    for part in (stored.values, stored.scales, stored.channels):
        part.flags.writeable = False
    assert relative_error(restore(stored), tokens) < 0.01


def moments_of_a_copy(tokens: Any, blank: Any, block: int) -> tuple[Any, Any]:
    """Centre and scale of each channel, from a copy of what is shown cut into blocks of so many values."""
    rows = torch.from_numpy(tokens[~blank].reshape(-1, tokens.shape[-1])).float()
    parts = rows.split(max(1, block // tokens.shape[-1]))
    centre = sum(part.sum(0, dtype=torch.float64) for part in parts) / len(rows)
    centre = centre.half().float()
    mean = sum((part - centre).abs().sum(0, dtype=torch.float64) for part in parts) / len(rows)
    largest = (rows - centre).abs().amax(0).double()
    spread = torch.maximum(mean, largest / 16).clamp(2.0**-24, 65504.0)
    return centre.half().numpy(), torch.where(largest > 0, spread, 1.0).half().numpy()


@pytest.mark.parametrize("block", [1, 700, 5000, 1 << 18])
@pytest.mark.parametrize("shape", [(12, 49, 32), (40, 32)])
def test_centre_and_scale_are_those_of_the_shown_slices_alone_bit_by_bit(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], block: int
) -> None:
    monkeypatch.setattr("embedkit.quantisation._BLOCK", block)
    tokens = (np.random.default_rng(5).standard_normal(shape) * 3 + 1).astype(np.float16)
    blank = np.random.default_rng(6).random(len(tokens)) < 0.4
    centre, spread = quantise_tokens(tokens, blank).channels
    expected_centre, expected_spread = moments_of_a_copy(tokens, blank, block)
    assert blank.any() and np.array_equal(centre, expected_centre) and np.array_equal(spread, expected_spread)


# --- huge stacks -----------------------------------------------------------------------------------------------------


def test_values_go_where_the_caller_says() -> None:
    tokens = residual_stream(3)
    place = np.zeros(tokens.shape, np.int8)
    asked: list[tuple[int, ...]] = []

    def allocate(shape: tuple[int, ...]) -> Any:
        asked.append(shape)
        return place

    stored = quantise_tokens(tokens, shown(tokens), allocate=allocate)
    assert asked == [tokens.shape] and stored.values is place
    assert np.array_equal(place, quantise_tokens(tokens, shown(tokens)).values)


def spilled_stack(folder: Path, slices: int, dim: int) -> StackTokens:
    """A stack whose tokens are in a nameless file, every second slice blank."""
    tokens = allocate_spilled((slices, dim), np.float16, folder)
    tokens[:] = np.random.default_rng(7).standard_normal((slices, dim))
    places = np.arange(slices)
    return StackTokens(
        case_id="a",
        patient_id="a",
        view="image",
        plane="axial",
        sources=("image",),
        indices=places.astype(np.int32),
        positions_mm=places.astype(np.float32),
        blank=places % 2 == 0,
        plane_shape=(8, 8),
        box=(0, 0, 8, 8),
        source_shape=(slices, 8, 8),
        source_affine=np.eye(4),
        source_bytes=1,
        source_digest="d",
        tokens={"cls:2": tokens},
    )


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_stack_kept_in_a_file_is_written_without_coming_back_into_memory(tmp_path: Path, dtype: str) -> None:
    recipe = Recipe("toy", "builtin:1", ("cls:2",), 32, (0.5,), (0.25,), preview=0, dtype=dtype)
    create_cache(tmp_path / "cache", recipe)
    stack = spilled_stack(tmp_path, 8000, 2000)
    tracemalloc.start()
    write_shard(tmp_path / "cache", recipe, [stack])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < stack.tokens["cls:2"].nbytes / 8
    tokens, plain = stack.tokens["cls:2"], np.array(stack.tokens["cls:2"])
    expected = plain if dtype == "float16" else restore(quantise_tokens(plain, stack.blank))
    assert type(plain) is np.ndarray and isinstance(tokens, np.memmap)
    assert np.array_equal(open_cache(tmp_path / "cache").read(0, "cls:2"), expected)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["recipe.json", "shards"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [(0, 0), (399, 1999), (200, 7)])
def test_one_value_that_is_no_number_is_found_wherever_it_is(tmp_path: Path, at: tuple[int, int], value: float) -> None:
    recipe = Recipe("toy", "builtin:1", ("cls:2",), 32, (0.5,), (0.25,), preview=0)
    stack = spilled_stack(tmp_path, 400, 2000)
    check_stack(stack, recipe)
    stack.tokens["cls:2"][at] = value
    with pytest.raises(CacheError, match="cls:2 holds NaN or a value beyond float16"):
        check_stack(stack, recipe)


def test_a_nameless_file_holds_zeros_and_takes_room_only_while_it_is_used(tmp_path: Path) -> None:
    array = allocate_spilled((3, 5, 7), np.int8, tmp_path)
    assert (array.dtype, array.shape) == (np.int8, (3, 5, 7)) and not array.any() and array.flags.c_contiguous
    array[1, 2, 3] = 9
    assert array.sum() == 9 and list(tmp_path.iterdir()) == []


def test_no_room_for_a_nameless_file_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(CacheError, match=r"cannot keep 3 MiB of tokens of one stack: .*gone: No such file"):
        allocate_spilled((3 << 20,), np.int8, tmp_path / "gone")
    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(CacheError, match=r"cannot keep 2 MiB of tokens of one stack: .* is full; free some space"):
        allocate_spilled((1 << 20,), np.float16, tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- what is damaged -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0])
def test_a_token_scale_that_is_no_size_is_refused(value: float) -> None:
    stored = quantise_tokens(residual_stream(3), np.zeros(3, bool))
    stored.scales[1, 2] = value
    with pytest.raises(
        CacheError, match="stack 0 is damaged: a token scale is NaN, infinite or negative; run embedkit"
    ):
        restore(stored)


@pytest.mark.parametrize(
    ("row", "value"), [(0, np.nan), (0, np.inf), (0, -np.inf), (1, np.nan), (1, np.inf), (1, -1), (1, 0)]
)
def test_a_channel_whose_centre_or_scale_is_none_is_refused(row: int, value: float) -> None:
    stored = quantise_tokens(residual_stream(3), np.zeros(3, bool))
    stored.channels[row, 9] = value
    with pytest.raises(CacheError, match="stack 0 is damaged: a channel's centre or scale is NaN or infinite, or its"):
        restore(stored)


def test_scales_that_lead_out_of_float16_are_held_within_it() -> None:
    values = np.array([[127, -128, 0, 1]], np.int8)
    channels = np.array([[0, 0, -60000, 5], [65504, 65504, 65504, 6e-8]], np.float16)
    restored = dequantise_tokens(values, np.array([3e38], np.float32), channels, what="x")
    assert restored.tolist() == [[65504, -65504, -60000, 65504]]
    assert dequantise_tokens(values, np.array([0], np.float32), channels, what="x").tolist() == [[0, 0, -60000, 5]]


# --- how many bytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token_set", "float16", "int8"),
    [
        (TokenSet("cls", 2), 768, 388),
        (TokenSet("patch", 1), 196608, 99328),
        (TokenSet("patch", 1, 7), 37632, 19012),
        (TokenSet("attention", 2), 3072, 1560),
        (TokenSet("cut", 1), 200448, 101268),
    ],
)
def test_bytes_per_slice_of_each_token_set(token_set: TokenSet, float16: int, int8: int) -> None:
    assert token_set_bytes(token_set, INFO, dtype="float16") == float16
    assert token_set_bytes(token_set, INFO, dtype="int8") == int8


@pytest.mark.parametrize("dim", [192, 384, 768])
@pytest.mark.parametrize(("patches", "slices"), [(16, 8), (49, 3), (196, 1)])
def test_patch_tokens_take_at_most_53_percent(dim: int, patches: int, slices: int) -> None:
    stored = quantise_tokens(np.zeros((slices, patches, dim), np.float16), np.zeros(slices, bool))
    size = stored.values.nbytes + stored.scales.nbytes + stored.channels.nbytes
    assert size == slices * bytes_per_slice((patches, dim), "int8") + bytes_per_stack((patches, dim), "int8")
    assert size <= 0.53 * slices * bytes_per_slice((patches, dim), "float16")
    assert bytes_per_stack((patches, dim), "float16") == 0


def test_an_unknown_dtype_is_refused() -> None:
    for count in (bytes_per_slice, bytes_per_stack):
        with pytest.raises(OptionError, match="dtype 'int4' is unknown; expected one of float16, int8"):
            count((3,), "int4")


# --- end to end ------------------------------------------------------------------------------------------------------


def test_an_int8_extraction_is_near_the_float16_one_and_takes_half(tmp_path: Path) -> None:
    from embedkit.extraction import extract

    grey = np.random.default_rng(3).normal(100, 30, (8, 24, 24)).astype(np.float32)
    np.save(tmp_path / "a.npy", np.clip(grey, 0, None))
    (tmp_path / "cases.csv").write_text("case_id,path\na,a.npy\n")
    for dtype in ("float16", "int8"):
        extract(tmp_path / "cases.csv", tmp_path / dtype, backbone="embedkit/scattering", image_size=64, dtype=dtype)
    full, small = open_cache(tmp_path / "float16"), open_cache(tmp_path / "int8")
    assert len(full) == len(small) > 0 and small.recipe.dtype == "int8"
    for stack in range(len(full)):
        keep = ~full.slices(stack).blank
        for name in full.token_sets:
            assert relative_error(small.read(stack, name)[keep], full.read(stack, name)[keep]) < 0.01
    sizes = [
        sum(place.bytes for shard in each.shards for name, place in shard.arrays.items() if "patch" in name)
        for each in (full, small)
    ]
    assert 0.5 < sizes[1] / sizes[0] < 0.53
