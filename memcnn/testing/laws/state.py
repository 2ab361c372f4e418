"""The law of state: a training step leaves all but gradients as one plain forward pass leaves it."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from memcnn.models.revop import InvertibleModuleWrapper
from memcnn.testing.laws.result import Report, Result
from memcnn.testing.laws.step import gradients_of
from memcnn.testing.laws.subject import Subject, as_tuple, reordered
from memcnn.testing.tolerances import describe, distance, tolerance

aten = torch.ops.aten
PRODUCTS = {aten.convolution.default, aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default,
            aten._scaled_dot_product_flash_attention_for_cpu.default, aten._scaled_dot_product_flash_attention.default}

TOLD = 3
"""Of faults of one kind, as many as are told one by one."""


def check_state(module: nn.Module, *inputs: Tensor, seed: int = 0, wrap: bool | None = None) -> Report:
    """Whether a training step changes nothing that a plain forward pass does not, gradients apart.

    Looked at are: the caller's inputs and outputs (values, versions, storage), buffers, parameters, modes, torch's
    generators, how often forward hooks are called, the dtype of products under autocast, evaluation under ``no_grad``,
    the argument of ``inverse``, and two forward passes that are under way at once. Arguments as for `check_gradients`.
    """
    subject = Subject(module, inputs, seed, wrap)
    claims: dict[str, Callable[[Subject], Result]] = {
        "the caller's tensors are untouched": _callers_tensors,
        "buffers move once a step": _buffers,
        "parameters, modes and requires_grad stay": _rest_of_the_module,
        "random generators move as in a forward pass": _generators,
        "forward hooks are called once": _hooks,
        "two steps under way do not mix": _two_steps,
        "products keep autocast's dtype in backward": _autocast,
    }
    return Report(tuple(_guarded(subject, claim, check) for claim, check in claims.items()))


def _guarded(subject: Subject, claim: str, check: Callable[[Subject, str], Result]) -> Result:
    try:
        return check(subject, claim)
    except Exception as error:
        return Result("state", claim, math.inf, 0.0, explanation=f"raised {type(error).__name__}: {error}")


def _counted(claim: str, faults: Sequence[str]) -> Result:
    told = list(dict.fromkeys(faults))
    rest = [f"and {len(told) - TOLD} more"] if len(told) > TOLD else []
    return Result("state", claim, len(faults), 0, "nothing may differ", "; ".join(told[:TOLD] + rest))


def _callers_tensors(subject: Subject, claim: str) -> Result:
    faults = []
    for training in (True, False):
        module, leaves = subject.trained(), subject.leaves()
        held = [(x * 1 if training else x.detach(), name) for x, name in zip(leaves, subject.input_names, strict=True)]
        before = [_seen(x) for x, _ in held]
        with torch.set_grad_enabled(training), subject.seeded():
            outputs = as_tuple(module(*(x for x, _ in held)))
        after = [_seen(y) for y in outputs]
        if training:
            subject.loss(outputs).backward()
        else:
            faults += _changes(held, before, "without gradients")
            arguments = [(y.clone(), "the argument of inverse") for y in outputs]
            values = [_seen(y) for y, _ in arguments]
            with torch.no_grad(), subject.seeded():
                module.inverse(*(y for y, _ in arguments))
            faults += _changes(arguments, values, "by inverse")
            continue
        faults += _changes(held, before, "by a training step")
        faults += _changes([(y, f"output {i}") for i, y in enumerate(outputs)], after, "by backward")
    return _counted(claim, faults)


def _seen(x: Tensor) -> tuple[Tensor, int, int, int]:
    return x.detach().clone(), x._version, x.data_ptr(), x.untyped_storage().nbytes()


def _changes(held: Sequence[tuple[Tensor, str]], before: Sequence[tuple], when: str) -> list[str]:
    faults = []
    for (x, name), (value, version, address, size) in zip(held, before, strict=True):
        if x.untyped_storage().nbytes() != size:
            faults.append(f"the storage of {name} was changed from {size} bytes to "
                          f"{x.untyped_storage().nbytes()} {when}")
        elif x.data_ptr() != address:
            faults.append(f"the storage of {name} was exchanged {when}")
        elif not torch.equal(x.detach(), value) and not value.isnan().any():
            faults.append(f"{name} was overwritten {when}")
        elif x._version != version:
            faults.append(f"{name} was written to {when}")
    return faults


def _buffers(subject: Subject, claim: str) -> Result:
    """Compared with a plain forward pass; those of evaluation with what they were."""
    trained, plain = subject.trained(), subject.fresh()
    gradients_of(subject, trained)
    with torch.no_grad():
        subject.evaluated(plain, subject.inputs)
    error, name = _difference(_named(subject, trained), dict(plain.named_buffers()))
    told = name and _told_of_buffer(name, *(dict(m.named_buffers())[name] for m in (subject.module, plain)),
                                    _named(subject, trained)[name])
    evaluated = subject.trained().eval()
    gradients_of(subject, evaluated)
    in_eval, name = _difference(_named(subject, evaluated), dict(subject.module.named_buffers()))
    if not told and in_eval:
        error, told = in_eval, f"in eval mode a step changes buffer {name}"
    return Result("state", claim, error, tolerance(subject.dtype), describe(subject.dtype),
                  told if not error <= tolerance(subject.dtype) else "")


def _named(subject: Subject, trained: nn.Module) -> dict[str, Tensor]:
    names = [name for name, _ in subject.module.named_buffers()]
    return dict(zip(names, trained.buffers(), strict=True))


def _difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest error, and the buffer that has it."""
    worst, of = 0.0, ""
    for name, wanted in expected.items():
        error = distance([actual[name]], [wanted])
        if not error <= worst:
            worst, of = error, name
    return worst, of


def _told_of_buffer(name: str, before: Tensor, wanted: Tensor, got: Tensor) -> str:
    if wanted.numel() == 1:
        return (f"a step takes buffer {name} from {before.item():.6g} to {got.item():.6g}, a forward pass to "
                f"{wanted.item():.6g}")
    before, wanted, got = before.double(), wanted.double(), got.double()
    should = (wanted - before).norm().item()
    return (f"a step moves buffer {name} {(got - before).norm().item() / should:.3g} times as far as a forward pass"
            if should else f"a step moves buffer {name}, a forward pass does not")


def _rest_of_the_module(subject: Subject, claim: str) -> Result:
    module, faults = subject.trained(), []
    modes = [(part, part.training) for part in module.modules()]
    parameters = [(p, p.detach().clone(), p.requires_grad) for p in module.parameters()]
    gradients_of(subject, module)
    faults += [f"{type(part).__name__} was put in {'training' if part.training else 'eval'} mode"
               for part, training in modes if part.training != training]
    names = [name for name, _ in subject.module.named_parameters()]
    for name, (parameter, value, requires_grad) in zip(names, parameters, strict=True):
        if parameter.requires_grad != requires_grad:
            faults.append(f"requires_grad of {name} is now {parameter.requires_grad}")
        if not torch.equal(parameter, value) and not _initialises_itself(subject):
            faults.append(f"parameter {name} was changed by a step without an optimiser")
    return _counted(claim, faults)


def _initialises_itself(subject: Subject) -> bool:
    """Whether a plain forward pass sets parameters, as ActNorm's first does."""
    plain = subject.fresh()
    with torch.no_grad():
        subject.evaluated(plain, subject.inputs)
    return any(not torch.equal(a, b) for a, b in zip(plain.parameters(), subject.module.parameters(), strict=True))


def _generators(subject: Subject, claim: str) -> Result:
    def state_after(step: Callable[[], object]) -> list[Tensor]:
        devices = {x.device for x in subject.inputs if x.device.type == "cuda"}
        with subject.seeded():
            for device in (torch.device("cpu"), *devices):
                torch.rand(1, device=device)  # no longer where a module that sets the same seed would put them
            step()
            return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]

    def training_step() -> None:
        module = subject.trained()  # alive until backward, as hooks on it want
        subject.loss(as_tuple(module(*subject.leaves()))).backward()

    plain = state_after(lambda: subject.fresh()(*subject.leaves()))
    same = all(torch.equal(a, b) for a, b in zip(state_after(training_step), plain, strict=True))
    return _counted(claim, [] if same else ["a training step draws other random numbers than a forward pass, so that "
                                            "whatever is drawn next differs"])


def _hooks(subject: Subject, claim: str) -> Result:
    calls = _calls(subject, subject.trained(), lambda module: gradients_of(subject, module))
    with torch.no_grad():
        wanted = _calls(subject, subject.fresh(), lambda module: subject.evaluated(module, subject.inputs))
    faults = [f"the forward hook of {name or type(subject.module).__name__} was called {calls[name]} times a step, not "
              f"{wanted[name]}" for name in wanted if calls[name] != wanted[name]]
    faults += _unheard(subject)
    return _counted(claim, faults)


def _unheard(subject: Subject) -> list[str]:
    """Parts whose hooks a plain forward pass leaves out, as one does that calls ``part.forward(x)``."""
    module, evaluated, heard = subject.fresh(), Counter(), Counter()
    for name, part in module.named_modules():
        def counted(*args, name: str = name, forward: Callable = part.forward, **kwargs):
            evaluated.update([name])
            return forward(*args, **kwargs)
        part.forward = counted
        part.register_forward_hook(lambda *_, name=name: heard.update([name]))
    with torch.no_grad():
        subject.evaluated(module, subject.inputs)
    return [f"the forward hook of {name or type(subject.module).__name__} is called {heard[name]} times in a forward "
            f"pass that evaluates it {times} times" for name, times in evaluated.items() if heard[name] < times]


def _calls(subject: Subject, module: nn.Module, run: Callable[[nn.Module], object]) -> Counter:
    """How often each part of ``subject.module`` is called in ``run``, by its name there."""
    calls: Counter = Counter()
    offset = len(list(module.modules())) - len(list(subject.module.modules()))  # a wrapper around it
    for (name, _), part in zip(subject.module.named_modules(), list(module.modules())[offset:], strict=True):
        part.register_forward_hook(lambda *_, name=name: calls.update([name]))
    run(module)
    return calls


def _two_steps(subject: Subject, claim: str) -> Result:
    """Two forward passes, then their backward passes in either order, against one after the other."""
    others = [reordered(x) for x in subject.inputs]
    batches = (subject.inputs, others)

    def gradients(order: Sequence[int] | None) -> list[Tensor]:
        module, steps, found = subject.trained(), [], {}
        parameters = [p for p in module.parameters() if p.requires_grad]

        def differentiate(i: int) -> None:
            loss, leaves = steps[i]
            for parameter in parameters:
                parameter.grad = None
            loss.backward()
            found[i] = [torch.zeros_like(x) if x.grad is None else x.grad for x in (*leaves, *parameters)]

        for i, batch in enumerate(batches):
            leaves = [x.detach().clone().requires_grad_() for x in batch if x.is_floating_point()]
            floating = iter(leaves)
            with subject.seeded(run=i):
                outputs = module(*(next(floating) if x.is_floating_point() else x for x in batch))
                steps.append((subject.loss(as_tuple(outputs)), leaves))
            if order is None:
                differentiate(i)
        for i in order or ():
            differentiate(i)
        return [*found[0], *found[1]]

    wanted = gradients(None)
    if not all(g.isfinite().all() for g in wanted):
        return Result("state", claim, skipped="gradients are not finite here")
    error = max(distance(gradients(order), wanted) for order in ((0, 1), (1, 0)))
    limit = tolerance(subject.dtype, depth=subject.depth)
    return Result("state", claim, error, limit, describe(subject.dtype, depth=subject.depth),
                  "a second forward pass before the backward pass of the first changes the gradients: the module keeps "
                  "a pass's values on itself" if not error <= limit else "")


class _Products(TorchDispatchMode):
    """Notes the dtypes in which convolutions and matrix products are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in PRODUCTS:
            self.dtypes |= {x.dtype for x in args if isinstance(x, Tensor) and x.is_floating_point()}
        return func(*args, **(kwargs or {}))


def _autocast(subject: Subject, claim: str) -> Result:
    device = subject.inputs[0].device.type
    module, leaves, forward, backward = subject.trained(), subject.leaves(), _Products(), _Products()
    if subject.dtype != torch.float32 or not torch.amp.is_autocast_available(device):
        return Result("state", claim, skipped="autocast acts on float32 inputs")
    with _quiet(), subject.seeded():
        try:
            with torch.autocast(device, torch.bfloat16), forward:
                outputs = as_tuple(module(*leaves))
        except Exception as error:
            return Result("state", claim, skipped=f"does not run under autocast: {type(error).__name__}: {error}")
        if _rebuilds(module) and {y.dtype for y in outputs} - {x.dtype for x in leaves}:
            return Result("state", claim, skipped="under autocast the output is of lower precision than the input, "
                                                  "which no inverse rebuilds from it; keep the stream in float32")
        calls = Counter()
        for part in module.modules():
            part.register_forward_pre_hook(lambda *_: calls.update(["in backward"]))
        loss = subject.loss([y.float() for y in outputs])
        with backward:
            loss.backward()
    if not forward.dtypes:
        return Result("state", claim, skipped="computes no convolution or matrix product")
    if not _rebuilds(module) and not calls:
        return Result("state", claim, skipped="computes nothing again in backward")
    strange = backward.dtypes - forward.dtypes - _products_of_plain_backward(subject)
    return _counted(claim, [f"backward computes products in {_dtype(dtype)}, forward only in "
                            f"{', '.join(sorted(map(_dtype, forward.dtypes)))}" for dtype in strange])


def _rebuilds(module: nn.Module) -> bool:
    return any(isinstance(part, InvertibleModuleWrapper) and not part.disable for part in module.modules())


def _products_of_plain_backward(subject: Subject) -> set[torch.dtype]:
    """That of a matrix inverse, for one, is computed in the dtype of the matrix, under autocast, too."""
    twin, products = subject.plain(), _Products()
    if twin is None:
        return set()
    leaves = subject.leaves()
    with torch.autocast(leaves[0].device.type, torch.bfloat16):
        outputs = as_tuple(twin(*leaves))
    with products:
        subject.loss([y.float() for y in outputs]).backward()
    return products.dtypes


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that a stream in bfloat16 drifts: only dtypes are looked at."""
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
