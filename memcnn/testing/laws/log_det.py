"""The law of the log-determinant: what a flow layer reports is that of its Jacobian, computed column by column."""

import math

import torch
from torch import Tensor, nn

from memcnn.testing.laws.conditioning import hopeless
from memcnn.testing.laws.result import Report, Result
from memcnn.testing.laws.subject import Subject, sample_by_sample
from memcnn.testing.tolerances import describe, tolerance

LARGEST_SAMPLE = 1024
"""Entries of a sample beyond which its Jacobian is not computed."""


def check_log_det(module: nn.Module, *inputs: Tensor, seed: int = 0) -> Report:
    """Whether ``forward_log_det`` and ``inverse_log_det`` report log|det| of the Jacobian of each sample, in float64.

    Args:
        module: whose ``forward_log_det(x)`` gives y and (N,) values, and whose ``inverse_log_det(y)``, if it has one,
            gives x and (N,) values. Runs in its own mode, but with dropout off, and batch normalisation in eval mode:
            with the statistics of the batch, no sample has a Jacobian of its own.
        inputs: one tensor (N, ...) of at most 1024 entries a sample.
    """
    subject = Subject(module, inputs, seed)
    if not callable(getattr(module, "forward_log_det", None)):
        raise TypeError(f"the module must have forward_log_det(x), giving y and a log-determinant for each sample: "
                        f"{type(module).__name__} has none")
    (x, *others), results = inputs, []
    if others or not x.numel() or x[0].numel() > LARGEST_SAMPLE:
        reason = f"wants one input of at most {LARGEST_SAMPLE} entries a sample"
        return Report((Result("log_det", "forward_log_det", skipped=reason),))
    exact = subject.in_double()
    with exact.seeded():
        start = exact.fresh()
        sample_by_sample(start)
        y = start(exact.inputs[0]).detach()
    for method, values in (("forward_log_det", exact.inputs[0]), ("inverse_log_det", y)):
        if callable(getattr(module, method, None)):
            results.append(_compared(exact, method, values))
    return Report(tuple(results))


def _compared(subject: Subject, method: str, values: Tensor) -> Result:
    module = subject.fresh()
    sample_by_sample(module)
    function = getattr(module, method)
    claim = f"{method} is log|det| of the Jacobian"
    try:
        with torch.no_grad(), subject.seeded():
            reported = function(values)[1]
        if reported.shape != values.shape[:1]:
            return Result("log_det", claim, math.inf, 0.0,
                          explanation=f"got shape {tuple(reported.shape)}, wanted one value a sample: "
                                      f"({values.shape[0]},)")
        jacobians = _jacobians(subject, method, values)
    except Exception as error:
        return Result("log_det", claim, math.inf, 0.0, explanation=f"raised {type(error).__name__}: {error}")
    wanted = torch.linalg.slogdet(jacobians).logabsdet.cpu()
    scale = {"depth": subject.depth, "condition": max(1.0, torch.linalg.cond(jacobians).max().item())}
    limit, source = tolerance(torch.float64, **scale), describe(torch.float64, **scale)
    difference = reported.cpu().double() - wanted
    error = (difference.abs().max() / max(1.0, wanted.abs().max().item())).item()
    told = f"{method} says {_numbers(reported)}, the Jacobian {_numbers(wanted)}"
    if wanted.any():
        ratio = ((reported.cpu().double() * wanted).sum() / wanted.square().sum()).item()
        if error <= tolerance(torch.float32):
            told = f"{method} is {error:.1g} off in float64, as in float32: something in it is of float32"
        elif (reported.cpu() + wanted).abs().max() < 1e-6 * wanted.abs().max():
            told += ": the sign is reversed"
        elif (reported.cpu() - ratio * wanted).abs().max() < 1e-6 * wanted.abs().max():
            told += f": {ratio:.4g} times as much"
    return Result("log_det", claim, error, limit, source, "" if error <= limit else told,
                  hopeless(limit, scale["condition"]))


def _jacobians(subject: Subject, method: str, values: Tensor) -> Tensor:
    """Of each sample, (N, D, D), by plain backpropagation of one output entry of all samples at a time."""
    twin = subject.plain() or subject.fresh()
    sample_by_sample(twin)
    x = values.detach().clone().requires_grad_()
    with subject.seeded():
        y = getattr(twin, method)(x)[0].flatten(1)
    if y.shape != x.flatten(1).shape:
        raise ValueError(f"an output of {y.shape[1]} entries a sample for an input of {x[0].numel()}")
    rows = [torch.autograd.grad(entry.sum(), x, retain_graph=True)[0].flatten(1) for entry in y.unbind(1)]
    return torch.stack(rows, 1)


def _numbers(values: Tensor) -> str:
    return ", ".join(f"{value:.6g}" for value in values[:3].tolist()) + (", ..." if len(values) > 3 else "")
