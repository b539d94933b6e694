"""The page itself: what it promises about its blocks. Needs none of the frameworks."""

from __future__ import annotations

import pytest

from tests.trainers.recipes import Recipe, recipes

RECIPES = recipes()
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def test_the_page_has_every_trainer() -> None:
    assert len(RECIPES) >= 14


@every_recipe
def test_a_trainer_takes_at_most_five_changed_lines(recipe: Recipe) -> None:
    assert 1 <= recipe.added <= 5


@every_recipe
def test_both_sides_of_the_diff_are_programs(recipe: Recipe) -> None:
    assert all(line[:1] in (" ", "+", "-") for line in recipe.lines), "a line without a mark would be lost"
    assert "taskloss" not in recipe.source("-")
    assert "taskloss" in recipe.source("+")
    for mark in "-+":
        compile(recipe.source(mark), recipe.name, "exec")
