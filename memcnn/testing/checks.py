"""All checks of a module at once."""

import inspect
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from memcnn.models.revop import InvertibleModuleWrapper
from memcnn.testing.adapters import Conditioned, inverse_of
from memcnn.testing.laws.gradients import check_gradients
from memcnn.testing.laws.guard import failure
from memcnn.testing.laws.inverse import check_inverse
from memcnn.testing.laws.log_det import check_log_det, has_log_det
from memcnn.testing.laws.memory import check_memory
from memcnn.testing.laws.result import Report
from memcnn.testing.laws.state import check_state
from memcnn.testing.laws.subject import NotRunnable, as_tuple, exited
from memcnn.testing.laws.twin import duplicate

LAWS: dict[str, Callable[..., Report]] = {
    "inverse": check_inverse,
    "gradients": check_gradients,
    "state": check_state,
    "memory": check_memory,
    "log_det": check_log_det,
}
UNWRAPPED = ("inverse", "log_det")
"""Laws of the module as it is: their checks never wrap it, so they have no option ``wrap``."""
OPTIONS = {
    "inverse": ("deepest", "autocast"),
    "gradients": ("finite_differences", "autocast", "through_inverse"),
    "state": ("autocast",),
    "memory": ("depths", "chain", "passes", "allowance"),
    "log_det": ("finite_differences", "through_inverse"),
}
"""The options of the laws' checks, beside ``seed`` and ``wrap``."""


def check_all(
    module: nn.Module,
    *inputs: Tensor,
    seed: int = 0,
    wrap: bool | None = None,
    laws: Collection[str] | None = None,
    **options: Any,
) -> Report:
    """Check every law that applies: inverse, gradients, state, memory, and log_det where the module has one.

    Args:
        module: a module with ``forward`` and ``inverse``, wrapped or not; only copies of it are run.
        inputs: the arguments of ``forward``. Random ones find more faults than constant ones. The last ones may be
            conditions: where ``inverse`` takes as many arguments as ``forward`` and forward returns fewer, they are
            handed to ``inverse`` behind the outputs.
        seed: seed of torch's generators at every evaluation.
        wrap: run it in an `InvertibleModuleWrapper`, as it would be trained. None: if nothing in it is wrapped yet;
            False: it has an engine of its own.
        laws: only these.
        options: those of the single checks, such as ``finite_differences`` of `check_gradients` or ``depths`` and
            ``chain`` of `check_memory`; each check gets those that it has.

    Raises:
        ValueError: a law is unknown.
        TypeError: an option is unknown, or the module or the inputs are not of the kinds that can be checked.
        NotRunnable: ``forward`` raises an exception for the inputs. This is a ValueError.
    """
    unknown = set(laws or ()) - set(LAWS)
    if unknown:
        raise ValueError(f"laws: got {', '.join(sorted(unknown))}; choose from {', '.join(LAWS)}")
    known = {name for names in OPTIONS.values() for name in names}
    if strange := set(options) - known:
        raise TypeError(f"options: got {', '.join(sorted(strange))}; choose from {', '.join(sorted(known))}")
    report, module = Report(()), _with_conditions(module, inputs)
    for law, check in LAWS.items():
        wanted = law in laws if laws is not None else law != "log_det" or has_log_det(module)
        if wanted:
            own = {name: options[name] for name in OPTIONS.get(law, ()) if name in options}
            run = partial(check, module, *inputs, seed=seed, **own, **({} if law in UNWRAPPED else {"wrap": wrap}))
            try:
                report += run()
            except NotRunnable:
                raise
            except SystemExit as error:  # raised by an inverse that an engine calls in backward
                report += Report((failure(law, "the module can be checked", exited(error)),))
            except Exception as error:
                report += Report((failure(law, "the module can be checked", error),))
    return report


def _with_conditions(module: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
    """Return the module in a `Conditioned` if its ``inverse`` wants some of the inputs again; else the module."""
    if len(inputs) < 2 or not callable(getattr(module, "inverse", None)) or isinstance(module, Conditioned):
        return module
    unwrapped = module._fn if isinstance(module, InvertibleModuleWrapper) else module
    try:
        parameters = inspect.signature(inverse_of(unwrapped)).parameters.values()
        taken = [p for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]
        wanted = [p for p in taken if p.default is p.empty]
        copy = duplicate(module)
        with torch.no_grad():
            outputs = as_tuple(copy(*(x.detach().clone() for x in inputs)))
            given = len(outputs)
            if not len(wanted) <= len(inputs) <= len(taken) or len(inputs) <= given:
                return module
            if len(wanted) <= given and len(as_tuple(inverse_of(copy)(*outputs))) == len(inputs):
                return module  # further arguments are options: the outputs alone give all inputs back
    except Exception:  # the checks report it
        return module
    return Conditioned(module, len(inputs) - given)
