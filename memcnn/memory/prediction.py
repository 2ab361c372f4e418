"""The memory and the arithmetic of one training step, predicted without computing it.

The step runs on fake tensors, which have shapes, dtypes and lifetimes but no data, so that a model may be larger than
any device. The bytes are those of ``TensorMeter``: of all tensors, exact, without the scratch memory of kernels.

The order of a step is: forward pass and loss, ``zero_grad()``, backward pass, update. A step that calls ``zero_grad()``
before the forward pass, as those of ``memcnn.training`` do, holds no gradients in its forward pass.
"""

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from .allocator import CUDA_BLOCK_BYTES
from .fake import FakeMode, warn_of_gpu_rnn
from .step import PeakSplit, measure_peak_split

Batch = tuple[Tensor, Tensor]  # inputs and targets
Loss = Callable[[Tensor, Tensor], Tensor]  # of the model's output and the targets: a scalar
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

SGD: MakeOptimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=2e-4)


def predict_step_memory(
    make_model: Callable[[], nn.Module],
    make_batch: Callable[[], Batch],
    *,
    loss: Loss = F.cross_entropy,
    optimizer: MakeOptimizer | None = SGD,
    autocast: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> PeakSplit:
    """Predict the bytes of each kind of tensor at the peak of a training step, without computing it.

    The step is that of ``training_step``: ``zero_grad()`` comes after the forward pass. An LSTM layer on the CPU runs
    once on zeros for each shape of its input, because only oneDNN knows the size of its workspace.

    Args:
        make_model: returns the model, on the CPU, in the mode in which it is trained. It is called on fake tensors,
            and once more on real ones if that fails or if the model contains a part that existed before.
        make_batch: returns inputs and targets, on the CPU. It is called on fake tensors and must not read values.
        loss: returns the loss, a scalar, for the model's output and the targets.
        optimizer: returns an optimiser for the model's parameters; None for a step without an update.
        autocast: dtype of autocast around forward pass and loss, such as ``torch.bfloat16``; None for no autocast.
        device: where the step will run, the CPU or a CUDA device. On CUDA tensors take whole blocks of 512 bytes, and
            optimisers update all parameters at once by default, which takes a copy of the gradients.

    Returns:
        The bytes of each kind of tensor at the peak.

    Raises:
        ValueError: a parameter of the model is uninitialised, or the device is neither a CPU nor a CUDA device.
    """
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device: got {str(device)!r}, wanted cpu or cuda, whose memory can be predicted")
    on_gpu = kind == "cuda"
    with FakeMode() as mode:
        model, optimiser, batch, step = training_step(
            partial(_make_fake, make_model, mode),
            make_batch,
            loss=loss,
            optimizer=optimizer,
            autocast=autocast,
            all_at_once=on_gpu,
        )
        if on_gpu and any(isinstance(module, nn.RNNBase) for module in model.modules()):
            warn_of_gpu_rnn()
        block_bytes = CUDA_BLOCK_BYTES if on_gpu else 1
        return measure_peak_split(model, step, optimizer=optimiser, batch=batch, block_bytes=block_bytes)


def step_flops(
    make_model: Callable[[], nn.Module],
    make_batch: Callable[[], Batch],
    *,
    loss: Loss = F.cross_entropy,
    autocast: torch.dtype | None = None,
) -> int:
    """Count the floating-point operations of one forward and backward pass, recomputation included.

    Matrix products and convolutions count, as in ``torch.utils.flop_counter``: a multiplication and an addition are
    two operations. The rest of a step is small beside them. The arguments are those of ``predict_step_memory``.

    Returns:
        The number of operations.
    """
    with FakeMode() as mode:
        *_, step = training_step(
            partial(_make_fake, make_model, mode), make_batch, loss=loss, optimizer=None, autocast=autocast
        )
        with FlopCounterMode(display=False) as counter:
            step()
    return counter.get_total_flops()


def training_step(
    make_model: Callable[[], nn.Module],
    make_batch: Callable[[], Batch],
    *,
    loss: Loss = F.cross_entropy,
    optimizer: MakeOptimizer | None = SGD,
    autocast: torch.dtype | None = None,
    all_at_once: bool = False,
) -> tuple[nn.Module, torch.optim.Optimizer | None, Batch, Callable[[], None]]:
    """Return the model, its optimiser, its batch, and a function that trains the model on the batch once.

    The function runs forward pass and loss, ``zero_grad()``, backward pass and update, in this order.

    Args:
        make_model: returns the model.
        make_batch: returns inputs and targets.
        loss: returns the loss, a scalar, for the model's output and the targets.
        optimizer: returns an optimiser for the model's parameters; None for a step without an update.
        autocast: dtype of autocast around forward pass and loss; None for no autocast.
        all_at_once: update all parameters in one operation, unless the optimiser itself asks for something else.
    """
    model, batch = make_model(), make_batch()
    optimiser = None if optimizer is None else optimizer(model.parameters())
    for group in optimiser.param_groups if optimiser and all_at_once else ():
        if group.get("foreach", True) is None and not group.get("fused"):
            group["foreach"] = True
    inputs, targets = batch
    device_type = inputs.device.type

    def step() -> None:
        with torch.autocast(device_type, dtype=autocast, enabled=autocast is not None):
            outputs = model(inputs)
            value = loss(outputs, targets)
        model.zero_grad() if optimiser is None else optimiser.zero_grad()
        value.backward()
        if optimiser is not None:
            optimiser.step()

    return model, optimiser, batch, step


class _FakeCopies(TorchFunctionMode):
    """A mode in which ``copy.deepcopy`` can copy fake tensors. A coupling that is given only F makes such a copy.

    ``Tensor.__deepcopy__`` would copy their ``FakeTensorMode`` too, but tensors of two modes cannot be mixed.
    """

    def __torch_function__(
        self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function is not Tensor.__deepcopy__ or not isinstance(args[0], FakeTensor):
            return function(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            if not tensor.is_leaf:
                raise RuntimeError("a tensor that autograd computed cannot be deep-copied: detach it first")
            new = tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_(tensor.requires_grad)
            memo[id(tensor)] = new
            for name in vars(tensor).keys() - vars(new).keys():
                setattr(new, name, copy.deepcopy(vars(tensor)[name], memo))
            if tensor.grad is not None:
                new.grad = copy.deepcopy(tensor.grad, memo)
        return memo[id(tensor)]


def _make_fake(make_model: Callable[[], nn.Module], mode: FakeMode) -> nn.Module:
    """Return the model with fake parameters and buffers.

    If the model cannot be made on fake tensors alone, make it on real ones: ``Module.to``, pickles and models that
    exist already need that.
    """
    try:
        with _FakeCopies():
            model = make_model()
        if _is_fake(model):
            return model
    except Exception:  # if the model itself is faulty, the second try raises
        pass
    with unset_fake_temporarily(), torch.random.fork_rng(devices=[]):
        model = make_model()
    if _is_fake(model):
        return model
    with unset_fake_temporarily():
        model = copy.deepcopy(model)  # the caller may hold the real model
    for module in model.modules():
        registries: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for values in registries:
            real = {n: v for n, v in values.items() if isinstance(v, Tensor) and not isinstance(v, FakeTensor)}
            values.update({name: mode.from_tensor(value) for name, value in real.items()})
    return model


def _is_fake(model: nn.Module) -> bool:
    """Return whether all parameters and buffers are fake. Raise a ValueError if one is uninitialised."""
    tensors = [*model.named_parameters(), *model.named_buffers()] if isinstance(model, nn.Module) else []
    for name, tensor in tensors:
        if is_lazy(tensor):
            raise ValueError(
                f"{name} is uninitialised, as the parameters of lazy layers are before their first forward pass: let "
                "make_model call the model once on an input, under torch.no_grad(), before it returns it"
            )
    return all(isinstance(tensor, FakeTensor) for _, tensor in tensors)
