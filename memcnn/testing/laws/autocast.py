"""A claim of the law of state: under autocast, backward recomputes products in the dtypes of the forward pass."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from memcnn.models.revop import InvertibleModuleWrapper
from memcnn.testing.adapters import inverse_of
from memcnn.testing.laws.guard import described
from memcnn.testing.laws.result import Result, nothing_differs
from memcnn.testing.laws.subject import Subject, as_tuple

aten = torch.ops.aten
PRODUCTS = {
    aten.convolution.default,
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
}


class _Products(TorchDispatchMode):
    """Records the dtypes in which convolutions and matrix products are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in PRODUCTS:
            self.dtypes |= {x.dtype for x in args if isinstance(x, Tensor) and x.is_floating_point()}
        return func(*args, **(kwargs or {}))


def products_keep_their_dtype(subject: Subject, claim: str) -> Result:
    """Compare the dtypes of convolutions and matrix products in backward with those in forward, under autocast."""
    device = subject.inputs[0].device.type
    module, forward, backward = subject.trained(), _Products(), _Products()
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in subject.inputs]
    if subject.dtype != torch.float32 or not torch.amp.is_autocast_available(device):
        return Result("state", claim, skipped="autocast acts on float32 inputs")
    with _quiet(), subject.seeded():
        try:
            with torch.autocast(device, torch.bfloat16), forward:
                outputs = as_tuple(module(*leaves))
        except Exception as error:
            return Result("state", claim, skipped=f"under autocast forward raised {described(error)}")
        if _rebuilds(module) and (reason := _why_not_rebuilt(subject)):
            return Result("state", claim, skipped=reason)
        calls: Counter[str] = Counter()
        for part in module.modules():
            part.register_forward_pre_hook(lambda *_: calls.update(["in backward"]))
        loss = subject.loss([y.float() for y in outputs])
        if not loss.requires_grad:
            return Result("state", claim, skipped="no output requires a gradient")
        try:
            with backward:
                loss.backward()
        except Exception:
            if reason := _why_plain_backward_fails(subject):
                return Result("state", claim, skipped=reason)
            raise
    if not forward.dtypes:
        return Result("state", claim, skipped="computes no convolution or matrix product")
    if not _rebuilds(module) and not calls:
        return Result("state", claim, skipped="computes nothing again in backward")
    strange = backward.dtypes - forward.dtypes - _products_of_plain_backward(subject)
    return nothing_differs(
        claim,
        [
            f"backward computes products in {_dtype(dtype)}, forward only in "
            f"{', '.join(sorted(map(_dtype, forward.dtypes)))}"
            for dtype in strange
        ],
    )


def _why_plain_backward_fails(subject: Subject) -> str:
    """Return why the plain twin has no backward pass under autocast; "" if it has one, or if there is no twin."""
    if subject.plain() is None:
        return ""
    try:
        _products_of_plain_backward(subject)
    except Exception as error:
        return f"under autocast plain backpropagation raised {described(error)}"
    return ""


def _why_not_rebuilt(subject: Subject) -> str:
    """Explain why an inverse cannot rebuild inputs in their dtypes under autocast; "" if all can.

    Look at the module, and at every part of it that has an inverse.
    """
    module, calls = subject.fresh(), []
    blocks = [part for part in module.modules() if callable(getattr(part, "inverse", None))]

    def record(part: nn.Module, inputs: tuple, outputs: object) -> None:
        calls.append((part, inputs, outputs))

    hooks = [part.register_forward_hook(record) for part in blocks]
    with torch.no_grad(), torch.autocast(subject.inputs[0].device.type, torch.bfloat16):
        module(*(x.detach().clone() for x in subject.inputs))
        for hook in hooks:
            hook.remove()
        reasons = (_of_call(part, inputs, outputs) for part, inputs, outputs in calls)
        return next(filter(None, reasons), "")


def _of_call(part: nn.Module, inputs: Sequence, outputs: object) -> str:
    """Explain why the inverse of one block cannot rebuild inputs in their dtypes under autocast; "" if it can."""
    name, given, wanted = type(part).__name__, _dtypes(outputs), _dtypes(inputs)
    if lower := sorted(given - wanted):
        return (
            f"under autocast forward of {name} returns {lower[0]} for inputs of {', '.join(sorted(wanted))}, and no "
            "inverse rebuilds the digits that are lost: keep the stream in float32, with return y.to(x.dtype)"
        )
    values = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    try:
        returned = _dtypes(inverse_of(part)(*values))
    except Exception as error:
        return f"under autocast inverse of {name} raised {described(error)}" if _runs(part, values) else ""
    if lower := sorted(returned - wanted):
        return (
            f"under autocast inverse of {name} returns {lower[0]} for outputs of {', '.join(sorted(given))}: keep the "
            "stream in float32, with return x.to(y.dtype)"
        )
    return ""


def _runs(part: nn.Module, values: Sequence) -> bool:
    """Return whether the inverse of a block runs without autocast. A part may want other arguments, as conditions."""
    try:
        with torch.autocast(next(x.device.type for x in values if isinstance(x, Tensor)), enabled=False):
            inverse_of(part)(*values)
    except Exception:
        return False
    return True


def _dtypes(values: object) -> set[str]:
    """Return the names of the dtypes of the floating-point and complex tensors among ``values``."""
    values = values if isinstance(values, (tuple, list)) else [values]
    return {_dtype(x.dtype) for x in values if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())}


def _rebuilds(module: nn.Module) -> bool:
    return any(isinstance(part, InvertibleModuleWrapper) and not part.disable for part in module.modules())


def _products_of_plain_backward(subject: Subject) -> set[torch.dtype]:
    """Return the dtypes of products in plain backpropagation.

    The derivative of a matrix inverse, for one, is computed in the dtype of the matrix, under autocast as well.
    """
    twin, products = subject.plain(), _Products()
    if twin is None:
        return set()
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in subject.inputs]
    with torch.autocast(leaves[0].device.type, torch.bfloat16):
        outputs = as_tuple(twin(*leaves))
    with products:
        subject.loss([y.float() for y in outputs]).backward()
    return products.dtypes


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warning that a stream in bfloat16 drifts: only dtypes are looked at."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
