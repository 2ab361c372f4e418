"""The law of state: a training step leaves all but gradients as one plain forward pass leaves it."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from memcnn.testing.laws.autocast import products_keep_their_dtype
from memcnn.testing.laws.hooks import forward_hooks_are_called_once
from memcnn.testing.laws.result import Report, Result, nothing_differs
from memcnn.testing.laws.step import gradients_of
from memcnn.testing.laws.subject import Subject, as_tuple, reordered
from memcnn.testing.tolerances import describe, distance, tolerance


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
        "forward hooks are called once": forward_hooks_are_called_once,
        "two steps under way do not mix": _two_steps,
        "products keep autocast's dtype in backward": products_keep_their_dtype,
    }
    return Report(tuple(_guarded(subject, claim, check) for claim, check in claims.items()))


def _guarded(subject: Subject, claim: str, check: Callable[[Subject, str], Result]) -> Result:
    try:
        return check(subject, claim)
    except Exception as error:
        return Result("state", claim, math.inf, 0.0, explanation=f"raised {type(error).__name__}: {error}")


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
    return nothing_differs(claim, faults)


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
    return nothing_differs(claim, faults)


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
    told = "a training step draws other random numbers than a forward pass, so that whatever is drawn next differs"
    return nothing_differs(claim, [] if same else [told])


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
