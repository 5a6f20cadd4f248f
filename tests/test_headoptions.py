"""Options of heads as they are typed: of the type of the default, or refused with what was expected."""

from __future__ import annotations

import pytest

from embedkit.errors import HeadError, OptionError
from embedkit.headoptions import parse_head_options


def test_values_take_the_type_of_the_heads_default() -> None:
    typed = ["grid.width=32", "grid.dropout=0", "text.texts=a=b", "text.texts=c", "gridattention.places=sines"]
    assert parse_head_options(typed) == {
        "grid": {"width": 32, "dropout": 0.0},
        "text": {"texts": ("a=b", "c")},
        "gridattention": {"places": "sines"},
    }


@pytest.mark.parametrize(
    ("typed", "problem"),
    [
        (["grid"], "'grid' is not of the form HEAD.NAME=VALUE, for example grid.width=32"),
        (["width=3"], "'width=3' is not of the form"),
        (["grid.depth=3"], "head 'grid' has no option 'depth'; it has hidden, width, dropout"),
        (["grid.width=wide"], "grid.width is 'wide', expected a whole number"),
        (["grid.dropout=much"], "grid.dropout is 'much', expected a number"),
        (["grid.width=3", "grid.width=4"], "grid.width was given twice"),
    ],
)
def test_what_is_no_option_is_refused(typed: list[str], problem: str) -> None:
    with pytest.raises(OptionError, match=problem):
        parse_head_options(typed)


def test_an_unknown_head_is_refused() -> None:
    with pytest.raises(HeadError, match="no head is called 'gird'; did you mean grid"):
        parse_head_options(["gird.width=3"])
