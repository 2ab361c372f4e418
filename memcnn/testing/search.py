"""Draw examples of a user's module, and find the smallest that breaks a law."""

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from torch import nn

from memcnn.testing.checks import check_all
from memcnn.testing.example import LAYOUTS, Example, Shapes
from memcnn.testing.laws.result import Report, Result
from memcnn.testing.laws.subject import NotRunnable

SIZES = 3, 5, 1, 2
"""Sizes that every varied dimension takes at least once. 3 is there since a roll of two samples is its own inverse."""
LONGEST_SHRINKING = 30
"""Seconds for which the search continues after the first drawn failure, to find a smaller one."""
LEAST_EXAMPLES = 4
"""Number of examples of a law that are checked however long they take."""
SCALES = (1.0, 0.1, 0.01, 10.0)
"""Standard deviations of inputs; a block may be right for small values alone."""


@dataclass
class Findings:
    """The results of all examples of one law."""

    law: str
    examples: int = 0
    worst: dict[str, Result] = field(default_factory=dict)  # by claim: the result closest to its limit or beyond it
    failing: tuple[Example, Report] | None = None  # the smallest found
    not_runnable: str = ""  # why examples were left out
    out_of_time: bool = False  # fewer examples were drawn than were wanted

    def add(self, report: Report) -> None:
        """Count a report, and keep the worst result of each claim."""
        self.examples += 1
        for result in report:
            known = self.worst.get(result.claim)
            if known is None or _badness(result) > _badness(known):
                note = known.explanation if known and not (known.skipped or result.failed or result.explanation) else ""
                self.worst[result.claim] = replace(result, explanation=note) if note else result

    @property
    def report(self) -> Report:
        return Report(tuple(self.worst.values()))


def search(
    make: Callable[[], nn.Module] | nn.Module,
    base: Example,
    law: str,
    *,
    modes: Collection[bool],
    vary: Collection[int],
    max_examples: int,
    first_seed: int,
    options: dict,
    longest: float = math.inf,
) -> Findings:
    """Check ``base`` in every mode and drawn variants of it, and reduce a failing one to the smallest that fails.

    Args:
        make: makes the module, or is the module.
        base: the first example.
        law: the name of the law.
        modes: training modes that are drawn.
        vary: dimensions whose sizes are drawn, between 1 and half as much again as that of ``base``, or 5. Each takes
            every size of ``SIZES`` at least once, unless ``max_examples`` is 1 or ``base`` fails.
        max_examples: the number of variants. At least half of them are drawn at random.
        first_seed: seed of the search.
        options: options of the law's check.
        longest: seconds after which no further example is drawn, once there are ``LEAST_EXAMPLES``.

    Raises:
        NotRunnable: if ``base`` runs in no mode.
    """
    found, started = Findings(law), time.monotonic()

    def check(example: Example, **more: object) -> bool:
        module, inputs = example.module(make), example.inputs()
        report = check_all(module, *inputs, seed=example.seed, laws=[law], **{**options, **more})
        found.add(report)
        if report.failures:
            found.failing = example, report
        return not report.failures

    shallow = {"deepest": 0} if law == "inverse" else {}
    failed_since: list[float] = []
    _check_in_each_mode(base, modes, check, found)
    edges = list(_edges(base, modes, vary)) if max_examples > 1 and not found.failing else []
    for example in edges:
        try:
            check(example, **shallow)
        except NotRunnable as error:
            found.not_runnable = str(error)

    @seed(first_seed)
    @settings(
        max_examples=max(max_examples - len(edges), (max_examples + 1) // 2),
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(_examples(base, modes, vary))
    def every_example_passes(example: Example) -> None:
        if failed_since and time.monotonic() - failed_since[0] > LONGEST_SHRINKING:
            return
        if not failed_since and found.examples >= LEAST_EXAMPLES and time.monotonic() - started > longest:
            found.out_of_time = True
            return
        try:
            passed = check(example, **shallow)
        except NotRunnable as error:
            found.not_runnable = str(error)
            return
        if not passed:
            failed_since.append(time.monotonic())
            raise _Broken

    with suppress(_Broken, Flaky):  # Flaky: after ``LONGEST_SHRINKING`` seconds, failing examples return unchecked
        every_example_passes()
    return found


class _Broken(Exception):
    """An example breaks a law."""


def _check_in_each_mode(
    base: Example, modes: Collection[bool], check: Callable[[Example], bool], found: Findings
) -> None:
    """Check ``base`` in every mode. A mode in which it does not run is a failure; raise NotRunnable if it runs in none.

    Only here the growth of errors with depth is measured.
    """
    refused: list[NotRunnable] = []
    for training in modes:
        try:
            check(replace(base, training=training))
        except NotRunnable as error:
            refused.append(error)
            explanation = f"in {'training' if training else 'eval'} mode {error}"
            failure = Result(found.law, "forward runs in both modes", math.inf, 0.0, explanation=explanation)
            found.failing = replace(base, training=training), Report((failure,))
    if len(refused) == len(modes):
        raise refused[0]
    if refused and found.failing is not None:
        found.add(found.failing[1])


@st.composite
def _examples(draw: st.DrawFn, base: Example, modes: Collection[bool], vary: Collection[int]) -> Example:
    """Draw a variant of ``base``."""
    return replace(
        base,
        shapes=_drawn_shapes(draw, base.shapes, vary),
        seed=draw(st.integers(0, 2**16)),
        scale=1.0 if base.values else draw(st.sampled_from(SCALES)),
        training=draw(st.sampled_from(list(modes))),
        layout=draw(st.sampled_from(LAYOUTS)),
    )


def _varied(shapes: Shapes, vary: Collection[int]) -> list[tuple[int, int]]:
    """Return each (dimension, size) that varies. Inputs of equal size along a dimension keep equal sizes."""
    return sorted(
        {(i, size) for shape in shapes for i, size in enumerate(shape) if i in vary or i - len(shape) in vary}
    )


def _resized(shapes: Shapes, vary: Collection[int], sizes: Mapping[tuple[int, int], int]) -> Shapes:
    """Return the shapes with the sizes of the varied dimensions replaced."""
    return tuple(
        tuple(
            sizes.get((i, size), size) if i in vary or i - len(shape) in vary else size for i, size in enumerate(shape)
        )
        for shape in shapes
    )


def _drawn_shapes(draw: st.DrawFn, shapes: Shapes, vary: Collection[int]) -> Shapes:
    sizes = {key: draw(st.integers(1, max(5, key[1] + key[1] // 2))) for key in _varied(shapes, vary)}
    return _resized(shapes, vary, sizes)


def _edges(base: Example, modes: Collection[bool], vary: Collection[int]) -> Iterator[Example]:
    """Yield examples in which one varied dimension has a size of ``SIZES``. Each has other weights and values."""
    shapes = (
        _resized(base.shapes, vary, {key: size})
        for size in SIZES
        for key in _varied(base.shapes, vary)
        if key[1] != size
    )
    for i, resized in enumerate(shapes):
        yield replace(
            base,
            shapes=resized,
            seed=base.seed + 1 + i,
            training=list(modes)[i % len(modes)],
            layout=LAYOUTS[i % len(LAYOUTS)],
        )


def _badness(result: Result) -> float:
    """Return a number that grows with the error's share of its limit; skipped results come last."""
    if result.skipped:
        return -1.0
    if result.error <= result.limit:
        return result.error / result.limit if result.limit else 0.0
    return float("inf") if not result.limit or result.error != result.error else result.error / result.limit
