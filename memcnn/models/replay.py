"""What a module's second evaluation must see as the first did: random numbers, autocast, modes, buffers."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


class Replay:
    """Made just before the first evaluation of ``module`` on ``inputs``, closed just after it.

    Within the context ``replay()`` a further evaluation gives the same result and leaves the generators and the
    module's buffers as it found them. It raises where a parameter was modified in place in the meantime.
    """

    def __init__(self, module: nn.Module, inputs: Sequence[Tensor], preserve_rng_state: bool):
        self.modules = [(m, m.training) for m in module.modules()]
        self.versions = [(name, p, p._version) for m, _ in self.modules
                         for name, p in m._parameters.items() if p is not None]
        self.buffers = {id(b): (b, b._version, None if _ignores_its_buffers(m) else b.clone())
                        for m, _ in self.modules for b in m._buffers.values() if b is not None}
        devices = {x.device for x in inputs}
        self.autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled())
            for kind in {"cpu", *(d.type for d in devices)} if torch.amp.is_autocast_available(kind)]
        self.generators = []
        if preserve_rng_state:
            self.generators = [(device, _rng_state(device)) for device in {torch.device("cpu"), *devices}
                               if device.type in ("cpu", "cuda")]

    def close(self) -> None:
        """Let go of everything that the evaluation did not change."""
        self.generators = [(device, state) for device, state in self.generators
                           if not torch.equal(state, _rng_state(device))]
        self.buffers = {key: (b, version, None if b._version == version else before)
                        for key, (b, version, before) in self.buffers.items()}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self._check_parameters()
        with ExitStack() as stack:
            for kind, enabled, dtype, cache in self.autocast:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype, enabled, cache))
            for module, training in self.modules:
                if module.training != training:
                    stack.callback(setattr, module, "training", module.training)
                    module.training = training
            for device, state in self.generators:
                stack.callback(_set_rng_state, device, _rng_state(device))
                _set_rng_state(device, state)
            for buffer, _, before in self.buffers.values():
                # .data, since values that are put back must not look like a modification to autograd
                stack.callback(buffer.data.copy_, buffer.clone())
                if before is not None:
                    buffer.data.copy_(before)
            yield

    def _check_parameters(self) -> None:
        for name, parameter, version in self.versions:
            if parameter._version != version:
                raise RuntimeError(
                    f"the parameter {name!r} of shape {tuple(parameter.shape)} was modified between forward and backward, "
                    "so that the activations cannot be rebuilt: call backward before the parameters change")


def _ignores_its_buffers(module: nn.Module) -> bool:
    """Whether the module's output does not depend on its buffers, as for a norm that uses its batch's statistics."""
    return isinstance(module, _NormBase) and module.training


def _rng_state(device: torch.device) -> Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)


def _set_rng_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state, device)
