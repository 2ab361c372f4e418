"""An example: a user's module in one mode with its inputs, and the code that builds both."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from memcnn.testing.targets import import_lines

Shapes = tuple[tuple[int, ...], ...]
LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced")
"""How inputs lie in memory. A sliced one has gaps."""
LAID_OUT = {
    "contiguous": "{}",
    "channels_last": "{}.contiguous(memory_format=torch.channels_last)",
    "channels_last_3d": "{}.contiguous(memory_format=torch.channels_last_3d)",
    "transposed": "{}.transpose(-1, -2).contiguous().transpose(-1, -2)",
    "sliced": "{}.repeat_interleave(2, -1)[..., ::2]",
}
"""The layouts as code."""


@dataclass(frozen=True)
class Example:
    """A module in one mode, and inputs for it: normally distributed ones, or the user's own.

    Attributes:
        shapes: the shapes of the inputs.
        dtype: the dtype of the module, and of inputs that are not integers.
        device: the device of both.
        seed: seed of the module's parameters and of drawn inputs.
        scale: the standard deviation of drawn inputs.
        training: the module's mode.
        integers: for each input, None, or its integer dtype and the number that its values stay below.
        layout: how inputs lie in memory, where they have enough dimensions for it.
        values: the user's own inputs; () to draw them.
        file: where ``values`` are stored.
    """

    shapes: Shapes
    dtype: torch.dtype
    device: str
    seed: int = 0
    scale: float = 1.0
    training: bool = True
    integers: tuple[tuple[torch.dtype, int] | None, ...] = ()
    layout: str = "contiguous"
    values: tuple[Tensor, ...] = field(default=(), repr=False, compare=False)
    file: str = ""

    def module(self, make: Callable[[], nn.Module] | nn.Module) -> nn.Module:
        """Return a new module from ``make``, or a copy of it."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            module = copy.deepcopy(make) if isinstance(make, nn.Module) else make()
        return module.to(self.device, self.dtype).train(self.training)

    def inputs(self) -> list[Tensor]:
        """Return the inputs, on the example's device."""
        generator = torch.Generator().manual_seed(self.seed)
        return [self._input(i, shape, generator) for i, shape in enumerate(self.shapes)]

    def _input(self, i: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        if integers := self._integers(i):
            dtype, below = integers
            return torch.randint(below, shape, generator=generator, dtype=dtype, device="cpu").to(self.device)
        if self.values:
            x = self.values[i].to(self.device)
            if not x.is_floating_point():
                return x
            x = x.to(self.dtype)
        else:
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
        """Return ``layout``, or the nearest layout that an input of ``shape`` can have."""
        if self.layout == "channels_last":
            return {4: "channels_last", 5: "channels_last_3d"}.get(len(shape), "contiguous")
        return self.layout if len(shape) > 1 else "contiguous"

    def code(self, law: str, target: str, called: bool, options: dict) -> str:
        """Return a script that builds the example and checks ``law``; ``target`` is package.module:name."""
        name = target.partition(":")[2]
        inputs = ", ".join(self._input_code(i, list(shape)) for i, shape in enumerate(self.shapes))
        arguments = "".join(f", {key}={value!r}" for key, value in options.items())
        device = "" if self.device == "cpu" else f"{self.device!r}, "
        return "\n".join(
            [
                "import torch",
                *import_lines(target),
                f"from memcnn.testing import check_{law}",
                "",
                f"torch.manual_seed({self.seed})",
                f"module = {name}{'()' * called}.to({device}{self.dtype}).{'train' if self.training else 'eval'}()",
                *(self._loading() if self.values else [f"generator = torch.Generator().manual_seed({self.seed})"]),
                f"inputs = [{inputs}]",
                f"print(check_{law}(module, *inputs, seed={self.seed}{arguments}))",
            ]
        )

    def _loading(self) -> list[str]:
        """Return the lines of code that load the user's own inputs."""
        return [
            f"values = torch.load({self.file!r}, weights_only=True)",
            "values = [values] if isinstance(values, torch.Tensor) else values",
        ]

    def _input_code(self, i: int, shape: list[int]) -> str:
        device = "" if self.device == "cpu" else f"{self.device!r}"
        if self.values and not self.values[i].is_floating_point():
            return f"values[{i}]" + f".to({device})" * bool(device)
        if self.values:
            given = f"values[{i}].to({device}{', ' * bool(device)}{self.dtype})"
            return LAID_OUT[self._layout(tuple(shape))].format(given)
        if integers := self._integers(i):
            dtype, below = integers
            drawn = f"torch.randint({below}, {shape}, generator=generator, dtype={dtype})"
            return drawn + f".to({device})" * bool(device)
        size = shape if len(shape) > 1 else shape[0]
        drawn = f"torch.randn({size}, generator=generator).to({device}{', ' * bool(device)}{self.dtype})"
        drawn = f"({self.scale:g} * {drawn})" if self.scale != 1 else drawn
        return LAID_OUT[self._layout(tuple(shape))].format(drawn)
