"""Two streams in place of the one stream of a residual stack: the modules that ``memcnn.to_reversible`` builds.

A residual stack computes h[n+1] = h[n] + f[n](h[n]). Two streams x1 and x2, which both start as the stack's input x,
replace h. The residual functions change them in turn (Gomez et al., arXiv:1707.04585, with F = f[2n], G = f[2n+1]):

    y1 = x1 + f[2n](x2),    y2 = x2 + f[2n+1](y1)

The stack returns y1 + (y2 - x): x and the sum of all that the functions added. One or two functions (one transformer
block, one or two residual blocks) compute the same as before. In a longer stack each function sees x and the sums of
the other stream, instead of the sums of all functions before it. A trained stack therefore needs further training.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memcnn.models.additive import AdditiveCoupling
from memcnn.models.keywords import keywords_taken, refuse_unknown, taken
from memcnn.models.residual import RecordedCall, RecordedFunction
from memcnn.models.revop import ReversibleSequential

__all__ = ["AfterReLU", "Nothing", "ReversibleStack", "TwoStreams"]


class Nothing(nn.Module):
    """A function that returns zero. It is G of the last coupling where the number of functions is odd."""

    def forward(self, x: Tensor) -> Tensor:
        """Return a zero of shape (), of the dtype and on the device of x."""
        return x.new_zeros(())


class AfterReLU(nn.Module):
    """A residual function of relu(x), where x is the stream.

    Args:
        function: the residual function.
    """

    def __init__(self, function: nn.Module):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Return a tensor of the shape of x. Keyword arguments go to the function."""
        return self.function(x.relu(), **kwargs)

    def keywords_taken(self, names: Iterable[str]) -> set[str]:
        """Return the names that the function takes."""
        return keywords_taken(self.function, names)


class TwoStreams(nn.Module):
    """A chain of additive couplings on two streams that start as x. It returns x plus the sums of both streams.

    Args:
        functions: the residual functions, alternately F and G of a coupling.
        relu_after: apply a ReLU to the result.
    """

    calls: Sequence[RecordedCall] = ()  # pickles of earlier commits have none

    def __init__(self, functions: Sequence[nn.Module], *, relu_after: bool = False):
        super().__init__()
        own = [f.function if isinstance(f, AfterReLU) else f for f in functions]
        calls = {id(f.recorded_call): f.recorded_call for f in own if isinstance(f, RecordedFunction)}
        self.calls = tuple(calls.values())
        functions = [*functions, Nothing()] if len(functions) % 2 else functions
        pairs = zip(functions[::2], functions[1::2], strict=True)
        self.chain = ReversibleSequential(*(AdditiveCoupling(f, g, split_dim=0) for f, g in pairs))
        self.relu_after = relu_after

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Return a tensor of the shape of x. Each keyword argument goes to the functions that take it.

        Raises:
            TypeError: a keyword argument was None when a block was converted and has a value now, or the reverse.
        """
        for call in self.calls:
            call.refuse_others(kwargs)
        y1, y2 = self.chain(torch.cat((x, x)), **kwargs).chunk(2)
        y = y1 + (y2 - x)
        return y.relu() if self.relu_after else y

    def keywords_taken(self, names: Iterable[str]) -> set[str]:
        """Return the names that at least one of the functions takes."""
        return self.chain.keywords_taken(names)


class ReversibleStack(nn.Module):
    """A sequence of modules: ``TwoStreams``, and blocks that were not converted.

    Args:
        *parts: the modules, in order.
        positional: the names of arguments after the first that may be given by position.
    """

    positional: Sequence[str] = ()  # pickles of earlier commits have none

    def __init__(self, *parts: nn.Module, positional: Sequence[str] = ()):
        super().__init__()
        self.parts, self.positional = nn.ModuleList(parts), tuple(positional)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of the last part. Each keyword argument goes to the parts that take it.

        Raises:
            TypeError: no part takes an argument.
        """
        if args:
            kwargs = self._named(args, kwargs)
        if kwargs:
            refuse_unknown(self, kwargs)
        for part in self.parts:
            x = part(x, **taken(part, kwargs))
        return x

    def _named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return all arguments after the first by name."""
        named = dict(zip(self.positional, args, strict=False))
        if len(named) < len(args) or named.keys() & kwargs.keys():
            raise TypeError(
                f"ReversibleStack got {len(args)} arguments after its input by position, and {sorted(kwargs)} by name; "
                f"those that it takes by position are {list(self.positional)}: give each argument once, by its name"
            )
        return named | dict(kwargs)

    def keywords_taken(self, names: Iterable[str]) -> set[str]:
        """Return the names that at least one of the parts takes."""
        return {name for part in self.parts for name in keywords_taken(part, names)}
