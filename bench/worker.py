"""Workers: processes that measure for a command. This is the only protocol between a command and its workers.

A worker runs this file as a script. It imports an object and answers questions by calling the object's methods:

    interpreter = Interpreter(ROOT, python=VENV_PYTHON)
    worker = Worker("upstream", "bench.audit.peer.worker:Contender", "upstream", interpreter=interpreter)
    worker.ask("step", repeat=3)       # {"seconds": [...]}, or Failed with the reason
    worker.end()

A question is a line of JSON on the worker's standard input, ``{"question": name, "arguments": {...}}``. An answer is a
line of JSON on its standard output, ``{"answer": {...}}`` or ``{"failed": reason}``. Everything else that the worker
prints goes to its standard error. A worker that fails to answer one question can answer the next one. If a worker ends,
or does not answer in time, ``Failed`` reports it with the last lines of its standard error. Other workers continue.

This file imports only the standard library, because the environment of a worker may lack everything else. Neither
``multiprocessing`` nor ``execnet`` fits: the first cannot start the Python of an environment without this project's
packages, the second loses the standard error of a process that crashes.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

LIMIT_SECONDS = 600.0
"""Time limit for an answer, unless the question sets another one."""
END_SECONDS = 5.0
"""Time in which a worker must end by itself before it is killed."""
LAST_LINES = 5
"""Number of lines of a worker's standard error that a message quotes."""


class Failed(RuntimeError):
    """Raised if a worker does not answer a question; the message names the worker and the reason."""


@dataclass(frozen=True)
class Interpreter:
    """The Python in which a worker runs.

    Attributes:
        root: the worker's current folder; Python imports the worker's module from it.
        python: the interpreter; the running one by default.
        options: options of the interpreter, such as ``-I``.
        keep_root: False removes ``root`` from the module search path after the worker's object was created.
        environment: variables to add to this process's environment.
    """

    root: Path
    python: str | Path = sys.executable
    options: tuple[str, ...] = ()
    keep_root: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)


class Worker:
    """The command's end of a worker process.

    Args:
        name: the worker's name, for messages.
        target: the object that answers, as ``module:factory``; the factory is called with ``arguments``.
        arguments: the factory's arguments.
        interpreter: the Python in which the worker runs.
        limit_seconds: time limit for an answer, unless the question sets another one.
    """

    def __init__(
        self, name: str, target: str, *arguments: str, interpreter: Interpreter, limit_seconds: float = LIMIT_SECONDS
    ) -> None:
        self.name, self.limit_seconds = name, limit_seconds
        root, keep_root = str(interpreter.root), str(int(interpreter.keep_root))
        python = [interpreter.python, "-W", "ignore", *interpreter.options]
        # a pipe that nobody reads would fill up and block the worker
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the worker
        self.process = subprocess.Popen(
            [*python, __file__, root, keep_root, target, *arguments],
            cwd=root,
            env={**os.environ, **interpreter.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def ask(self, question: str, *, limit_seconds: float | None = None, **arguments) -> dict:
        """Return the answer to a question.

        Args:
            question: the name of a method of the worker's object.
            limit_seconds: time limit for the answer; the worker's limit by default.
            **arguments: the method's arguments; JSON must be able to represent them.

        Raises:
            Failed: if the method raised an exception, the process ended, or there was no answer in time. In the last
                case the process is killed.
        """
        limit_seconds = self.limit_seconds if limit_seconds is None else limit_seconds
        with contextlib.suppress(BrokenPipeError, ValueError):  # the process has ended or was killed
            print(json.dumps({"question": question, "arguments": arguments}), file=self.process.stdin, flush=True)
        try:
            line = self._lines.get(timeout=limit_seconds)
        except queue.Empty:
            self._kill()
            raise Failed(f"{self.name}: no answer to {question!r} within {limit_seconds:g} s{self._quoted()}") from None
        if not line:
            self._lines.put("")  # so that the next question fails here as well
            raise Failed(f"{self.name}: the process {self._how_ended()} at {question!r}{self._quoted()}")
        message = json.loads(line)
        if "failed" in message:
            raise Failed(f"{self.name}: {message['failed']}")
        return message["answer"]

    def end(self) -> None:
        """Ask the process to end, and kill it if it does not."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()  # the worker ends when its input ends
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._kill()
        self._reader.join(END_SECONDS)
        if not self._reader.is_alive():  # otherwise a child of the worker still holds its output
            self.process.stdout.close()
        self._errors.close()

    def _read(self) -> None:
        """Queue each line of the process, and an empty line when its output ends."""
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _kill(self) -> None:
        kill_group(self.process)

    def _how_ended(self) -> str:
        try:
            status = self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            return "closed its output"
        return f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"

    def _quoted(self) -> str:
        """Return the last lines of the process's standard error for a message."""
        if self._errors.closed:
            return ""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()[-LAST_LINES:]
        return "".join(f"\n  {line}" for line in lines)


def kill_group(process: subprocess.Popen) -> None:
    """Kill a process that leads its own session, and its child processes; wait for its end."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def serve(target: str, arguments: Sequence[str], *, root: str, keep_root: bool) -> None:
    """Answer the questions on standard input until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # anything else that is printed must not look like an answer
    sys.path.insert(0, root)
    module, _, factory = target.partition(":")
    questions = getattr(importlib.import_module(module), factory)(*arguments)
    if not keep_root:
        sys.path.remove(root)
    for line in sys.stdin:
        message = json.loads(line)
        try:
            answer = {"answer": getattr(questions, message["question"])(**message["arguments"])}
        except Exception as error:
            traceback.print_exc()
            answer = {"failed": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    if not sys.flags.isolated:
        sys.path.pop(0)  # the folder of this file: its modules are not top-level modules
    serve(sys.argv[3], sys.argv[4:], root=sys.argv[1], keep_root=bool(int(sys.argv[2])))
