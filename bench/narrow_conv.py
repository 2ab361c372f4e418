"""Time the convolutions of narrow 3x3 layers: by cuDNN, and by every plan of our kernels.

    python -m bench.narrow_conv                                   the shapes of all six networks, batch 100
    python -m bench.narrow_conv --networks resnet32 --benchmark   cuDNN chooses its algorithm by timing

The first table has a row for each shape and each of output, input gradient and weight gradient: the time of cuDNN and
of every plan, the chosen plan, and the errors of cuDNN and of the chosen plan against float64. The second table shows
how much time the chosen plans save in a step of each network. In a reversible network a step computes the outputs of
reversible blocks twice. The command needs a CUDA device and Triton. The first run compiles a kernel for each plan and
pair of channels, which takes longer than timing them.
"""

import sys
from collections import Counter
from collections.abc import Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.networks import add_networks_option
from memcnn import cli, kernels
from memcnn.kernels.choice import LIBRARY, Operation
from memcnn.kernels.operations import INPUT_GRADIENT, OPERATIONS, OUTPUT, WEIGHT_GRADIENT
from memcnn.models.resnet import MODELS
from memcnn.models.revop import InvertibleModuleWrapper
from memcnn.training.recipe import PUBLISHED

Shape = tuple[int, int, int, int, int]  # N, C_in, C_out, H, W
Case = tuple[str, Shape]  # the name of an operation, and a shape


def cases(network: str, *, batch: int) -> Counter[Case]:
    """Count the convolutions of a training step that ``use_narrow_convolutions`` changes, without computing anything.

    Args:
        network: a name in ``MODELS``.
        batch: images a step.
    """
    found: Counter[Case] = Counter()

    def record(module: nn.Module, inputs: tuple[Tensor]) -> None:
        n, in_channels, height, width = inputs[0].shape
        shape = n, in_channels, module.out_channels, height, width
        for operation in OPERATIONS:
            found[operation.name, shape] += 2 if operation is OUTPUT and module in recomputed else 1

    with torch.device("meta"), torch.no_grad():
        model = MODELS[network](disable=True)
        blocks = [block for block in model.modules() if isinstance(block, InvertibleModuleWrapper)]
        recomputed = {module for block in blocks for module in block.modules()}
        for name in kernels.use_narrow_convolutions(model):
            model.get_submodule(name).register_forward_pre_hook(record)
        model(torch.empty(batch, 3, 32, 32))
    return found


def operands(operation: Operation, shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return two random tensors for an operation of a layer of this shape, in channels_last."""
    n, in_channels, out_channels, height, width = shape
    x, gradient = (n, in_channels, height, width), (n, out_channels, height, width)
    weight = out_channels, in_channels, 3, 3
    first = x if operation is OUTPUT else gradient
    second = x if operation is WEIGHT_GRADIENT else weight
    left, right = (torch.randn(shape, device=device, dtype=dtype) for shape in (first, second))
    return left.to(memory_format=torch.channels_last), right.to(memory_format=torch.channels_last)


def relative_error(operation: Operation, result: Tensor, first: Tensor, second: Tensor) -> float:
    """Return the norm of a result's error, divided by the norm of the exact result in float64."""
    left, right = first.double(), second.double()
    if operation is OUTPUT:
        exact = F.conv2d(left, right, padding=1)
    elif operation is INPUT_GRADIENT:
        exact = F.conv_transpose2d(left, right, padding=1)
    else:
        weight = torch.zeros(result.shape, dtype=torch.float64, device=result.device, requires_grad=True)
        (exact,) = torch.autograd.grad(F.conv2d(right, weight, padding=1), weight, left)
    return ((result - exact).norm() / exact.norm()).item()


def row(operation: Operation, shape: Shape, choices: kernels.Choices, device: torch.device, dtype: torch.dtype) -> dict:
    """Measure one operation for one shape, and return a row of the first table."""
    first, second = operands(operation, shape, device, dtype)
    plan = choices.plan(operation, first, second)
    measurement = choices.measured()[-1]
    library = measurement.microseconds.get(LIBRARY, float("nan"))
    ours = {name: time for name, time in measurement.microseconds.items() if name != LIBRARY}
    best = min(ours.values(), default=float("nan"))
    errors = [relative_error(operation, operation.library(first, second), first, second)]
    if plan is not None:
        errors.append(relative_error(operation, operation.planned(first, second, plan), first, second))
    return {
        "case": (operation.name, shape),
        "result": operation.name,
        "N, C_in, C_out, H, W": ", ".join(map(str, shape)),
        "cuDNN, us": library,
        "ours, us": best,
        "cuDNN / ours": library / best,
        "chosen": measurement.chosen,
        "error, cuDNN": errors[0],
        "error, chosen": errors[-1],
        "all plans, us": "; ".join(f"{name}: {time:.1f}" for name, time in ours.items()),
        "saved": library - min(library, best) if plan is not None else 0.0,
    }


def savings(table: Sequence[dict], steps: dict[str, Counter[Case]]) -> pd.DataFrame:
    """Return for each network the milliseconds of its narrow convolutions: by cuDNN, and by the chosen plans."""
    by_case = {line["case"]: line for line in table}
    rows = []
    for network, counts in steps.items():
        library, saved = (sum(n * by_case[case][key] for case, n in counts.items()) for key in ("cuDNN, us", "saved"))
        rows.append(
            {
                "network": network,
                "convolutions": sum(counts.values()),
                "cuDNN, ms a step": library / 1e3,
                "as chosen, ms a step": (library - saved) / 1e3,
                "saved, ms a step": saved / 1e3,
            }
        )
    return pd.DataFrame(rows)


@cli.command("bench.narrow_conv")
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables. Return 0, or 2 if there is no CUDA device or no Triton."""
    parser = cli.parser_from("bench.narrow_conv", __doc__, whole=True)
    add_networks_option(parser)
    parser.add_argument(
        "--batch", type=cli.count, default=PUBLISHED.batch_size, help="images a step (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--benchmark", action="store_true", help="let cuDNN choose its algorithm by timing")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "bench.narrow_conv found no CUDA device, but measures GPU kernels: run it on a machine with a GPU",
            file=sys.stderr,
        )
        return 2
    try:
        import triton
    except ImportError as error:
        print(f"bench.narrow_conv needs Triton ({error}): install it with `pip install triton`", file=sys.stderr)
        return 2

    steps = {network: cases(network, batch=given.batch) for network in given.networks}
    by_name = {operation.name: operation for operation in OPERATIONS}
    device, choices = torch.device("cuda", torch.cuda.current_device()), kernels.Choices()
    cudnn = torch.backends.cudnn
    with cudnn.flags(enabled=True, benchmark=given.benchmark, deterministic=False, allow_tf32=False):
        table = [
            row(by_name[name], shape, choices, device, getattr(torch, given.dtype))
            for name, shape in dict.fromkeys(case for counts in steps.values() for case in counts)
        ]
    print(
        f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, Triton {triton.__version__}, cuDNN "
        f"{cudnn.version()}, benchmark {'on' if given.benchmark else 'off'}, {given.dtype}\n"
    )
    print(_markdown(pd.DataFrame(table).drop(columns=["case", "saved"])), "\n")
    print(_markdown(savings(table, steps)))
    return 0


def _markdown(table: pd.DataFrame) -> str:
    return table.to_markdown(index=False, floatfmt=".3g")


if __name__ == "__main__":
    sys.exit(main())
