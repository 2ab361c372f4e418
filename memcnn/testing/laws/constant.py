"""Constant channels: a chain cannot rebuild a constant exactly, and BatchNorm magnifies the difference.

A channel of zeros, or a missing modality, comes back from the inverses as 1e-8. A BatchNorm multiplies that by 316, and
the ReLU behind it passes gradients that it should block.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from memcnn.models.revop import InvertibleModuleWrapper
from memcnn.testing.adapters import inverse_of
from memcnn.testing.laws.subject import Subject
from memcnn.testing.laws.twin import is_finite, is_wrapped, relative_errors, worst

DEPTH = 4
"""The number of blocks in the chain that is tried."""
UNRELIABLE = 1e-2
"""The smallest relative error of a gradient that makes a chain unreliable in float32."""
RANDOM_CHANNELS = "random values in the channels of the input that are constant"
REMEDIES = "use exact=True or keep_every in the chain, or fill these channels with values that vary"


def constant_channels(x: Tensor) -> list[int]:
    """Return the channels of ``x``, entries of dimension 1, in which all values are equal."""
    if not x.is_floating_point() or x.dim() < 2 or x.numel() <= x.shape[1]:
        return []
    channels = x.detach().movedim(1, 0).flatten(1)
    return (channels == channels[:, :1]).all(1).nonzero().flatten().tolist()


def filled(x: Tensor) -> Tensor:
    """Return ``x`` with random values in the channels that are constant, as large as those of the others."""
    constant = constant_channels(x)
    others = [channel for channel in range(x.shape[1]) if channel not in constant] if constant else []
    if not constant:
        return x
    size = x.detach()[:, others].std().item() if others else 1.0
    generator = torch.Generator().manual_seed(len(constant))
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64, device="cpu").to(x)
    result = x.detach().clone(memory_format=torch.preserve_format)
    result[:, constant] = (size or 1.0) * noise[:, constant]
    return result


def without_constants(subject: Subject) -> Subject | None:
    """Return the subject with random values in constant channels; None if it has none."""
    if not any(map(constant_channels, subject.inputs)):
        return None
    return replace(subject, inputs=tuple(map(filled, subject.inputs)))


def remark_on_constants(module: nn.Module, inputs: Sequence[Tensor]) -> str:
    """Explain that constant channels make a chain of such blocks unreliable; "" if they do not, or there are none.

    Gradients of a chain are compared with those of plain backpropagation, with the inputs as they are and with random
    values in their constant channels.
    """
    if not any(map(constant_channels, inputs)):
        return ""
    error = beside = float("nan")
    with suppress(Exception):  # blocks that do not fit onto each other form no chain
        error = _error_of_chain(module, inputs)
        beside = _error_of_chain(module, [filled(x) for x in inputs])
    if not (error > UNRELIABLE and beside < UNRELIABLE / 10):
        return ""
    counts = [(len(constant_channels(x)), x.shape[1]) for x in inputs if constant_channels(x)]
    count, of = counts[0]
    return (
        f"{count} of {of} channels of the input are constant: the gradients of a chain of {DEPTH} such blocks are "
        f"{error:.2g} off, relative to the largest entry; with random values in these channels they are {beside:.1g} "
        f"off: {REMEDIES}"
    )


def _error_of_chain(module: nn.Module, inputs: Sequence[Tensor]) -> float:
    """Return the largest relative error of a gradient of ``DEPTH`` blocks in a row; NaN where it is not finite."""
    subject = Subject(module, tuple(inputs))
    blocks = [subject.fresh() for _ in range(DEPTH)]
    wrapped = [block if is_wrapped(block) else InvertibleModuleWrapper(block) for block in blocks]
    chain = replace(subject, module=_Chain(wrapped), wrap=False)
    got, wanted = chain.run(chain.fresh()), chain.run(chain.twin())
    if not is_finite(wanted.gradients.values()):
        return float("nan")
    return worst(relative_errors(got.gradients, wanted.gradients))[1]


class _Chain(nn.Module):
    """Blocks in a row, of one or several streams."""

    def __init__(self, blocks: Sequence[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        for block in self.blocks:
            out = block(*values)
            values = (out,) if isinstance(out, Tensor) else tuple(out)
        return values

    def inverse(self, *values: Tensor) -> tuple[Tensor, ...]:
        for block in reversed(self.blocks):
            out = inverse_of(block)(*values)
            values = (out,) if isinstance(out, Tensor) else tuple(out)
        return values
