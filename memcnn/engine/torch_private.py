"""Every private name of PyTorch that the engine and its couplings use, each with its reason.

``torch.utils._pytree`` and ``torch.utils._python_dispatch``, which PyTorch's documentation itself uses, are imported
where they are needed.

A release of PyTorch may change a private name. This file is then the one to repair. Only three kinds of private
attributes are read where they are needed, since a function call for each saved tensor would cost more than the work:

* ``Tensor._version``: counts in-place modifications. Autograd checks it in the same way.
* ``UntypedStorage._cdata``: the address of the storage object, which changes with ``x.data = ...``. Unlike the address
  of the memory it stays the same when FSDP frees and refills a parameter.
* ``nn.Module._modules``, ``_parameters``, ``_buffers``, ``_forward_hooks`` and the other registries of hooks. The
  replay exchanges entries of these during a recomputation, and the public iterators only return copies. A look-up such
  as ``coupling.Fm`` finds its entry only after a failed look-up elsewhere, which takes ten times as long.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd import Variable, forward_ad
from torch.autograd.graph import GradientEdge, Node
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._device import DeviceContext

eval_frame = torch._C._dynamo.eval_frame
_SKIPPED = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT)
"""Makes the compiler run a function as it is. Functions that it calls are compiled as usual."""

_SKIPPED_WITHIN = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.SKIP)
"""Makes the compiler run a function as it is, and all functions that it calls."""

AnyFunction = TypeVar("AnyFunction", bound=Callable)

NormBase = _NormBase
"""The base of BatchNorm and InstanceNorm, whose running statistics change without a new ``_version``."""

BATCH_NORM_FORWARD = _BatchNorm.forward
"""The forward function of a plain BatchNorm. A subclass that computes something of its own has another one."""

NORM_FORWARDS = (_BatchNorm.forward, SyncBatchNorm.forward, _InstanceNorm.forward)
"""The forward functions whose output in training mode does not depend on the running statistics."""

current_backward_pass: Callable[[], int] = torch._C._current_graph_task_id
"""Number of the running backward pass; -1 outside of any. Rebuilt tensors are dropped at the end of their pass."""

keeps_graph: Callable[[], bool] = torch._C._autograd._get_current_graph_task_keep_graph
"""Return whether the running backward pass was called with ``retain_graph=True``."""

GLOBAL_FORWARD_HOOKS: tuple[tuple[dict, dict], ...] = (
    (torch_module._global_forward_pre_hooks, {}),
    (torch_module._global_forward_hooks, torch_module._global_forward_hooks_with_kwargs),
)
"""Forward pre-hooks and forward hooks that run with every module, and the keys of those that receive keywords."""

GLOBAL_BACKWARD_HOOKS: tuple[dict, ...] = (
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)
"""Backward hooks and backward pre-hooks that run with every module."""


def has_values(x: Tensor) -> bool:
    """Return whether x has values: fake tensors and those on the meta device have a shape alone."""
    return not isinstance(x, FakeTensor) and not x.is_meta


disabled_dispatch = torch._C._DisableTorchDispatch
"""A context without dispatch modes. A mode of fake tensors cannot compare the states of real generators."""

_number_of_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_dispatch_mode: Callable[[int], object] = torch._C._get_dispatch_stack_at
_number_of_function_modes: Callable[[], int] = torch._C._len_torch_function_stack
_function_mode: Callable[[int], object] = torch._C._get_function_stack_at
_functorch_is_active: Callable[[], bool] = torch._C._are_functorch_transforms_active


def at_end_of_backward(function: Callable[[], None]) -> None:
    """Run ``function`` when the running backward pass ends. DDP and FSDP use the same function; none is public."""
    Variable._execution_engine.queue_callback(function)


def wanted_by_pass(nodes: Sequence[tuple[Node, int]]) -> list[bool]:
    """Return for each of a node's ``next_functions`` whether the running backward pass needs a gradient for it.

    All inputs of the node require gradients, so that none of the functions is None.
    """
    try:
        return [_is_wanted(node) for node, _ in nodes]
    except RuntimeError:
        return [_is_asked_for(node) for node, _ in nodes]


_is_wanted: Callable[[Node], bool] = torch._C._will_engine_execute_node


def _is_asked_for(node: Node) -> bool:
    try:
        return _is_wanted(node)
    except RuntimeError:  # PyTorch raises this for a leaf whose gradient ``autograd.grad`` returns
        return True


def gradients_of(edge: GradientEdge, gradient: Tensor, inputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Return the gradients of ``inputs``, given that of the tensor at ``edge``: a fast ``torch.autograd.grad``.

    The gradient may have a larger shape or another dtype than that tensor, if the tensor was broadcast or cast after
    the edge. The pass frees the graph. PyTorch's own function also logs, and passes the compiler's settings on to other
    threads. These graphs need neither.
    """
    return Variable._execution_engine.run_backward(
        (edge,), (gradient,), False, False, tuple(inputs), allow_unreachable=True, accumulate_grad=False
    )


def hooks_see_gradients(parameters: Iterable[Tensor]) -> bool:
    """Return whether a parameter has hooks for its gradient, before it is accumulated or after."""
    return any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters)


def backward_hooks_run(parameters: Iterable[Tensor]) -> bool:
    """Return whether a parameter has hooks for its gradient, or all modules have backward hooks."""
    return any(GLOBAL_BACKWARD_HOOKS) or any(p._backward_hooks for p in parameters)


def remove_backward_hooks(modules: Iterable[nn.Module], undo: list[tuple]) -> None:
    """Remove all backward hooks of modules, global ones too. ``undo`` receives the calls that put them back."""
    for hooks in (*GLOBAL_BACKWARD_HOOKS, *(h for m in modules for h in (m._backward_hooks, m._backward_pre_hooks))):
        if hooks:
            undo.append((hooks.update, hooks.copy()))
            hooks.clear()


def is_hooked(module: nn.Module) -> bool:
    """Return whether a hook, of the module or global, runs when the module is called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def is_observed() -> bool:
    """Return whether global forward hooks, modes or a patched ``nn.Module.__call__`` may change what modules compute.

    A default device does not, nor a dispatch mode whose class says ``only_watches = True``, such as a meter.
    """
    return bool(
        nn.Module.__call__ is not nn.Module._wrapped_call_impl
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or any(not getattr(_dispatch_mode(i), "only_watches", False) for i in range(_number_of_dispatch_modes()))
        or any(type(_function_mode(i)) is not DeviceContext for i in range(_number_of_function_modes()))
    )


def is_transformed() -> bool:
    """Return whether torch.func, forward-mode differentiation, torch.export or torch.jit.trace is running.

    None of these calls the hooks for saved tensors. The flag of torch.export is read directly, because the compiler of
    PyTorch 2.11 treats ``torch.compiler.is_exporting()`` as always true, and blocks would then store their activations
    in compiled models.
    """
    return (
        _functorch_is_active()
        or forward_ad._current_level >= 0
        or torch.compiler._is_exporting_flag
        or torch.jit.is_tracing()
    )


SET_BY_COMPILER = {"_compiled_call_impl", "_is_torch_compile"}
"""The attributes that ``module.compile()`` and ``torch.compile(module)`` set on the module."""


def is_compiled(module: nn.Module) -> bool:
    """Return whether calls of this module run compiled code: after ``module.compile()``, or ``torch.compile(module)``.

    No public function says so.
    """
    return vars(module).get("_compiled_call_impl") is not None or "_orig_mod" in module._modules


def never_compiled(function: AnyFunction) -> AnyFunction:
    """Keep ``torch.compile`` from compiling ``function``, which autograd calls for each saved tensor.

    ``torch.compiler.disable`` does that too, but adds four Python calls to each call, whether or not anything is
    compiled. Functions that ``function`` calls in turn need the same decorator.
    """
    eval_frame.set_code_exec_strategy(function.__code__, _SKIPPED)
    return function


def never_compiled_within(function: AnyFunction) -> AnyFunction:
    """Do the same for ``function`` and everything that it calls, except functions that were compiled before."""
    eval_frame.set_code_exec_strategy(function.__code__, _SKIPPED_WITHIN)
    return function
