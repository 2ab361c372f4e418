"""Test any module with `forward` and `inverse`, wrapped or not, against the laws of a reversible block.

    python -m memcnn.verify mypackage.blocks:make --shape 2,16,8,8

The target is a function or class that is called without arguments, or a module; a path works too: blocks.py:make.
Prints every law with the largest error found and its limit; for a law that fails, what is wrong in words and the
smallest failing example as code. Exit status: 0 every law holds, 1 one does not, 2 misuse, 3 the verifier itself broke.
"""

import argparse
import importlib
import importlib.util
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from memcnn import __version__, cli
from memcnn.testing.checks import LAWS
from memcnn.testing.laws.guard import is_ours
from memcnn.testing.laws.result import Report
from memcnn.testing.laws.subject import NotRunnable

if TYPE_CHECKING:
    from memcnn.testing.search import Example

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
INTEGERS = {"int64": torch.int64, "int32": torch.int32, "uint8": torch.uint8, "bool": torch.bool}
BROKEN = 3
"""Exit status: the verifier raised an exception that is not the block's."""
MODES = {"both": (True, False), "train": (True,), "eval": (False,)}


REFUSALS = "the module must", "the inputs must", "an input must"
"""How the checks begin to say that a module or its inputs cannot be checked."""


class Misuse(Exception):
    """The request cannot be carried out; the message says what can."""


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        return _verify(args)
    except Misuse as error:
        cli.fail(f"memcnn.verify: {error}")
        return cli.MISUSE
    except Exception:
        traceback.print_exc()
        cli.fail(
            f"memcnn.verify itself broke, so it says nothing about {args.target}. Please report this to MemCNN's "
            "maintainers, with the lines above, the command and, if you can, the block."
        )
        return BROKEN


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m memcnn.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", help="package.module:factory, or path/to/file.py:factory")
    parser.add_argument(
        "--shape",
        action="append",
        required=True,
        type=_shape,
        metavar="N,C,...[:DTYPE<N]",
        help="shape of an input; once for every input; 4:int64<10 for integers from 0 to 9",
    )
    parser.add_argument(
        "--vary",
        type=_dimensions,
        default=(),
        metavar="D,D,...",
        help="dimensions whose size is drawn, smaller and larger, such as 0,2,3 (default: none)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of module and inputs (%(default)s)")
    parser.add_argument("--device", default="cpu", help="such as cuda (%(default)s)")
    parser.add_argument("--mode", choices=MODES, default="both", help="training mode, eval mode, or %(default)s")
    parser.add_argument(
        "--laws",
        type=lambda text: text.split(","),
        metavar="LAW,LAW",
        help=f"only these of {', '.join(LAWS)} (default: all that apply)",
    )
    parser.add_argument("--examples", type=int, default=20, metavar="N", help="drawn for each law (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first example (%(default)s)")
    parser.add_argument(
        "--as-is",
        action="store_true",
        help="the module has an engine of its own: do not wrap it in InvertibleModuleWrapper",
    )
    parser.add_argument(
        "--chain",
        metavar="TARGET",
        help="function of a depth that makes a chain of that many blocks, for the law of memory",
    )
    parser.add_argument(
        "--no-finite-differences",
        action="store_true",
        help="for a module whose gradient is no derivative by design, as under spectral norm",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there, too")
    return parser


def _verify(args: argparse.Namespace) -> int:
    try:
        from memcnn.testing.search import Example, search
    except ModuleNotFoundError as error:
        raise Misuse(f"needs {error.name}, which draws the examples: pip install {error.name}") from error
    torch.set_num_threads(1)  # examples are small, and several threads may slow them down a hundredfold
    make = _load(args.target)
    options = _options(args)
    shapes, integers = (tuple(values) for values in zip(*args.shape, strict=True))
    base = Example(shapes, DTYPES[args.dtype], args.device, args.seed, integers=integers)
    _check_arguments(args)
    print(
        f"{args.target}: {args.dtype} inputs {', '.join('x'.join(map(str, shape)) for shape in shapes)} on "
        f"{args.device}, {'training and eval' if args.mode == 'both' else args.mode} mode\n"
        f"memcnn {__version__}, torch {torch.__version__}, seed {args.seed}\n",
        flush=True,
    )

    report, findings = Report(()), []
    try:
        laws = args.laws or [law for law in LAWS if law != "log_det" or hasattr(_made(make, base), "forward_log_det")]
        for law in laws:
            _progress(f"{law} ...")
            found = search(
                make,
                base,
                law,
                modes=MODES[args.mode],
                vary=args.vary,
                first_seed=args.seed,
                max_examples=1 if law == "memory" else args.examples,
                options=options.get(law, {}),
            )
            findings.append(found)
            report += found.report
    except NotRunnable as error:
        raise Misuse(f"{args.target}: {error}") from error
    except TypeError as error:
        if is_ours(error) and not _is_refusal(error):
            raise
        raise Misuse(f"{args.target}: {error}") from error
    finally:
        cli.progress("")

    print(report)
    counts = ", ".join(f"{found.law} {found.examples}" for found in findings)
    print(f"\nexamples: {counts}")
    for reason in dict.fromkeys(found.not_runnable for found in findings if found.not_runnable):
        print(f"some drawn examples were left out: {reason}")
    print(f"\n{'PASS' if report.passed else 'FAIL'}: {report.summary()}")
    codes = {}
    for found in findings:
        if found.failing:
            example, _ = found.failing
            codes[found.law] = example.code(
                found.law, args.target, not isinstance(make, nn.Module), _shown(options.get(found.law, {}))
            )
            print(f"\nthe smallest example found that breaks the law of {found.law}:\n")
            print("\n".join(f"    {line}".rstrip() for line in codes[found.law].splitlines()))
    if args.json:
        _write(args.json, args, report, codes, {found.law: found.examples for found in findings})
    return cli.DONE if report.passed else cli.FAILED


def _progress(text: str) -> None:
    """Show what is being done: on a terminal in one line, elsewhere in a line of its own."""
    if sys.stderr.isatty():
        cli.progress(text)
    else:
        print(text, file=sys.stderr, flush=True)


def _is_refusal(error: TypeError) -> bool:
    """Return whether a check refuses the module or its inputs in words, as against a mistake in its own code."""
    return any(words in str(error) for words in REFUSALS)


def _made(make: Callable[[], nn.Module] | nn.Module, base: "Example") -> nn.Module:
    try:
        return base.module(make)
    except Exception as error:
        raise Misuse(f"making the module raised {type(error).__name__}: {error}") from error


def _options(args: argparse.Namespace) -> dict[str, dict]:
    """Return the options of each law's check."""
    wrap = {"wrap": False} if args.as_is else {}
    chain = {"chain": _load(args.chain)} if args.chain else {}
    differences = {"finite_differences": False} if args.no_finite_differences else {}
    return {"gradients": wrap | differences, "state": wrap, "memory": wrap | chain, "log_det": differences}


def _shown(options: dict) -> dict:
    return {key: value for key, value in options.items() if key != "chain"}


def _check_arguments(args: argparse.Namespace) -> None:
    if unknown := set(args.laws or ()) - set(LAWS):
        raise Misuse(f"--laws: got {', '.join(sorted(unknown))}; choose from {', '.join(LAWS)}")
    for dimension in args.vary:
        if not any(-len(shape) <= dimension < len(shape) for shape, _ in args.shape):
            most = max(len(shape) for shape, _ in args.shape)
            raise Misuse(
                f"--vary: got dimension {dimension}, but the inputs have {most} dimensions; choose from 0 to {most - 1}"
            )
    if args.examples < 1:
        raise Misuse(f"--examples: got {args.examples}, wanted at least 1")
    if args.json and not args.json.absolute().parent.is_dir():
        raise Misuse(f"--json: there is no folder {args.json.absolute().parent}")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise Misuse(f"--device: got {args.device!r}, which this torch cannot use: {error}") from error


def _load(target: str) -> Any:
    """Import and return the object that ``package.module:name`` or ``path.py:name`` names."""
    place, colon, name = target.partition(":")
    if not (place and colon and name):
        raise Misuse(f"target: got {target!r}, wanted package.module:factory or path/to/file.py:factory")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        for part in name.split("."):
            found = getattr(found, part)
    except ModuleNotFoundError as error:
        raise Misuse(f"{target}: cannot import {error.name}: is it installed, or are you in another folder?") from error
    except AttributeError as error:
        raise Misuse(f"{target}: {error}") from error
    if not callable(found):
        raise Misuse(f"{target}: got a {type(found).__name__}, wanted a module or a function that makes one")
    return found


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise Misuse(f"target: there is no file {path}")
    sys.path.insert(0, str(path.absolute().parent))
    return importlib.import_module(path.stem)


def _shape(text: str) -> tuple[tuple[int, ...], tuple[torch.dtype, int] | None]:
    """Return the sizes in ``text`` and, for integers, their dtype and the number that they stay below."""
    sizes, colon, values = text.partition(":")
    try:
        shape = tuple(int(size) for size in sizes.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
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
    try:
        return tuple(int(dimension) for dimension in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted numbers of dimensions, such as 0,2,3") from None


def _write(path: Path, args: argparse.Namespace, report: Report, codes: dict[str, str], examples: dict) -> None:
    path.write_text(
        json.dumps(
            {
                "target": args.target,
                "shapes": [shape for shape, _ in args.shape],
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
