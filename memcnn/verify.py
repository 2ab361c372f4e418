"""Test any module with `forward` and `inverse`, wrapped or not, against the laws of a reversible block.

    python -m memcnn.verify mypackage.blocks:make --shape 2,16,8,8

The target is a function or class that is called without arguments, or a module; a path works too: blocks.py:make.
Prints every law with the largest error found and its limit. For a law that fails, it also prints an explanation and the
smallest failing example as code. Exit status: 0 every law holds; 1 one does not, or nothing could be checked; 2 misuse;
3 the verifier itself broke.

To check a block on your own batch, write the batch with torch.save, as a tensor or a tuple of tensors:

    python -m memcnn.verify mypackage.blocks:make --input batch.pt
"""

import argparse
import json
import math
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from memcnn import __version__, cli
from memcnn.testing.checks import LAWS
from memcnn.testing.laws.constant import remark_on_constants
from memcnn.testing.laws.guard import is_ours
from memcnn.testing.laws.log_det import has_log_det
from memcnn.testing.laws.result import Report
from memcnn.testing.laws.subject import NotRunnable, Refused
from memcnn.testing.targets import Factory, load, load_tensors

if TYPE_CHECKING:
    from memcnn.testing.example import Example
    from memcnn.testing.search import Findings

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
INTEGERS = {"int64": torch.int64, "int32": torch.int32, "uint8": torch.uint8, "bool": torch.bool}
BROKEN = 3
"""Exit status: the verifier raised an exception that is not the block's."""
EXAMPLES = 20
SECONDS = 60
"""Seconds after which a law draws no further example, unless the number of examples is given."""
MODES = {"both": (True, False), "train": (True,), "eval": (False,)}


@cli.command("memcnn.verify")
def main(arguments: list[str] | None = None) -> int:
    """Verify the target and print the results; return the exit status."""
    args = _parser().parse_args(arguments)
    try:
        return _verify(args)
    except (cli.Misuse, BrokenPipeError):
        raise
    except Exception:
        traceback.print_exc()
        cli.fail(
            f"memcnn.verify itself broke, so it says nothing about {args.target}. Please report this to MemCNN's "
            "maintainers, with the lines above, the command and, if you can, the block."
        )
        return BROKEN


def _parser() -> cli.Parser:
    """Return the parser of the command line."""
    parser = cli.parser_from("memcnn.verify", __doc__ or "", whole=True)
    add = parser.add_argument
    add("target", help="package.module:factory, or path/to/file.py:factory")
    shapes = parser.add_mutually_exclusive_group(required=True)
    shapes.add_argument(
        "--shape",
        action="append",
        type=_shape,
        metavar="N,C,...[:DTYPE<N]",
        help="shape of an input; repeat the option for each input. 4:int64<10 means four integers from 0 to 9",
    )
    shapes.add_argument(
        "--input", type=Path, metavar="FILE", help="read the inputs from this file, written by torch.save"
    )
    add(
        "--vary",
        type=_dimensions,
        default=(),
        metavar="D,D,...",
        help="dimensions whose size varies between examples, such as 0,2,3 (default: none)",
    )
    add("--dtype", choices=DTYPES, default="float32", help="dtype of module and inputs (%(default)s)")
    add("--device", default="cpu", help="such as cuda (%(default)s)")
    add("--mode", choices=MODES, default="both", help="training mode, eval mode, or %(default)s")
    add(
        "--laws",
        type=cli.names(tuple(LAWS)),
        metavar="LAW,LAW",
        help=f"only these of {', '.join(LAWS)} (default: all that apply)",
    )
    add(
        "--examples",
        type=cli.count,
        metavar="N",
        help=f"number of examples for each law (default: {EXAMPLES}; fewer if {SECONDS} seconds pass, but at least 4)",
    )
    add("--seed", type=_seed, default=0, help="seed of the first example (%(default)s)")
    add(
        "--as-is",
        action="store_true",
        help="the module has an engine of its own: do not wrap it in InvertibleModuleWrapper",
    )
    add(
        "--chain",
        metavar="TARGET",
        help="package.module:function or path.py:function; function(depth) returns a chain of that many blocks, for "
        "the law of memory",
    )
    add(
        "--no-finite-differences",
        action="store_true",
        help="do not compare gradients with finite differences: for a module whose gradient is by design not the "
        "derivative, as under spectral norm",
    )
    add(
        "--no-gradients-through-inverse",
        action="store_true",
        help="do not check gradients through the inverse: for an inverse that is not meant to be differentiated, "
        "as a bisection under torch.no_grad()",
    )
    add("--json", type=cli.output_file, metavar="FILE", help="also write all results to this file")
    return parser


def _verify(args: argparse.Namespace) -> int:
    """Check every law, print and write the results, and return the exit status."""
    try:
        from memcnn.testing.search import search
    except ModuleNotFoundError as error:
        raise cli.Misuse(f"needs {error.name}, which draws the examples: pip install {error.name}") from error
    torch.set_num_threads(1)  # examples are small, and several threads may slow them down a hundredfold
    make = Factory(args.target)
    options = _options(args)
    _check_arguments(args)
    base = _first_example(args)
    print(
        f"{args.target}: {_described_inputs(args, base)} on {args.device}, "
        f"{'training and eval' if args.mode == 'both' else args.mode} mode\n"
        f"memcnn {__version__}, torch {torch.__version__}, seed {args.seed}\n",
        flush=True,
    )

    findings = _search_all(search, args, make, base, options)
    report = sum((found.report for found in findings), Report(()))
    remark = remark_on_constants(base.module(make), base.inputs()) if base.values else ""
    print(report)
    if remark:
        print(f"\nNOTE: {remark}")
    counts = ", ".join(f"{found.law} {found.examples}" for found in findings)
    print(f"\nexamples: {counts}")
    if any(found.out_of_time for found in findings):
        number = args.examples or EXAMPLES
        print(f"some laws stopped after {SECONDS} s; use --examples {number} to check {number} examples of each law")
    for reason in dict.fromkeys(found.not_runnable for found in findings if found.not_runnable):
        print(f"some drawn examples were left out: {reason}")
    verdict = "UNDECIDED" if report.is_undecided else "PASS" if report.passed else "FAIL"
    print(f"\n{verdict}: {report.summary()}")
    codes = {}
    for found in findings:
        if found.failing:
            example, _ = found.failing
            codes[found.law] = example.code(found.law, args.target, make.is_called, _shown(options.get(found.law, {})))
            print(f"\nthe smallest example found that breaks the law of {found.law}:\n")
            print("\n".join(f"    {line}".rstrip() for line in codes[found.law].splitlines()))
    if args.json:
        _write(args.json, args, base.shapes, report, codes, {found.law: found.examples for found in findings})
    return cli.DONE if report.passed else cli.FAILED


def _search_all(
    search: Callable[..., "Findings"],
    args: argparse.Namespace,
    make: Factory,
    base: "Example",
    options: dict[str, dict],
) -> list["Findings"]:
    """Search for a failing example of each law, and return the findings.

    Args:
        search: ``memcnn.testing.search.search``.
        args: the arguments of the command.
        make: makes the module.
        base: the first example.
        options: the options of each law's check.

    Raises:
        cli.Misuse: the module cannot run, or a check refuses it or its inputs.
    """
    try:
        module = base.module(make)
        laws = args.laws or [law for law in LAWS if law != "log_det" or has_log_det(module)]
        findings = []
        for law in laws:
            _progress(f"{law} ...")
            findings.append(
                search(
                    make,
                    base,
                    law,
                    modes=MODES[args.mode],
                    vary=args.vary,
                    first_seed=args.seed,
                    max_examples=1 if law == "memory" else args.examples or EXAMPLES,
                    options=options.get(law, {}),
                    longest=math.inf if args.examples else SECONDS,
                )
            )
        return findings
    except NotRunnable as error:
        raise cli.Misuse(f"{args.target}: {error}") from error
    except TypeError as error:
        if is_ours(error) and not isinstance(error, Refused):
            raise
        raise cli.Misuse(f"{args.target}: {error}") from error
    finally:
        cli.progress("")


def _described_inputs(args: argparse.Namespace, base: "Example") -> str:
    """Return the inputs for the heading: their sizes, and the dtypes of those that are not of ``--dtype``."""
    if base.values:
        others = ["" if x.is_floating_point() else str(x.dtype).removeprefix("torch.") for x in base.values]
    else:
        others = [str(integers[0]).removeprefix("torch.") if integers else "" for integers in base.integers]
    sizes = ["x".join(map(str, shape)) for shape in base.shapes]
    words = [f"{size} of {dtype}" if dtype else size for size, dtype in zip(sizes, others, strict=True)]
    return f"{args.dtype} inputs {', '.join(words)}" if "" in others else f"inputs {', '.join(words)}"


def _first_example(args: argparse.Namespace) -> "Example":
    """Return the first example: inputs of the shapes that the user gives, or those in the user's file."""
    from memcnn.testing.example import Example

    if args.input is None:
        shapes, integers = (tuple(values) for values in zip(*args.shape, strict=True))
        return Example(shapes, DTYPES[args.dtype], args.device, args.seed, integers=integers)
    values = load_tensors(args.input)
    if args.vary:
        raise cli.Misuse("--vary: got it with --input, whose sizes are given; leave it out, or give --shape instead")
    shapes = tuple(tuple(x.shape) for x in values)
    return Example(shapes, DTYPES[args.dtype], args.device, args.seed, values=values, file=str(args.input))


def _progress(text: str) -> None:
    """Report progress: on a terminal in one line that is overwritten, elsewhere in a new line each time."""
    if sys.stderr.isatty():
        cli.progress(text)
    else:
        print(text, file=sys.stderr, flush=True)


def _options(args: argparse.Namespace) -> dict[str, dict]:
    """Return the options of each law's check."""
    wrap = {"wrap": False} if args.as_is else {}
    chain = {"chain": load(args.chain)} if args.chain else {}
    differences = {"finite_differences": False} if args.no_finite_differences else {}
    if args.no_gradients_through_inverse:
        differences |= {"through_inverse": False}
    return {"gradients": wrap | differences, "state": wrap, "memory": wrap | chain, "log_det": differences}


def _shown(options: dict) -> dict:
    """Return the options that the code of an example contains."""
    return {key: value for key, value in options.items() if key != "chain"}


def _check_arguments(args: argparse.Namespace) -> None:
    """Raise ``cli.Misuse`` if a dimension to vary or the device does not exist."""
    for dimension in args.vary if args.shape else ():
        if not any(-len(shape) <= dimension < len(shape) for shape, _ in args.shape):
            most = max(len(shape) for shape, _ in args.shape)
            raise cli.Misuse(
                f"--vary: got dimension {dimension}, but the inputs have {most} dimensions; choose from 0 to {most - 1}"
            )
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition(chr(10))[0]
        devices = ", ".join(cli.devices())
        raise cli.Misuse(
            f"--device: got {args.device!r}, which this torch cannot use ({reason}); choose from {devices}"
        ) from error


def _shape(text: str) -> tuple[tuple[int, ...], tuple[torch.dtype, int] | None]:
    """Return the sizes in ``text`` and, for integers, their dtype and the number that they stay below."""
    sizes, colon, values = text.partition(":")
    try:
        shape = tuple(int(size) for size in sizes.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1 or max(shape) > cli.LARGEST_COUNT:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted sizes of at least 1, such as 2,16,8,8")
    if not colon:
        return shape, None
    name, _, below = values.partition("<")
    if name not in INTEGERS or not below.isdecimal() or int(below) < 1:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, wanted for integers a dtype ({', '.join(INTEGERS)}) and the number that they stay below, "
            "such as 4:int64<10"
        )
    return shape, (INTEGERS[name], int(below))


def _dimensions(text: str) -> tuple[int, ...]:
    """Return the numbers of dimensions in ``text``, which commas separate."""
    try:
        return tuple(int(dimension) for dimension in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted numbers of dimensions, such as 0,2,3") from None


def _seed(text: str) -> int:
    """Return the seed in ``text``: at most nine digits."""
    if not re.fullmatch(r"\d{1,9}", text):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a whole number from 0 to 999999999")
    return int(text)


def _write(
    path: Path, args: argparse.Namespace, shapes: tuple, report: Report, codes: dict[str, str], examples: dict
) -> None:
    """Write all results to a JSON file, with the code of failing examples and the number of examples of each law."""
    path.write_text(
        json.dumps(
            {
                "target": args.target,
                "shapes": shapes,
                "dtype": args.dtype,
                "device": args.device,
                "mode": args.mode,
                "seed": args.seed,
                "memcnn": __version__,
                "torch": torch.__version__,
                "passed": report.passed,
                "summary": report.summary(),
                "results": report.to_dicts(),
                "examples": examples,
                "smallest failing": codes,
            },
            indent=2,
        )
        + "\n",
        "utf-8",
    )


if __name__ == "__main__":
    sys.exit(main())
