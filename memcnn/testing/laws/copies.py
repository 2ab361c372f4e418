"""The law of copies: a module that was copied, pickled or loaded from a state trains on as the original."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from memcnn.testing.laws.limits import Limit
from memcnn.testing.laws.result import Report, Result
from memcnn.testing.laws.subject import Subject
from memcnn.testing.laws.twin import worst


def check_copies(
    module: nn.Module,
    *inputs: Tensor,
    seed: int = 0,
    wrap: bool | None = None,
    make: Callable[[], nn.Module] | None = None,
) -> Report:
    """Check that copies of a module that has trained train on as the module.

    Each copy runs one further training step, whose outputs, gradients, buffers and random numbers must be those of the
    original. It must share no parameter with it, and have the same parameters frozen.

    Args:
        module: a module with ``forward`` and ``inverse``.
        inputs: the arguments of ``forward``.
        seed: seed of torch's generators.
        wrap: as for `check_gradients`.
        make: makes a module of the same structure with other values, into which the state is loaded.
    """
    subject = Subject(module, inputs, seed, wrap)
    copies: dict[str, Callable[[nn.Module], nn.Module]] = {
        "a pickled copy": lambda module: pickle.loads(pickle.dumps(module)),
        "a deep copy": copy.deepcopy,
    }
    if make is not None:
        copies["a module that loads the state"] = lambda module: _loaded(
            replace(subject, module=make()).trained(), module
        )
    return Report(
        tuple(_compare(subject, f"{name} trains on as the module", duplicate) for name, duplicate in copies.items())
    )


def _loaded(other: nn.Module, module: nn.Module) -> nn.Module:
    """Load the state of ``module`` into ``other``, by way of a file."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


def _compare(subject: Subject, claim: str, duplicate: Callable[[nn.Module], nn.Module]) -> Result:
    """Compare a training step of a copy with one of the original, after both have trained."""

    def train_on(module: nn.Module, *inputs: Tensor) -> tuple[Tensor, ...]:
        return subject.step(module, *(x.cos() if x.is_floating_point() else x for x in inputs))

    module = subject.trained()
    subject.run(module)
    module.zero_grad()
    try:
        twin = duplicate(module)
        shared = {p.data_ptr() for p in module.parameters()} & {p.data_ptr() for p in twin.parameters() if p.numel()}
        if shared:
            return Result(
                "copies", claim, len(shared), 0.0, "nothing may be shared", f"{len(shared)} parameters are shared"
            )
        if [p.requires_grad for p in twin.parameters()] != [p.requires_grad for p in module.parameters()]:
            return Result("copies", claim, math.inf, 0.0, "", "other parameters are frozen than in the original")
        got = subject.run(twin, train_on)
    except Exception as exception:
        return Result("copies", claim, math.inf, 0.0, explanation=f"raised {type(exception).__name__}: {exception}")
    wanted = subject.run(module, train_on)
    if not wanted.is_finite:
        return Result("copies", claim, skipped="values are not finite here")
    name, error = worst(got.errors(wanted))
    return Limit(subject.dtype, subject.depth).judge("copies", claim, error, f"{name} differs from the original's")
