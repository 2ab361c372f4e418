"""Report the packages that a command lacks before it imports any of them. Imports only the standard library."""

import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

LIBRARY = ("filelock", "hypothesis", "numpy", "tensorboardX", "torch", "torchvision", "tqdm")
"""Modules of the packages that memcnn itself requires in setup.py."""
HARNESS = ("jinja2", "matplotlib", "pandas", "pytest", "pytest_benchmark", "scipy", "tabulate")
"""Modules that the commands of bench, reports and properties import as well, from the extra ``harness`` of setup.py."""
INSTALL = 'python -m pip install --constraint constraints.txt --editable ".[harness]"'
"""Installs both, from the top of the repository; README has it as well."""
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("bench", "memcnn", "properties", "reports")
MISUSE = 2


def check() -> None:
    """End a command that lacks packages with exit status 2, the missing names and the pip command.

    A program that imports this project gets Python's ``ModuleNotFoundError`` from the import that needs the package.
    """
    if not (started := command()):
        return
    extra = "" if started.startswith("memcnn") else "harness"
    if missing := [name for name in (*LIBRARY, *(HARNESS if extra else ())) if find_spec(name) is None]:
        print(f"{started}: {explained(missing, extra)}", file=sys.stderr)
        sys.exit(MISUSE)


def command() -> str | None:
    """Return the module of this project that ``python -m`` has started; None in any other program."""
    words = sys.orig_argv
    module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
    return module if module.partition(".")[0] in PACKAGES else None


def explained(missing: list[str], extra: str) -> str:
    """Return what is missing, what is wanted, and the command that installs it."""
    listed = f"{', '.join(missing[:-1])} and {missing[-1]} are" if len(missing) > 1 else f"{missing[0]} is"
    wanted = f"the packages of the extra {extra!r}" if extra else "the packages that memcnn requires"
    pip = [sys.executable, "-m", "pip", "install"]
    if (ROOT / "setup.py").is_file():
        target = f"{ROOT}[{extra}]" if extra else str(ROOT)
        pip += ["--constraint", str(ROOT / "constraints.txt"), "--editable", target]
    else:
        pip += missing
    return f"{listed} not installed; wanted {wanted}; install them with\n  {shlex.join(pip)}"
