"""Time the weight gradients of narrow 3x3 convolutions: by cuDNN, and by every plan of our kernel.

    python -m bench.narrow_conv                                   the shapes of all six networks, batch 100
    python -m bench.narrow_conv --networks resnet32 --benchmark   cuDNN chooses its algorithm by timing

The first table has a row for each shape: the time of cuDNN and of every plan, the chosen plan, and the errors of cuDNN
and of the chosen plan against float64. The second table shows how much time the chosen plans save in a step of each
network. The command needs a CUDA device and Triton. The first run compiles about ten kernels, which takes longer than
timing them.
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
from memcnn.kernels import choice
from memcnn.models.resnet import MODELS
from memcnn.training.recipe import PUBLISHED

Shape = tuple[int, int, int, int, int]  # N, C_in, C_out, H, W


def shapes(network: str, *, batch: int) -> Counter[Shape]:
    """Count by shape the layers that ``use_narrow_convolutions`` changes, without computing anything.

    Args:
        network: a name in ``MODELS``.
        batch: images a step.
    """
    found: Counter[Shape] = Counter()

    def record(module: nn.Module, inputs: tuple[Tensor]) -> None:
        n, in_channels, height, width = inputs[0].shape
        found[n, in_channels, module.out_channels, height, width] += 1

    with torch.device("meta"), torch.no_grad():
        model = MODELS[network](disable=True)
        for name in kernels.use_narrow_convolutions(model):
            model.get_submodule(name).register_forward_pre_hook(record)
        model(torch.empty(batch, 3, 32, 32))
    return found


def relative_error(result: Tensor, output_gradient: Tensor, x: Tensor) -> float:
    """Return the norm of a weight gradient's error, divided by the norm of the gradient in float64."""
    weight = torch.zeros(result.shape, dtype=torch.float64, device=x.device, requires_grad=True)
    (exact,) = torch.autograd.grad(F.conv2d(x.double(), weight, padding=1), weight, output_gradient.double())
    return ((result - exact).norm() / exact.norm()).item()


def row(shape: Shape, choices: kernels.Choices, device: torch.device, dtype: torch.dtype) -> dict:
    """Measure one shape, and return a row of the first table."""
    n, in_channels, out_channels, height, width = shape
    x, gradient = (
        torch.randn(n, c, height, width, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
        for c in (in_channels, out_channels)
    )
    plan = choices.plan(gradient, x)
    measurement = choices.measured()[-1]
    library = measurement.microseconds.get(choice.LIBRARY, float("nan"))
    ours = {name: time for name, time in measurement.microseconds.items() if name != choice.LIBRARY}
    best = min(ours.values(), default=float("nan"))
    errors = [relative_error(choice.library_weight_gradient(gradient, x), gradient, x)]
    if plan is not None:
        errors.append(relative_error(choice.planned_weight_gradient(gradient, x, plan), gradient, x))
    return {
        "shape": shape,
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


def savings(table: Sequence[dict], layers: dict[str, Counter[Shape]]) -> pd.DataFrame:
    """Return for each network the milliseconds of its narrow weight gradients: by cuDNN, and by the chosen plans."""
    by_shape = {line["shape"]: line for line in table}
    rows = []
    for network, counts in layers.items():
        library, saved = (
            sum(n * by_shape[shape][key] for shape, n in counts.items()) for key in ("cuDNN, us", "saved")
        )
        rows.append(
            {
                "network": network,
                "layers": sum(counts.values()),
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

    layers = {network: shapes(network, batch=given.batch) for network in given.networks}
    device, choices = torch.device("cuda", torch.cuda.current_device()), kernels.Choices()
    cudnn = torch.backends.cudnn
    with cudnn.flags(enabled=True, benchmark=given.benchmark, deterministic=False, allow_tf32=False):
        table = [
            row(shape, choices, device, getattr(torch, given.dtype))
            for shape in dict.fromkeys(shape for counts in layers.values() for shape in counts)
        ]
    print(
        f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, Triton {triton.__version__}, cuDNN "
        f"{cudnn.version()}, benchmark {'on' if given.benchmark else 'off'}, {given.dtype}\n"
    )
    print(_markdown(pd.DataFrame(table).drop(columns=["shape", "saved"])), "\n")
    print(_markdown(savings(table, layers)))
    return 0


def _markdown(table: pd.DataFrame) -> str:
    return table.to_markdown(index=False, floatfmt=".3g")


if __name__ == "__main__":
    sys.exit(main())
