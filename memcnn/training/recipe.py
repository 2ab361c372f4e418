"""The recipe: everything that decides what a training run computes, apart from model, data set and seed."""

import math
import re
from dataclasses import asdict, dataclass, fields, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """SGD with a stepped learning rate on cropped and mirrored images.

    Test images are never augmented.

    Attributes:
        name: name of the recipe, which becomes part of the run's name.
        batch_size: images of an iteration (one update of the weights).
        iterations: number of updates.
        learning_rate: learning rate before the first milestone.
        milestones: iterations after which the learning rate is multiplied by ``decay``.
        decay: factor on the learning rate at a milestone.
        momentum: momentum of SGD.
        weight_decay: L2 penalty, on every parameter.
        pad: pixels of padding on each side of a training image, before a random crop to the original size.
        flip: mirror training images at random.
        evaluate_every: iterations between two evaluations; there is one after the last iteration, too.
        test_images: how many test images to evaluate on, from the first; None for all.
    Raises:
        ValueError: a value is out of range.
    """

    name: str
    batch_size: int
    iterations: int
    learning_rate: float
    milestones: tuple[int, ...]
    decay: float
    momentum: float
    weight_decay: float
    pad: int
    flip: bool
    evaluate_every: int
    test_images: int | None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[\w.=+-]+", self.name, re.ASCII):
            raise ValueError(f"recipe name: got {self.name!r}, wanted letters, digits and . _ = + - (a folder's name)")
        for name in ("batch_size", "iterations", "evaluate_every"):
            _check_integer(name, getattr(self, name), least=1)
        _check_integer("pad", self.pad, least=0)
        if self.test_images is not None:
            _check_integer("test_images", self.test_images, least=1)
        if not isinstance(self.flip, bool):
            raise ValueError(f"flip: got {self.flip!r}, wanted True or False")
        for name in ("learning_rate", "decay", "momentum", "weight_decay"):
            value, limit = getattr(self, name), 1 if name == "momentum" else math.inf
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < limit:
                raise ValueError(f"{name}: got {value!r}, wanted a number from 0 up to, but not including, {limit}")
        object.__setattr__(self, "milestones", tuple(self.milestones))
        for milestone in self.milestones:
            _check_integer("milestones", milestone, least=1)
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones: got {self.milestones}, wanted ascending iterations, each once")

    def learning_rate_after(self, iterations: int) -> float:
        """Return the learning rate of the update that follows ``iterations`` updates."""
        return self.learning_rate * self.decay ** sum(milestone <= iterations for milestone in self.milestones)

    def to_dict(self) -> dict:
        """Return the recipe as JSON holds it."""
        return {**asdict(self), "milestones": list(self.milestones)}

    @classmethod
    def from_dict(cls, values: dict) -> "Recipe":
        """Return the recipe in a dict; raise ValueError if a field is missing, unknown or out of range."""
        wanted = {field.name for field in fields(cls)}
        if set(values) != wanted:
            missing, unknown = sorted(wanted - set(values)), sorted(set(values) - wanted)
            raise ValueError(f"recipe: missing fields {missing}, unknown fields {unknown}")
        if not isinstance(values["milestones"], (list, tuple)):
            raise ValueError(f"milestones: got {values['milestones']!r}, wanted a list of iterations")
        return cls(**values)


def _check_integer(name: str, value: object, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: got {value!r}, wanted a whole number of at least {least}")


PUBLISHED = Recipe(
    name="published",
    batch_size=100,
    iterations=80_000,
    learning_rate=0.1,
    milestones=(40_000, 60_000),
    decay=0.1,
    momentum=0.9,
    weight_decay=2e-4,
    pad=2,
    flip=True,
    evaluate_every=500,
    test_images=None,
)

SMOKE = replace(  # takes seconds: shows that everything works, measures nothing
    PUBLISHED, name="smoke", batch_size=10, iterations=12, milestones=(6, 9), evaluate_every=6, test_images=100
)

RECIPES = {"published": PUBLISHED, "smoke": SMOKE}


def override(recipe: Recipe, **changes: Any) -> Recipe:
    """Return the recipe with other values, and a name that lists them: "published-iterations=1500".

    The name lists all differences from a recipe in ``RECIPES``, so that different recipes have different folders.
    """
    base = RECIPES.get(recipe.name.partition("-")[0], recipe)
    changed = replace(recipe, **changes)
    words = [
        f"{field.name}={_spell(getattr(changed, field.name))}"
        for field in fields(Recipe)
        if field.name != "name" and getattr(changed, field.name) != getattr(base, field.name)
    ]
    return replace(changed, name="-".join([base.name, *words]))


def _spell(value: object) -> str:
    if isinstance(value, tuple):
        return "+".join(map(str, value)) or "none"
    return "all" if value is None else str(value).lower()
