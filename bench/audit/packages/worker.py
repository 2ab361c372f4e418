"""Check the layers of one package in the environment in which it is installed; see ``Package``."""

import importlib
import math
import warnings
from collections.abc import Callable
from importlib.metadata import version

import numpy as np
import torch
from torch import nn

from bench.audit.packages.layers import Flow, Layer
from memcnn.testing import Report, Result, WithLogDet, check_gradients, check_inverse, check_log_det, check_state
from memcnn.testing.laws.subject import NotRunnable

CASES = ((0, 1.0), (1, 0.1), (2, 4.0))
"""Seed and scale of the inputs; eval mode uses only the first case."""


def build(layer: Layer, seed: int) -> nn.Module:
    """Return the layer with seeded and, if the layer asks for it, perturbed parameters."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    module = layer.make()
    if layer.perturb:
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.requires_grad and parameter.is_floating_point():
                    parameter += 0.2 * torch.randn_like(parameter)
    return module


def checked(module: nn.Module, inputs: torch.Tensor, *, wrap: bool) -> dict[str, Report]:
    """Run all checks on a module, and return their reports by column of the table.

    The gradient of a flow is the gradient of a loss that contains its log-determinant.

    Args:
        module: the layer in its adapter.
        inputs: shape (N, ...).
        wrap: also check the layer in this project's engine, for the column "wrapped".
    """
    columns = {"inverse": lambda: check_inverse(module, inputs)}
    if isinstance(module, Flow):
        columns["log_det"] = lambda: check_log_det(module, inputs)
        columns["gradients"] = lambda: check_gradients(WithLogDet(module), inputs, torch.zeros(len(inputs)), wrap=False)
    else:
        columns["gradients"] = lambda: check_gradients(module, inputs, wrap=False)
    columns["state"] = lambda: check_state(module, inputs, wrap=False)
    if wrap:
        columns["wrapped"] = lambda: check_gradients(module, inputs, wrap=True, finite_differences=False)
    return {column: _guarded(column, check) for column, check in columns.items()}


def _guarded(column: str, check: Callable[[], Report]) -> Report:
    try:
        return check()
    except NotRunnable as error:
        return Report((Result(column, "runs", math.inf, 0.0, explanation=str(error)),))


def examine(layer: Layer, mode: str, *, own_engine: bool) -> dict:
    """Check a layer in one mode.

    Returns:
        ``{"columns": {column: [result, ...]}}``, each result with its seed and scale; or ``{"refused": reason}`` if
        the layer cannot be built.
    """
    columns: dict[str, list[dict]] = {}
    for seed, scale in CASES[:1] if mode == "eval" else CASES:
        try:
            module = build(layer, seed).train(mode == "train")
        except Exception as error:
            return {"refused": f"{type(error).__name__}: {error}"}
        inputs = layer.draw(scale * torch.randn(layer.shape, generator=torch.Generator().manual_seed(seed)))
        wrap = mode == "train" and scale == 1.0 and not own_engine
        for column, report in checked(module, inputs, wrap=wrap).items():
            columns.setdefault(column, []).extend({**row, "seed": seed, "scale": scale} for row in report.to_dicts())
    return {"columns": columns}


class Package:
    """The layers of one package. The methods answer the questions of ``bench.worker``."""

    def __init__(self, name: str) -> None:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        self.package = importlib.import_module(f"bench.audit.packages.{name}")

    def layers(self) -> dict:
        """Return the names of all layers."""
        return {"layers": [layer.name for layer in self.package.LAYERS]}

    def check(self, number: int, mode: str) -> dict:
        """Return the row of one layer in one mode ("train" or "eval")."""
        package, layer = self.package, self.package.LAYERS[number]
        found = examine(layer, mode, own_engine=getattr(package, "OWN_ENGINE", False))
        return {
            "package": package.PACKAGE,
            "version": version(package.PACKAGE),
            "layer": layer.name,
            "mode": mode,
            "known": layer.known or {},
            **found,
        }
