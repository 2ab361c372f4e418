"""The recipe: the published values, names that keep runs apart, and values that are refused."""

import json
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memcnn.training.recipe import PUBLISHED, RECIPES, SMOKE, Recipe, override

numbers = st.floats(0, 0.99)
CHANGES = {
    "batch_size": st.integers(1, 500),
    "iterations": st.integers(1, 100_000),
    "learning_rate": numbers,
    "milestones": st.lists(st.integers(1, 10**6), max_size=4, unique=True).map(lambda some: tuple(sorted(some))),
    "decay": numbers,
    "momentum": numbers,
    "weight_decay": numbers,
    "pad": st.integers(0, 8),
    "flip": st.booleans(),
    "evaluate_every": st.integers(1, 1000),
    "test_images": st.none() | st.integers(1, 10_000),
}
changes = st.fixed_dictionaries({}, optional=CHANGES)


def test_the_published_recipe_is_the_published_one():
    # 160 epochs of 500 iterations; learning rate 0.1, 0.01, 0.001
    assert PUBLISHED.iterations * PUBLISHED.batch_size == 160 * 50_000
    rates = [PUBLISHED.learning_rate_after(done) for done in (0, 39_999, 40_000, 59_999, 60_000, 79_999)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert (PUBLISHED.momentum, PUBLISHED.weight_decay, PUBLISHED.pad, PUBLISHED.flip) == (0.9, 2e-4, 2, True)
    assert PUBLISHED.test_images is None


def test_a_smoke_run_evaluates_twice():
    assert SMOKE.iterations == 2 * SMOKE.evaluate_every


def test_every_hyper_parameter_has_a_strategy():
    assert {field.name for field in fields(Recipe)} == {"name", *CHANGES}


@given(base=st.sampled_from(list(RECIPES.values())), first=changes, second=changes)
def test_two_recipes_have_the_same_name_only_if_they_are_the_same(base, first, second):
    one, two = override(base, **first), override(base, **second)
    assert (one.name == two.name) == (one == two)
    assert one.name.startswith(base.name)
    assert "/" not in one.name and " " not in one.name


@given(base=st.sampled_from(list(RECIPES.values())), first=changes, second=changes)
def test_changes_in_two_steps_are_named_like_changes_in_one(base, first, second):
    assert override(override(base, **first), **second) == override(base, **{**first, **second})


def test_the_name_lists_the_changed_fields_in_order():
    assert override(PUBLISHED, iterations=1500).name == "published-iterations=1500"
    changed = override(PUBLISHED, test_images=100, milestones=(5, 6), flip=False)
    assert changed.name == "published-milestones=5+6-flip=false-test_images=100"
    assert override(PUBLISHED, iterations=80_000) == PUBLISHED


@given(base=st.sampled_from(list(RECIPES.values())), some=changes)
def test_a_recipe_survives_json(base, some):
    recipe = override(base, **some)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@given(some=changes, done=st.integers(0, 10**6))
def test_the_learning_rate_drops_once_for_each_milestone_passed(some, done):
    recipe = override(PUBLISHED, **some)
    expected = recipe.learning_rate
    for milestone in recipe.milestones:
        if done >= milestone:
            expected *= recipe.decay
    assert recipe.learning_rate_after(done) == pytest.approx(expected)


BAD = [
    ("name", "a/b"), ("name", ""), ("batch_size", 0), ("batch_size", 1.5), ("iterations", -1), ("iterations", True),
    ("learning_rate", -0.1), ("learning_rate", float("nan")), ("learning_rate", float("inf")), ("learning_rate", "0.1"),
    ("milestones", (3, 2)), ("milestones", (3, 3)), ("milestones", (0,)), ("milestones", (1.5,)), ("decay", -1),
    ("momentum", 1), ("weight_decay", None), ("pad", -1), ("flip", 1), ("evaluate_every", 0), ("test_images", 0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        replace(PUBLISHED, **{name: value})


def test_a_missing_or_unknown_field_is_refused_by_name():
    values = PUBLISHED.to_dict()
    with pytest.raises(ValueError, match="nesterov"):
        Recipe.from_dict({**values, "nesterov": True})
    del values["momentum"]
    with pytest.raises(ValueError, match="momentum"):
        Recipe.from_dict(values)
