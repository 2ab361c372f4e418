"""Commands in processes of their own that start in a tenth of a second.

A new Python takes seconds to import torch. Here each command runs in a fork of a server that has imported torch and
other packages, but nothing of this project. The command imports this project itself, from its own folder and
``PYTHONPATH``. It has its own arguments, environment, streams, signals and exit status, as with ``python -m``.
"""

import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

from properties.support.pages import ROOT

IMPORTED = ["torch._dynamo", "torch.distributed.fsdp", "pandas", "matplotlib.pyplot",
            "scipy.stats", "tensorboardX", "jinja2", "tabulate", "tqdm"]  # fmt: skip
"""Packages that the server imports: they take most of a command's first seconds, and none belongs to this project."""


@cache
def server() -> multiprocessing.context.BaseContext:
    """Return the context whose processes are forks of the server, and start the server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):  # a process with threads may not be forked
        forkserver.ensure_running()
    return context


def search_path() -> list[str]:
    """Return the folders of installed packages: what Python searches without a current folder and ``PYTHONPATH``."""
    added = {str(ROOT), "", *os.environ.get("PYTHONPATH", "").split(os.pathsep)}
    return [folder for folder in sys.path if folder not in added]


def start(
    *words: str | Path, cwd: Path = ROOT, env: Mapping[str, str] | None = None, output: Path, errors: Path
) -> BaseProcess:
    """Start ``python *words`` and return its process.

    Args:
        words: ``-m`` and a module, ``-c`` and a program, or a script; then its arguments.
        cwd: the current folder of the command.
        env: its whole environment; that of this process by default.
        output: file of its standard output.
        errors: file of its standard error.
    """
    env = dict(os.environ if env is None else env)
    added = [folder for folder in env.get("PYTHONPATH", "").split(os.pathsep) if folder]
    streams = str(output), str(errors)
    arguments = ([str(word) for word in words], str(cwd), env, [*added, *search_path()], streams)
    process = server().Process(target=become, args=arguments)
    process.start()
    return process


def run(
    *words: str | Path, cwd: Path = ROOT, env: Mapping[str, str] | None = None, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Run ``python *words`` to its end, as ``subprocess.run`` does; see ``start``."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        process = start(*words, cwd=cwd, env=env, output=output, errors=errors)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(list(words), timeout)
        said = [path.read_text("utf-8") if path.exists() else "" for path in (output, errors)]
    return subprocess.CompletedProcess(list(words), process.exitcode, *said)


def become(words: list[str], cwd: str, env: dict[str, str], path: list[str], streams: tuple[str, str]) -> None:
    """Turn this fork into the command: its streams, folder, environment, module search path and arguments."""
    for number, file in enumerate(streams, start=1):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, number)
        os.close(opened)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores interrupts
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    as_module = words[0] == "-m"
    sys.path[:] = [cwd if as_module else "" if words[0] == "-c" else str(Path(words[0]).resolve().parent), *path]
    for name in [name for name in sys.modules if name.partition(".")[0] in ("memcnn", "properties")]:
        del sys.modules[name]  # this module, and the modules that it has imported
    importlib.import_module("torch").set_num_threads(int(env.get("OMP_NUM_THREADS", 1)))
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    elif as_module:
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
