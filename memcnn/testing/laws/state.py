"""The law of state: a training step leaves all but gradients as one plain forward pass leaves it."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from memcnn.testing.adapters import inverse_of
from memcnn.testing.laws.autocast import products_keep_their_dtype
from memcnn.testing.laws.guard import described, guarded
from memcnn.testing.laws.hooks import forward_hooks_are_called_once
from memcnn.testing.laws.limits import Limit
from memcnn.testing.laws.passes import graphs_can_be_retained, two_steps_do_not_mix
from memcnn.testing.laws.result import Report, Result, nothing_differs
from memcnn.testing.laws.subject import Subject
from memcnn.testing.laws.twin import is_dense, leaf_like, relative_errors, worst
from memcnn.testing.tolerances import distance

FACTOR = 1.5
"""In-place factor of an output."""


def check_state(
    module: nn.Module, *inputs: Tensor, seed: int = 0, wrap: bool | None = None, autocast: torch.dtype | None = None
) -> Report:
    """Check that a training step changes nothing that a plain forward pass does not change, gradients apart.

    It looks at the caller's inputs and outputs (values, versions, strides, storage), buffers, parameters, modes,
    torch's generators, the number of calls of forward hooks, two forward passes that are under way at once, retained
    graphs, the dtype of products under autocast, an output that is changed in place, evaluation under ``no_grad``, and
    the argument of ``inverse``. Most of it must not differ at all; gradients and buffers have the limits of rounding.
    Arguments as for `check_gradients`.
    """
    subject = Subject(module, inputs, seed, wrap, autocast)
    claims: dict[str, Callable[[Subject, str], Result]] = {
        "the caller's tensors are untouched": _callers_tensors,
        "buffers move once a step": _buffers,
        "parameters, modes and requires_grad stay": _rest_of_the_module,
        "random generators move as in a forward pass": _generators,
        "forward hooks are called once": forward_hooks_are_called_once,
        "two steps under way do not mix": two_steps_do_not_mix,
        "a retained graph is differentiated again": graphs_can_be_retained,
        "products keep autocast's dtype in backward": products_keep_their_dtype,
        "an output that is changed in place is noticed": _changed_output,
    }
    return Report(tuple(_guarded(subject, claim, check) for claim, check in claims.items()))


def _guarded(subject: Subject, claim: str, check: Callable[[Subject, str], Result]) -> Result:
    return guarded("state", claim, check, subject, claim)


def _callers_tensors(subject: Subject, claim: str) -> Result:
    return nothing_differs(claim, [*_changed_by_training(subject), *_changed_without_gradients(subject)])


def _changed_by_training(subject: Subject) -> list[str]:
    """Describe the changes of inputs, outputs and incoming gradients by a training step."""
    module = subject.trained()
    held = [(_intermediate(x), name) for x, name in zip(subject.inputs, subject.input_names, strict=True)]
    before = [_seen(x) for x, _ in held]
    with subject.seeded():
        outputs = subject.call(module, *(x for x, _ in held))
        after = [_seen(y) for y in outputs]
        used = [(i, y) for i, y in enumerate(outputs) if y.requires_grad]
        generator = torch.Generator().manual_seed(subject.seed)
        gradients = [torch.rand(y.shape, generator=generator, device="cpu").to(y) for _, y in used]
        incoming = [_seen(g) for g in gradients]
        if used:
            torch.autograd.backward([y for _, y in used], gradients)
    names = [f"the gradient of output {i}" for i, _ in used]
    return [
        *_changes(held, before, "by a training step"),
        *_changes([(y, f"output {i}") for i, y in enumerate(outputs)], after, "by backward"),
        *_changes(list(zip(gradients, names, strict=True)), incoming, "by backward"),
    ]


def _changed_output(subject: Subject, claim: str) -> Result:
    """Change an output in place before backward, which raises an exception or has the gradients of the change."""

    def stepping(change: Callable[[Tensor], Tensor]) -> Callable[..., None]:
        def program(module: nn.Module, *inputs: Tensor) -> None:
            outputs = subject.call(module, *inputs)
            subject.differentiate([change(y) if y.is_floating_point() else y for y in outputs])

        return program

    try:
        wanted = subject.run(subject.trained(), stepping(lambda y: y * FACTOR))
    except Exception as exception:
        return Result("state", claim, skipped=f"a training step raised {described(exception)}")
    if not wanted.is_finite:
        return Result("state", claim, skipped="values are not finite here")
    try:
        got = subject.run(subject.trained(), stepping(lambda y: y.mul_(FACTOR)))
    except RuntimeError:  # it is noticed
        return Result("state", claim, 0.0, 0.0, "an exception, or the right gradients")
    name, error = worst(relative_errors(got.gradients, wanted.gradients))
    limit = Limit(subject.dtype, 2 * subject.depth, subject.autocast)
    explanation = f"where the output is changed in place before backward, the gradient of {name} is wrong"
    return limit.judge("state", claim, error, explanation)


def _intermediate(x: Tensor) -> Tensor:
    """Return a tensor with the values and strides of x that is computed from a leaf."""
    leaf, _ = leaf_like(x.detach().requires_grad_(x.is_floating_point()))
    value = leaf.clone()
    return value if is_dense(x) else value.as_strided(x.shape, x.stride())


def _changed_without_gradients(subject: Subject) -> list[str]:
    """Describe the changes of inputs under ``no_grad``, and of the argument of ``inverse``."""
    module = subject.trained()
    held = [(leaf_like(x.detach())[1], name) for x, name in zip(subject.inputs, subject.input_names, strict=True)]
    before = [_seen(x) for x, _ in held]
    with torch.no_grad(), subject.seeded():
        outputs = subject.call(module, *(x for x, _ in held))
    faults = _changes(held, before, "without gradients")
    arguments = [(y.clone(), "the argument of inverse") for y in outputs]
    before = [_seen(y) for y, _ in arguments]
    with torch.no_grad(), subject.seeded():
        subject.call(inverse_of(module), *(y for y, _ in arguments))
    return [*faults, *_changes(arguments, before, "by inverse")]


def _seen(x: Tensor) -> tuple[Tensor, int, int, int, tuple[int, ...]]:
    return x.detach().clone(), x._version, x.data_ptr(), x.untyped_storage().nbytes(), x.stride()


def _changes(held: Sequence[tuple[Tensor, str]], before: Sequence[tuple], when: str) -> list[str]:
    """Describe how tensors differ from what ``_seen`` returned before, in values, version, storage or strides."""
    faults = []
    for (x, name), (value, version, address, size, strides) in zip(held, before, strict=True):
        if x.untyped_storage().nbytes() != size:
            faults.append(
                f"the storage of {name} was changed from {size} bytes to {x.untyped_storage().nbytes()} {when}"
            )
        elif x.data_ptr() != address:
            faults.append(f"the storage of {name} was exchanged {when}")
        elif x.stride() != strides:
            faults.append(f"the strides of {name} were changed {when}")
        elif not torch.equal(x.detach(), value) and not value.isnan().any():
            faults.append(f"{name} was overwritten {when}")
        elif x._version != version:
            faults.append(f"{name} was written to {when}")
    return faults


def _buffers(subject: Subject, claim: str) -> Result:
    """Compare the buffers after a step with those of plain training, or of forward; in eval mode, with those before."""
    before, twin = dict(subject.module.named_buffers()), subject.plain()
    if twin is not None:  # a step, since torch's checkpoint moves statistics in backward again
        wanted = subject.run(twin).buffers
    else:
        plain = subject.fresh()
        with torch.no_grad():
            subject.evaluated(plain, subject.inputs)
        wanted = dict(plain.named_buffers())
    got = subject.run(subject.trained()).buffers
    error, name = _difference(got, wanted)
    explanation = name and _explain_buffer(name, before[name], wanted[name], got[name])
    once = subject.fresh().eval()
    with torch.no_grad():
        subject.evaluated(once, subject.inputs)  # a layer that initialises itself has done so
    before_eval = {name: buffer.clone() for name, buffer in once.named_buffers()}
    in_eval, name = _difference(subject.run(replace(subject, module=once).trained()).buffers, before_eval)
    if not explanation and in_eval:
        error, explanation = in_eval, f"in eval mode a step changes buffer {name}"
    limit = Limit(subject.dtype, subject.depth, subject.autocast)
    return limit.judge("state", claim, error, explanation)


def _difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest error, and the buffer that has it."""
    worst, of = 0.0, ""
    for name, wanted in expected.items():
        error = distance([actual[name]], [wanted])
        if not error <= worst:
            worst, of = error, name
    return worst, of


def _explain_buffer(name: str, before: Tensor, wanted: Tensor, got: Tensor) -> str:
    """Explain how a step moves a buffer differently from a forward pass."""
    if wanted.numel() == 1:
        return (
            f"a step takes buffer {name} from {before.item():.6g} to {got.item():.6g}, a forward pass to "
            f"{wanted.item():.6g}"
        )
    before, wanted, got = before.double(), wanted.double(), got.double()
    should = (wanted - before).norm().item()
    return (
        f"a step moves buffer {name} {(got - before).norm().item() / should:.3g} times as far as a forward pass"
        if should
        else f"a step moves buffer {name}, a forward pass does not"
    )


def _rest_of_the_module(subject: Subject, claim: str) -> Result:
    """Check that a step changes no mode, no ``requires_grad`` and no parameter."""
    module, faults = subject.trained(), []
    modes = [(part, part.training) for part in module.modules()]
    parameters = [(p, p.detach().clone(), p.requires_grad) for p in module.parameters()]
    subject.run(module)
    faults += [
        f"{type(part).__name__} was put in {'training' if part.training else 'eval'} mode"
        for part, training in modes
        if part.training != training
    ]
    names = [name for name, _ in subject.module.named_parameters()]
    for name, (parameter, value, requires_grad) in zip(names, parameters, strict=True):
        if parameter.requires_grad != requires_grad:
            faults.append(f"requires_grad of {name} is now {parameter.requires_grad}")
        if not torch.equal(parameter, value) and not _initialises_itself(subject):
            faults.append(f"parameter {name} was changed by a step without an optimiser")
    return nothing_differs(claim, faults)


def _initialises_itself(subject: Subject) -> bool:
    """Return whether a plain forward pass sets parameters, as ActNorm's first does."""
    plain = subject.fresh()
    with torch.no_grad():
        subject.evaluated(plain, subject.inputs)
    return any(not torch.equal(a, b) for a, b in zip(plain.parameters(), subject.module.parameters(), strict=True))


def _generators(subject: Subject, claim: str) -> Result:
    """Check that a step leaves torch's generators in the state in which a forward pass leaves them."""

    def state_after(step: Callable[[], object]) -> list[Tensor]:
        devices = {x.device for x in subject.inputs if x.device.type == "cuda"}
        with subject.seeded():
            for device in (torch.device("cpu"), *devices):
                torch.rand(1, device=device)  # no longer where a module that sets the same seed would put them
            step()
            return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]

    def training_step() -> None:
        module = subject.trained()  # hooks on it may need it alive until backward
        subject.differentiate(subject.call(module, *_leaves(subject)))

    plain = state_after(lambda: subject.call(subject.fresh(), *_leaves(subject)))
    same = all(torch.equal(a, b) for a, b in zip(state_after(training_step), plain, strict=True))
    fault = "a training step draws other random numbers than a forward pass, so that whatever is drawn next differs"
    return nothing_differs(claim, [] if same else [fault])


def _leaves(subject: Subject) -> list[Tensor]:
    return [leaf_like(x.detach().requires_grad_(x.is_floating_point()))[1] for x in subject.inputs]
