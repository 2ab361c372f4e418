"""Drawn examples of a user's module, and the smallest that breaks a law."""

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from memcnn.testing.checks import check_all
from memcnn.testing.laws.result import Report, Result
from memcnn.testing.laws.subject import NotRunnable

SCALES = (1.0, 0.1, 0.01, 10.0)
"""Standard deviations of inputs; a block may be right for small values alone."""


@dataclass(frozen=True)
class Example:
    """A module in one mode, and normally distributed inputs for it."""

    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    device: str
    seed: int = 0
    scale: float = 1.0
    training: bool = True

    def module(self, make: Callable[[], nn.Module] | nn.Module) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            module = copy.deepcopy(make) if isinstance(make, nn.Module) else make()
        return module.to(self.device, self.dtype).train(self.training)

    def inputs(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return [
            self.scale * torch.randn(shape, generator=generator, device="cpu").to(self.device, self.dtype)
            for shape in self.shapes
        ]

    def code(self, law: str, target: str, called: bool, options: dict) -> str:
        """Return a script that builds the example and checks ``law``; ``target`` is package.module:name."""
        package, _, name = target.partition(":")
        root = name.partition(".")[0]
        shapes = ", ".join(
            f"{scaled}torch.randn({shape}, generator=generator)"
            if len(shape) > 1
            else f"{scaled}torch.randn({shape[0]}, generator=generator)"
            for shape in map(list, self.shapes)
            for scaled in [f"{self.scale:g} * " * (self.scale != 1)]
        )
        arguments = "".join(f", {key}={value!r}" for key, value in options.items())
        device = "" if self.device == "cpu" else f"{self.device!r}, "
        return "\n".join(
            [
                "import torch",
                f"from {package} import {root}",
                f"from memcnn.testing import check_{law}",
                "",
                f"torch.manual_seed({self.seed})",
                f"module = {name}{'()' * called}.to({device}{self.dtype}).{'train' if self.training else 'eval'}()",
                f"generator = torch.Generator().manual_seed({self.seed})",
                f"inputs = [x.to({device}{self.dtype}) for x in ({shapes},)]",
                f"print(check_{law}(module, *inputs, seed={self.seed}{arguments}))",
            ]
        )


@dataclass
class Findings:
    """The results of all examples of one law."""

    law: str
    examples: int = 0
    worst: dict[str, Result] = field(default_factory=dict)  # by claim: the result closest to its limit or beyond it
    failing: tuple[Example, Report] | None = None  # the smallest found
    not_runnable: str = ""  # why examples were left out

    def add(self, report: Report) -> None:
        self.examples += 1
        for result in report:
            known = self.worst.get(result.claim)
            if known is None or _badness(result) > _badness(known):
                self.worst[result.claim] = result

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
) -> Findings:
    """Check ``base`` in every mode and drawn variants of it, and reduce a failing one to the smallest that fails.

    Args:
        make: makes the module, or is the module.
        base: the first example.
        law: the name of the law.
        modes: training modes that are drawn.
        vary: dimensions whose sizes are drawn between 1 and that of ``base``.
        max_examples: the number of variants.
        first_seed: of the search.
        options: of the law's check.

    Raises:
        NotRunnable: if ``base`` does not run.
    """
    found = Findings(law)

    def check(example: Example) -> bool:
        report = check_all(example.module(make), *example.inputs(), seed=example.seed, laws=[law], **options)
        found.add(report)
        if not report.passed:
            found.failing = example, report
        return report.passed

    for training in modes:
        check(Example(base.shapes, base.dtype, base.device, base.seed, base.scale, training))

    @seed(first_seed)
    @settings(
        max_examples=max_examples,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(_examples(base, modes, vary))
    def every_example_passes(example: Example) -> None:
        try:
            passed = check(example)
        except NotRunnable as error:
            found.not_runnable = str(error)
            return
        if not passed:
            raise _Broken

    try:
        every_example_passes()
    except _Broken:
        pass
    return found


class _Broken(Exception):
    """An example breaks a law."""


@st.composite
def _examples(draw: st.DrawFn, base: Example, modes: Collection[bool], vary: Collection[int]) -> Example:
    shapes = tuple(tuple(_sizes(draw, shape, vary)) for shape in base.shapes)
    return Example(
        shapes,
        base.dtype,
        base.device,
        seed=draw(st.integers(0, 2**16)),
        scale=draw(st.sampled_from(SCALES)),
        training=draw(st.sampled_from(list(modes))),
    )


def _sizes(draw: st.DrawFn, shape: Sequence[int], vary: Collection[int]) -> Iterator[int]:
    for i, size in enumerate(shape):
        yield draw(st.integers(1, size)) if i in vary or i - len(shape) in vary else size


def _badness(result: Result) -> float:
    """Return a number that grows with the error's share of its limit; skipped results come last."""
    if result.skipped:
        return -1.0
    if result.error <= result.limit:
        return result.error / result.limit if result.limit else 0.0
    return float("inf") if not result.limit or result.error != result.error else result.error / result.limit
