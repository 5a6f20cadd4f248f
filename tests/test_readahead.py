"""Working ahead in threads: order, bounds, errors, and the waits that are counted."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from embedkit.readahead import Waits, read_ahead, run_in_background


def test_results_come_in_order_and_a_raised_error_takes_the_place_of_its_result() -> None:
    def half(number: int) -> int:
        time.sleep(0.01 * (number == 0))
        if number % 2:
            raise ValueError(f"{number} is odd")
        return number // 2

    found = list(read_ahead(half, range(5), workers=3, waits=Waits(), name="all"))
    assert [item for item, _ in found] == [0, 1, 2, 3, 4]
    assert [result for _, result in found if not isinstance(result, Exception)] == [0, 1, 2]
    assert [str(error) for _, error in found if isinstance(error, ValueError)] == ["1 is odd", "3 is odd"]


def test_no_more_is_read_ahead_than_there_are_workers() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(20):
            taken.append(number)
            yield number

    for done, (item, result) in enumerate(
        read_ahead(lambda number: number, items(), workers=3, waits=Waits(), name="")
    ):
        assert item == result == done
        assert len(taken) <= done + 1 + 3


def test_leaving_early_reads_nothing_more() -> None:
    calls: list[int] = []
    results = read_ahead(calls.append, range(100), workers=2, waits=Waits(), name="")
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert len(calls) <= 3


def test_what_a_background_thread_raises_surfaces_where_its_items_are_taken() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise KeyError("gone")

    taken = run_in_background(items(), depth=2, waits=Waits(), taking="t", putting="p")
    assert next(taken) == 1
    with pytest.raises(KeyError, match="gone"):
        next(taken)


def test_leaving_a_background_thread_early_ends_it() -> None:
    produced: list[int] = []

    def items() -> Iterator[int]:
        for number in range(1000):
            produced.append(number)
            yield number

    taken = run_in_background(items(), depth=2, waits=Waits(), taking="t", putting="p")
    next(taken)
    taken.close()  # type: ignore[attr-defined]
    assert len(produced) < 10
    assert not [thread for thread in threading.enumerate() if thread.name == "embedkit-render"]


def test_the_stage_that_holds_up_the_other_is_told_by_the_waits() -> None:
    def slow() -> Iterator[int]:
        for number in range(4):
            time.sleep(0.05)
            yield number

    waits = Waits()
    for _ in run_in_background(slow(), depth=1, waits=waits, taking="taker", putting="maker"):
        pass
    assert waits.seconds["taker"] > 0.15 > waits.seconds["maker"]
    waits = Waits()
    for _ in run_in_background(iter(range(4)), depth=1, waits=waits, taking="taker", putting="maker"):
        time.sleep(0.05)
    assert waits.seconds["maker"] > 0.05 > waits.seconds["taker"]
