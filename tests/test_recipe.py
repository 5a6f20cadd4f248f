"""The recipe: canonical, exact in what it compares, strict in what it reads."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedkit.errors import OptionError, RecipeError
from embedkit.recipe import Recipe, TokenSet, require_same_recipe

RECIPE = Recipe(
    backbone="deit_tiny_patch16_224",
    weights="sha256:00",
    token_sets=("cls:12", "patch@4:8"),
    image_size=224,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)


def test_json_round_trip_gives_an_equal_recipe_and_fingerprint() -> None:
    again = Recipe.from_json(RECIPE.to_json())
    assert again == RECIPE
    assert again.fingerprint == RECIPE.fingerprint
    assert len(RECIPE.fingerprint) == 16


def test_every_field_changes_the_fingerprint() -> None:
    changed = {str: "other", int: 99, tuple: ("other",)}
    for field in dataclasses.fields(Recipe):
        value = changed[type(getattr(RECIPE, field.name))]
        other = dataclasses.replace(RECIPE, **{field.name: value})
        assert other.fingerprint != RECIPE.fingerprint, field.name
        assert list(RECIPE.differences(other)) == [field.name]


def test_recipes_without_copies_are_what_they_were_before_there_were_any() -> None:
    assert RECIPE.fingerprint == "fec75fe0e4edca90"
    assert "augment" not in RECIPE.to_json()
    assert Recipe.from_json(RECIPE.to_json()).augment == ""
    assert (RECIPE.copies, RECIPE.flips, RECIPE.stored_ids("a")) == (0, False, ("a",))


def test_a_recipe_of_copies_says_how_many_and_what_they_are_called() -> None:
    copies = Recipe.from_json(dataclasses.replace(RECIPE, augment="2:flip").to_json())
    assert (copies.copies, copies.flips, copies.stored_ids("a#1")) == (2, True, ("a#1#1", "a#1#2"))
    for wrong in ("0", "2:mirror", "100", "two"):
        text = dataclasses.replace(RECIPE, augment=wrong).to_json()
        with pytest.raises(RecipeError, match=f"augment is '{wrong}', expected N or N:flip"):
            Recipe.from_json(text)


def test_another_recipe_is_refused_with_field_both_values_and_the_ways_out() -> None:
    other = dataclasses.replace(RECIPE, image_size=448)
    with pytest.raises(RecipeError) as caught:
        require_same_recipe(RECIPE, other, where="cache C", ways_out="choose another --out")
    message = str(caught.value)
    assert RECIPE.fingerprint in message and other.fingerprint in message
    assert "image_size is 224 there and 448 here" in message
    assert "choose another --out" in message
    require_same_recipe(RECIPE, Recipe.from_json(RECIPE.to_json()), where="", ways_out="")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_size": "224"}, "image_size is '224', expected int"),
        ({"image_size": True}, "image_size is True, expected int"),
        ({"mean": [0.1, "x"]}, "mean is"),
        ({"token_sets": "cls:12"}, "token_sets is 'cls:12'"),
        ({"colour": 1}, "unknown colour"),
        ({"weights": None}, "weights is None"),
    ],
)
def test_a_field_of_another_type_is_named(change: dict[str, object], words: str) -> None:
    fields = json.loads(RECIPE.to_json()) | change
    with pytest.raises(RecipeError, match=words):
        Recipe.from_json(json.dumps(fields))


def test_a_missing_field_and_text_that_is_not_json_are_refused() -> None:
    fields = json.loads(RECIPE.to_json())
    del fields["crop"]
    with pytest.raises(RecipeError, match="lacks crop"):
        Recipe.from_json(json.dumps(fields))
    with pytest.raises(RecipeError, match="not JSON"):
        Recipe.from_json("{")
    with pytest.raises(RecipeError, match="expected an object"):
        Recipe.from_json("[]")


@given(st.sampled_from(["cls", "patch", "attention", "cut"]), st.integers(0, 999), st.none() | st.integers(1, 999))
def test_token_set_names_read_back_as_written(kind: str, layer: int, grid: int | None) -> None:
    if grid is not None and kind != "patch":
        with pytest.raises(OptionError, match="only patch tokens"):
            TokenSet(kind, layer, grid)  # type: ignore[arg-type]
        return
    token_set = TokenSet(kind, layer, grid)  # type: ignore[arg-type]
    assert TokenSet.parse(str(token_set)) == token_set


@pytest.mark.parametrize("text", ["cls", "patch@0:8", "patch@4", "cls:-1", "mean:3", "cls:1234", "", "cls:1 "])
def test_a_token_set_of_another_form_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(OptionError, match="for example cls:12 or patch@4:8"):
        TokenSet.parse(text)
