"""What the laws share: how a network is run, the limit of an error, and the largest errors met."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from hypothesis import assume, currently_in_test_context, reject, target
from torch import Tensor, nn

from memcnn.models.coupling import Coupling
from memcnn.models.revop import InvertibleModuleWrapper
from memcnn.testing.cases import Network
from memcnn.testing.laws.subject import DROPOUTS
from memcnn.testing.tolerances import relative_error, tolerance
from properties.twin import Outcome, differences, plain_twin, run, weighted_sum

Program = Callable[[Network], Callable[[nn.Module, Tensor], object]]
"""Makes of a description what is to be run on the network and on the memory of its input."""


def forward_and_backward(network: Network) -> Callable[[nn.Module, Tensor], Tensor]:
    def program(module: nn.Module, leaf: Tensor) -> Tensor:
        with network.context(leaf.device):
            y = module(network.input.laid_out(leaf))
        return differentiated(y)
    return program


def inverse_and_backward(network: Network) -> Callable[[nn.Module, Tensor], Tensor]:
    def program(module: nn.Module, leaf: Tensor) -> Tensor:
        with network.context(leaf.device):
            x = module.inverse(network.output.laid_out(leaf))
        return differentiated(x)
    return program


def differentiated(y: Tensor) -> Tensor:
    if y.requires_grad:
        weighted_sum(y).backward()
    return y


def assert_network_like_twin(law: str, network: Network, program: Program, device: str, *, inverse: bool = False,
                             depth: int | None = None, also: Callable[[int], Iterable[float]] = lambda _: ()) -> None:
    """``program`` has the same results, gradients, buffers and random numbers on the network as on its plain twin.

    Of a number of directions ``also`` gives further condition numbers: where the program rebuilds other activations
    than those of the network's input.
    """
    module = network.build(device)
    twin = plain_twin(module)
    leaf = (network.output if inverse else network.input).leaf(device).requires_grad_()
    actual, expected = run(module, program(network), [leaf]), run(twin, program(network), [leaf])
    assume_finite(expected)
    errors = differences(actual, expected)
    error = worst(errors.values())
    hold(law, network, error, depth=depth or 2 * network.depth, of=next(n for n, e in errors.items() if e is error),
         condition=lambda directions: worst([
             condition_number(network, directions, inverse=inverse, program=program), *also(directions)]))


def assume_finite(expected: Outcome) -> None:
    """The example is none where a scale has overflowed on its way to a result, a gradient or a running statistic."""
    gradients = (gradient for gradient in expected.gradients.values() if gradient is not None)
    assume(all(value.isfinite().all() for value in (*expected.results, *gradients, *expected.buffers.values())))


def worst(errors: Iterable[float]) -> float:
    """The largest; NaN if any is."""
    return max(errors, key=lambda error: (error != error, error), default=0.0)


LARGEST: dict[tuple[str, str, str], tuple[float, float]] = {}
"""By law, kind of block and precision: the error that came closest to its limit, and that limit."""


def hold(law: str, network: Network, error: float, *, depth: int, condition: Callable[[int], float],
         of: str = "") -> None:
    """The error, ``of`` the tensor of that name, is what rounding explains: in well-conditioned blocks, or in these.

    The condition number, of a number of directions, is measured only where the error is beyond the first limit. Where
    rounding alone may be as large as the values themselves, the example is none.
    """
    precision = {"dtype": network.dtype, "depth": depth, "autocast": torch.bfloat16 if network.autocast else None}
    limit = tolerance(**precision)
    for directions in DIRECTIONS:
        if error <= limit:
            break
        limit = tolerance(**precision, condition=worst([1.0, condition(directions)]))
        if not limit < 1:
            reject()
    name = "bfloat16 autocast" if network.autocast else str(network.dtype).removeprefix("torch.")
    remember((law, network.kind, name), error, limit)
    if currently_in_test_context() and error < float("inf"):
        target(error / limit, label=law)
    assert error <= limit, f"{law}: relative error {error:.1e}{of and f' of {of}'}, limit {limit:.1e}"


def remember(key: tuple[str, str, str], error: float, limit: float) -> None:
    before = LARGEST.get(key)
    if before is None or not error / limit <= before[0] / before[1]:
        LARGEST[key] = error, limit


STEP = 1e-7
"""A small relative change in float64: its square is lost in rounding, as is the rounding in the change."""
DIRECTIONS = 1, 6
"""In which a tensor is changed: one tells a rough condition number, which may miss what is amplified most."""


def condition_number(network: Network, directions: int = 1, *, inverse: bool = False,
                     program: Program | None = None, seed: int = 0,
                     before: Callable[[nn.Module, Tensor], Tensor] = lambda _, x: x) -> float:
    """By how much a relative change of a tensor between two blocks is amplified, in float64 on the plain twin.

    The blocks before that tensor are undone, which gives another input. Its relative change counts, and with
    ``program`` the change of the program's outcome on it, each divided by the relative change that it came from: the
    largest over all tensors between blocks, times what blocks nested in branches add by their own inverses. What comes
    ``before`` is given the twin and the input, may train the one, and returns the other. Masks are those of ``seed``.
    """
    module = plain_twin(network.build()).double()  # the very weights: others are drawn in another dtype
    x = before(module, (network.output if inverse else network.input).build().double()).contiguous()
    network = replace(network, autocast=False,
                      input=replace(network.input, dtype=torch.float64, layout="contiguous"))
    blocks = copy.deepcopy(module)
    _draw_once(blocks)
    pairs = [(block.inverse, block) for block in reversed(blocks)] if inverse else [(b, b.inverse) for b in blocks]

    def outcome(x: Tensor):
        return run(copy.deepcopy(module), program(network), [x.requires_grad_()], seed)

    wanted = outcome(x.clone()) if program is not None else None
    amplifications = []
    there, back = zip(*pairs, strict=True)
    for unchanged, changed, scale in _changed_inputs(there, back, x, directions, seed):
        amplifications.append(relative_error(changed, unchanged, least_scale=scale) / STEP)
        if wanted is not None:
            amplifications.append(worst(differences(outcome(changed), wanted).values()) / STEP)
    return worst(amplifications) * worst([1.0, *_amplifications_in_branches(blocks, there, x)])


class _SameMask:
    """What a dropout layer computes, with the random numbers of its first call each time."""

    def __init__(self, forward: Callable):
        self.forward, self.state = forward, None

    def __call__(self, *args, **kwargs):
        if self.state is None:
            self.state = torch.get_rng_state()
            return self.forward(*args, **kwargs)
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.state)
            return self.forward(*args, **kwargs)


def _draw_once(module: nn.Module) -> None:
    """Dropout layers keep their first mask, so that a block and its inverse are one function and its inverse."""
    for part in module.modules():
        if isinstance(part, DROPOUTS):
            part.forward = _SameMask(part.forward)


@torch.no_grad()
def _changed_inputs(there: Sequence[Callable], back: Sequence[Callable], x: Tensor, directions: int, seed: int
                    ) -> Iterator[tuple[Tensor, Tensor, float]]:
    """x, what it becomes where a tensor behind the first 0, 1, ... steps changes, and the larger of the two ends."""
    values = [x]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # as in run
        for step in there:
            values.append(step(values[-1]))
    scale = max(value.abs().max().item() for value in (values[0], values[-1]))
    generator = torch.Generator().manual_seed(0)
    for i, value in enumerate(values):
        for _ in range(directions):
            changed = _changed(value, generator)
            for step in reversed(back[:i]):
                changed = step(changed)
            yield x, changed, scale


@torch.no_grad()
def _amplifications_in_branches(blocks: nn.Module, there: Sequence[Callable], x: Tensor) -> list[float]:
    """By how much the inverse of each block within a branch amplifies a change of what the block gave there."""
    nested = {part for coupling in blocks.modules() if isinstance(coupling, Coupling)
              for part in coupling.modules() if isinstance(part, InvertibleModuleWrapper)}
    calls = []
    hooks = [part._fn.register_forward_hook(lambda fn, inputs, output: calls.append((fn, *inputs, output)))
             for part in nested]
    for step in there:
        x = step(x)
    for hook in hooks:
        hook.remove()
    generator = torch.Generator().manual_seed(0)
    return [relative_error(fn.inverse(_changed(output, generator)), before,
                           least_scale=output.abs().max().item()) / STEP for fn, before, output in calls]


def _changed(value: Tensor, generator: torch.Generator) -> Tensor:
    """Every entry by STEP times the largest, one way or the other."""
    return value + STEP * value.abs().max() * (torch.randint(0, 2, value.shape, generator=generator) * 2 - 1)


def table() -> list[str]:
    """Lines of ``LARGEST``: a row for each law and kind of block, a column for each precision."""
    columns = sorted({precision for _, _, precision in LARGEST})
    rows = sorted({(law, kind) for law, kind, _ in LARGEST})

    def cell(law: str, kind: str, precision: str) -> str:
        if (law, kind, precision) not in LARGEST:
            return ""
        error, limit = LARGEST[law, kind, precision]
        return f"{error:.1e} / {limit:.1e} {error / limit:6.2%}"

    lines = [["law", "block", *columns], *([law, kind, *(cell(law, kind, c) for c in columns)] for law, kind in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(f"{text:{width}}" for text, width in zip(line, widths, strict=True)).rstrip() for line in lines]
