"""Drawn examples of a user's module, and the smallest that breaks a law."""

import copy
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from torch import Tensor, nn

from memcnn.testing.checks import check_all
from memcnn.testing.laws.result import Report, Result
from memcnn.testing.laws.subject import NotRunnable

Shapes = tuple[tuple[int, ...], ...]
SIZES = 3, 5, 1, 2
"""Sizes that every varied dimension takes at least once; of a batch of two, a roll is its own inverse."""
LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced")
"""How inputs lie in memory. A sliced one has gaps."""
LONGEST_SHRINKING = 30
"""Seconds after the first drawn failure in which smaller ones are looked for."""
LAID_OUT = {
    "contiguous": "{}",
    "channels_last": "{}.contiguous(memory_format=torch.channels_last)",
    "channels_last_3d": "{}.contiguous(memory_format=torch.channels_last_3d)",
    "transposed": "{}.transpose(-1, -2).contiguous().transpose(-1, -2)",
    "sliced": "{}.repeat_interleave(2, -1)[..., ::2]",
}
"""The layouts as code."""
SCALES = (1.0, 0.1, 0.01, 10.0)
"""Standard deviations of inputs; a block may be right for small values alone."""


@dataclass(frozen=True)
class Example:
    """A module in one mode, and normally distributed inputs for it.

    Attributes:
        integers: for each input, None, or its integer dtype and the number that its values stay below.
        layout: how inputs lie in memory, where they have enough dimensions for it.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    device: str
    seed: int = 0
    scale: float = 1.0
    training: bool = True
    integers: tuple[tuple[torch.dtype, int] | None, ...] = ()
    layout: str = "contiguous"

    def module(self, make: Callable[[], nn.Module] | nn.Module) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            module = copy.deepcopy(make) if isinstance(make, nn.Module) else make()
        return module.to(self.device, self.dtype).train(self.training)

    def inputs(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return [self._input(i, shape, generator) for i, shape in enumerate(self.shapes)]

    def _input(self, i: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        if integers := self._integers(i):
            dtype, below = integers
            return torch.randint(below, shape, generator=generator, dtype=dtype, device="cpu").to(self.device)
        x = self.scale * torch.randn(shape, generator=generator, device="cpu").to(self.device, self.dtype)
        match self._layout(shape):
            case "channels_last":
                return x.contiguous(memory_format=torch.channels_last)
            case "channels_last_3d":
                return x.contiguous(memory_format=torch.channels_last_3d)
            case "transposed":
                return x.transpose(-1, -2).contiguous().transpose(-1, -2)
            case "sliced":
                return x.repeat_interleave(2, -1)[..., ::2]
        return x

    def _integers(self, i: int) -> tuple[torch.dtype, int] | None:
        return self.integers[i] if self.integers else None

    def _layout(self, shape: tuple[int, ...]) -> str:
        """Return the layout of an input of ``shape``: one that it can have."""
        if self.layout == "channels_last":
            return {4: "channels_last", 5: "channels_last_3d"}.get(len(shape), "contiguous")
        return self.layout if len(shape) > 1 else "contiguous"

    def code(self, law: str, target: str, called: bool, options: dict) -> str:
        """Return a script that builds the example and checks ``law``; ``target`` is package.module:name."""
        package, _, name = target.partition(":")
        root = name.partition(".")[0]
        inputs = ", ".join(self._input_code(i, list(shape)) for i, shape in enumerate(self.shapes))
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
                f"inputs = [{inputs}]",
                f"print(check_{law}(module, *inputs, seed={self.seed}{arguments}))",
            ]
        )

    def _input_code(self, i: int, shape: list[int]) -> str:
        device = "" if self.device == "cpu" else f"{self.device!r}"
        if integers := self._integers(i):
            dtype, below = integers
            drawn = f"torch.randint({below}, {shape}, generator=generator, dtype={dtype})"
            return drawn + f".to({device})" * bool(device)
        size = shape if len(shape) > 1 else shape[0]
        drawn = f"torch.randn({size}, generator=generator).to({device}{', ' * bool(device)}{self.dtype})"
        drawn = f"({self.scale:g} * {drawn})" if self.scale != 1 else drawn
        return LAID_OUT[self._layout(tuple(shape))].format(drawn)


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
        vary: dimensions whose sizes are drawn, between 1 and half as much again as that of ``base``, or 5. Each takes
            every size of ``SIZES`` at least once, unless ``max_examples`` is 1.
        max_examples: the number of drawn variants.
        first_seed: of the search.
        options: of the law's check.

    Raises:
        NotRunnable: if ``base`` runs in no mode.
    """
    found = Findings(law)

    def check(example: Example) -> bool:
        report = check_all(example.module(make), *example.inputs(), seed=example.seed, laws=[law], **options)
        found.add(report)
        if not report.passed:
            found.failing = example, report
        return report.passed

    refused, failed_since = [], []
    for training in modes:
        try:
            check(replace(base, training=training))
        except NotRunnable as error:
            refused.append(error)
            mode = "training" if training else "eval"
            failure = Result(law, "forward runs in both modes", math.inf, 0.0, explanation=f"in {mode} mode {error}")
            found.failing = replace(base, training=training), Report((failure,))
    if len(refused) == len(modes):
        raise refused[0]
    if refused:
        found.add(found.failing[1])
    for i, shapes in enumerate(_edge_shapes(base.shapes, vary) if max_examples > 1 else ()):
        example = replace(base, shapes=shapes, training=list(modes)[i % len(modes)], layout=LAYOUTS[i % len(LAYOUTS)])
        try:
            check(example)
        except NotRunnable as error:
            found.not_runnable = str(error)

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
        if failed_since and time.monotonic() - failed_since[0] > LONGEST_SHRINKING:
            return
        try:
            passed = check(example)
        except NotRunnable as error:
            found.not_runnable = str(error)
            return
        if not passed:
            failed_since.append(time.monotonic())
            raise _Broken

    try:
        every_example_passes()
    except (_Broken, Flaky):  # after ``LONGEST_SHRINKING`` examples that failed pass
        pass
    return found


class _Broken(Exception):
    """An example breaks a law."""


@st.composite
def _examples(draw: st.DrawFn, base: Example, modes: Collection[bool], vary: Collection[int]) -> Example:
    return replace(
        base,
        shapes=_drawn_shapes(draw, base.shapes, vary),
        seed=draw(st.integers(0, 2**16)),
        scale=draw(st.sampled_from(SCALES)),
        training=draw(st.sampled_from(list(modes))),
        layout=draw(st.sampled_from(LAYOUTS)),
    )


def _varied(shapes: Shapes, vary: Collection[int]) -> list[tuple[int, int]]:
    """Return (dimension, size) of what varies together: inputs that are equally long there stay so."""
    return sorted(
        {(i, size) for shape in shapes for i, size in enumerate(shape) if i in vary or i - len(shape) in vary}
    )


def _resized(shapes: Shapes, vary: Collection[int], sizes: Mapping[tuple[int, int], int]) -> Shapes:
    return tuple(
        tuple(
            sizes.get((i, size), size) if i in vary or i - len(shape) in vary else size for i, size in enumerate(shape)
        )
        for shape in shapes
    )


def _drawn_shapes(draw: st.DrawFn, shapes: Shapes, vary: Collection[int]) -> Shapes:
    sizes = {key: draw(st.integers(1, max(5, key[1] + key[1] // 2))) for key in _varied(shapes, vary)}
    return _resized(shapes, vary, sizes)


def _edge_shapes(shapes: Shapes, vary: Collection[int]) -> Iterator[Shapes]:
    """Yield shapes in which one varied dimension has a size of ``SIZES``."""
    for size in SIZES:
        for key in _varied(shapes, vary):
            if key[1] != size:
                yield _resized(shapes, vary, {key: size})


def _badness(result: Result) -> float:
    """Return a number that grows with the error's share of its limit; skipped results come last."""
    if result.skipped:
        return -1.0
    if result.error <= result.limit:
        return result.error / result.limit if result.limit else 0.0
    return float("inf") if not result.limit or result.error != result.error else result.error / result.limit
