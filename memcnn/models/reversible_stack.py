"""``to_reversible``: make a stack of residual blocks of an existing model reversible, without a new parameter.

``residual_of`` reads the residual functions of each block, ``TwoStreams`` applies them to two streams in turn, and
``StackReport`` lists the changes. A block is converted only if its residual functions give its output and its buffers
for the sample, and the same gradients.

The function is not called ``convert``, because the module ``memcnn.convert`` has that name: the command that converts
weights of MemCNN 1.5.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from memcnn.models.keywords import taken
from memcnn.models.recording import NotResidual, changes_restored
from memcnn.models.residual import HOOKS, Residual, residual_of
from memcnn.models.residual_check import refuse_differences
from memcnn.models.stack_report import Called, StackReport, compare, outcome
from memcnn.models.two_streams import AfterReLU as _AfterReLU  # its name in older pickles
from memcnn.models.two_streams import Nothing, ReversibleStack, TwoStreams

__all__ = ["Nothing", "ReversibleStack", "StackReport", "TwoStreams", "to_reversible"]


class _Block(nn.Module):
    """A block of the original stack, with its residual functions or the reason why it has none."""

    def __init__(self, name: str, block: nn.Module, kwargs: Mapping[str, Any]):
        super().__init__()
        self.title = f"{name}: {type(block).__name__}"
        self.block = block
        encoder_names = {"mask": "src_mask"} if isinstance(block, nn.TransformerEncoderLayer) else {}
        self.kwargs = taken(block, {encoder_names.get(name, name): value for name, value in kwargs.items()})
        self.call = Called(block, self.kwargs)
        self.found: Residual | None = None
        self.reason = ""

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)

    def find(self, move_relu: bool, x: Tensor) -> None:
        """Set ``found`` to the residual functions, or ``reason`` to the reason why the block is not residual."""
        try:
            found = residual_of(self.block, {name: value is not None for name, value in self.kwargs.items()})
            if found.relu_after and not move_relu:
                raise NotResidual(
                    "it applies a ReLU to its sum, so that negative values are lost; move_relu=True moves the ReLU to "
                    "the input of the next block's function, which changes what the stack computes"
                )
            for training in (True, False):
                refuse_differences(self.call, found, x, training)
            self.found = found
        except NotResidual as reason:
            self.reason = str(reason)


def to_reversible(
    module: nn.Module | Sequence[nn.Module],
    sample: Tensor,
    kwargs: Mapping[str, Any] | None = None,
    *,
    keep_others: bool = False,
    move_relu: bool = False,
    measure: bool = True,
) -> tuple[ReversibleStack, StackReport]:
    """Make a stack of residual blocks reversible. It keeps the parameters of the blocks and adds none.

    ::

        model.layer1, report = memcnn.to_reversible(model.layer1, torch.randn(2, 64, 56, 56), move_relu=True)
        print(report)

    The result and the blocks share parameters and buffers. The state dict of the result has other names: load trained
    weights into the blocks first.

    Args:
        module: the blocks, as ``nn.Sequential``, ``nn.ModuleList``, list or tuple, such as ``resnet.layer1``,
            ``vit.blocks`` or ``vit.encoder.layers``; or an ``nn.TransformerEncoder`` or ``nn.TransformerDecoder``.
        sample: an input of the first block. Blocks and their residual functions are compared on it.
        kwargs: keyword arguments of the blocks, such as masks, or the ``memory`` of an ``nn.TransformerDecoder``. The
            result takes arguments of these names, and raises a TypeError for a call where one is None that was not
            None here, or the reverse. Masks of an ``nn.TransformerEncoder`` remain optional.
        keep_others: keep blocks that are not residual, instead of raising a ValueError.
        move_relu: also convert blocks that apply a ReLU to their sum, as those of a torchvision ResNet. The ReLU moves
            to the input of the next block's function, so that the shortcut has none. The last ReLU follows the stack.
        measure: predict the memory of a training step, and measure it on copies of the stack.

    Returns:
        The reversible stack, and a report of the changes.

    Raises:
        TypeError: ``module`` is not a stack of modules, ``sample`` is not a floating-point tensor, ``kwargs`` is not a
            dictionary, or no block takes one of ``kwargs``.
        ValueError: ``sample`` is on the meta device, a block is not residual and ``keep_others`` is False, no block is
            residual, or a block fails on the sample; the message gives the reasons.
    """
    _refuse_arguments(sample, kwargs)
    with torch.inference_mode(False), ExitStack() as cleanup:  # which also ends no_grad
        x = sample.detach().clone()
        kwargs = {name: _copy(value) for name, value in (kwargs or {}).items()}
        blocks, after = _blocks_of(module, kwargs)
        for block in blocks:
            cleanup.enter_context(changes_restored(block.block))
        return _converted(blocks, after, x, kwargs, keep_others=keep_others, move_relu=move_relu, measure=measure)


def _refuse_arguments(sample: object, kwargs: object) -> None:
    """Raise a TypeError or a ValueError for arguments of ``to_reversible`` that it cannot use."""
    if not isinstance(sample, Tensor) or not sample.is_floating_point():
        got = sample.dtype if isinstance(sample, Tensor) else type(sample).__name__
        raise TypeError(f"sample must be a floating-point tensor, an input of the first block: got {got}")
    if sample.is_meta:
        raise ValueError(
            "sample is on the meta device and has no values, but blocks are compared with their residual functions on "
            "it: put model and sample on another device, convert the model, and then move it"
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(
            f"kwargs must be a dictionary of keyword arguments of the blocks, such as {{'mask': mask}}: got "
            f"{type(kwargs).__name__}"
        )


def _copy(value: Any) -> Any:
    """Return a copy of a tensor without its graph; other values as they are."""
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _converted(
    blocks: Sequence[_Block], after: Sequence[nn.Module], sample: Tensor, kwargs: Mapping[str, Any], **options: bool
) -> tuple[ReversibleStack, StackReport]:
    """Return the reversible stack of the blocks and the report. The options are those of ``to_reversible``."""
    _refuse_unknown_keywords(blocks, kwargs)
    x = sample
    for block in blocks:
        block.find(options["move_relu"], x)
        x = _output_of(block, x)
        if block is not blocks[-1] and not isinstance(x, Tensor):
            raise ValueError(
                f"block {block.title} returns a {type(x).__name__}, but a stack hands one tensor from block to block: "
                "let its forward return that tensor alone, and compute what else it returns outside of the stack"
            )
    _refuse(blocks, options["keep_others"])
    stack = ReversibleStack(*_parts(blocks), *after, positional=_positional(blocks[0].block))
    before = ReversibleStack(*blocks, *after)
    converted = [f"{block.title}, {_count(block.found)}" for block in blocks if block.found]
    kept = [f"{block.title}: {block.reason}" for block in blocks if not block.found]
    measure = options["measure"]
    return stack, compare(before, stack, sample, kwargs, converted=converted, kept=kept, measure=measure)


def _positional(block: nn.Module) -> list[str]:
    """Return the names of the positional arguments of a block after its input."""
    others = list(inspect.signature(block.forward).parameters.values())[1:]
    return [parameter.name for parameter in others if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]


def _output_of(block: _Block, x: Tensor) -> Any:
    """Return the output of a block for the sample, in evaluation mode."""
    try:
        return outcome(block, block, x, training=False)[0]
    except Exception as error:  # whatever the block raises
        raise ValueError(f"block {block.title} fails on the sample: {type(error).__name__}: {error}") from error


def _blocks_of(module: nn.Module | Sequence[nn.Module], kwargs: Mapping[str, Any]) -> tuple[list[_Block], list]:
    """Return the blocks of a stack, with those of nested stacks, and the modules that follow them."""
    after: list[nn.Module] = []
    if isinstance(module, nn.TransformerEncoder | nn.TransformerDecoder):
        after = [module.norm] if module.norm is not None else []
        module = module.layers
    if not _is_stack(module):
        raise TypeError(
            f"to_reversible got a {type(module).__name__}; wanted the blocks themselves: an nn.Sequential, "
            "nn.ModuleList, list or tuple of modules, such as resnet.layer1, vit.blocks or vit.encoder.layers, or an "
            "nn.TransformerEncoder or nn.TransformerDecoder"
        )
    blocks = [_Block(name, block, kwargs) for name, block in _flat("", module)]
    if not blocks:
        raise ValueError("to_reversible got a stack without a block; wanted one residual block or more")
    return blocks, after


def _is_stack(module: object) -> bool:
    """Return whether a module or sequence only calls its modules in order."""
    if isinstance(module, nn.Module):
        forward = inspect.getattr_static(type(module), "forward")  # getattr fails for a scripted module
        runs_in_order = isinstance(module, nn.ModuleList) or forward is nn.Sequential.forward
        return runs_in_order and not any(getattr(module, name) for name in HOOKS)
    return isinstance(module, list | tuple) and all(isinstance(block, nn.Module) for block in module)


def _flat(prefix: str, stack: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of each block, with those of nested stacks."""
    named = stack._modules.items() if isinstance(stack, nn.Module) else enumerate(stack)  # repeated blocks included
    for name, block in ((name, block) for name, block in named if block is not None):
        if _is_stack(block):
            yield from _flat(f"{prefix}{name}.", block)
        else:
            yield f"{prefix}{name}", block


def _refuse_unknown_keywords(blocks: Sequence[_Block], kwargs: Mapping[str, Any]) -> None:
    known = {name for block in blocks for name in block.kwargs} | {"mask"}
    if unknown := [name for name in kwargs if name not in known]:
        raise TypeError(f"no block of the stack takes the keyword argument {unknown[0]!r}: correct its name")


def _refuse(blocks: Sequence[_Block], keep_others: bool) -> None:
    """Raise a ValueError if no block is residual, or if some are not and ``keep_others`` is False."""
    reasons = [f"{block.title}: {block.reason}" for block in blocks if block.found is None]
    if len(reasons) == len(blocks) or (reasons and not keep_others):
        fix = "" if len(reasons) == len(blocks) else "; leave these out, or keep them as they are with keep_others=True"
        listed = "\n  ".join(reasons)
        raise ValueError(f"{len(reasons)} of {len(blocks)} blocks cannot be made reversible{fix}:\n  {listed}")


def _parts(blocks: Sequence[_Block]) -> Iterator[nn.Module]:
    """Yield one ``TwoStreams`` for each sequence of residual blocks, and the other blocks between them."""
    functions: list[nn.Module] = []
    relu_waits = False
    for block in blocks:
        if block.found is not None:
            first, *others = block.found.functions
            functions += [_AfterReLU(first) if relu_waits else first, *others]
            relu_waits = block.found.relu_after
            continue
        if functions:
            yield TwoStreams(functions, relu_after=relu_waits)
        functions, relu_waits = [], False
        yield block.block
    if functions:
        yield TwoStreams(functions, relu_after=relu_waits)


def _count(found: Residual) -> str:
    return f"{len(found.functions)} residual function{'s' * (len(found.functions) > 1)}"
