"""Workers: processes that measure for a command and answer its questions. The only protocol between the two.

A worker runs this file as a script. It imports an object and answers questions by calling the object's methods:

    worker = Worker("upstream", "bench.audit.peer.worker:Worker", "upstream", root=ROOT, python=VENV_PYTHON)
    worker.ask("step", repeat=3)       # {"seconds": [...]}, or Failed with the reason
    worker.end()

A question is a line of JSON on the worker's standard input, ``{"question": name, "arguments": {...}}``. An answer is a
line of JSON on its standard output, ``{"answer": {...}}`` or ``{"failed": reason}``; whatever else the worker prints
goes to its standard error. A worker that fails to answer one question answers the next one. If it ends, or does not
answer in time, ``Failed`` says so with the last lines of its standard error, and the other workers go on.

Only the standard library is imported here: the environment of a worker may lack everything else. (``multiprocessing``
and ``execnet`` do not serve: the first cannot start the Python of another environment without this project's packages,
the second does not keep the standard error of a process that crashes.)
"""

from __future__ import annotations

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
from pathlib import Path

LIMIT_SECONDS = 600.0
"""The time for an answer, unless the question has a limit of its own."""
END_SECONDS = 5.0
"""The time that a worker has to end by itself."""
LAST_LINES = 5
"""How many lines of a worker's standard error a message quotes."""


class Failed(RuntimeError):
    """A worker did not answer a question; the message names the worker and the reason."""


class Worker:
    """A worker process, as its command sees it.

    Args:
        name: the worker's name, for messages.
        target: the object that answers, as ``module:factory``; the factory is called with ``arguments``.
        arguments: the factory's arguments.
        root: the folder from which ``module`` is imported.
        python: the interpreter; the running one by default.
        options: options of the interpreter, such as ``-I``.
        keep_root: False removes ``root`` from the module search path once the object is there.
        environment: variables to add to this process's environment.
        limit_seconds: the time for an answer, unless the question has a limit of its own.
    """

    def __init__(
        self,
        name: str,
        target: str,
        *arguments: str,
        root: Path,
        python: str | Path = sys.executable,
        options: Sequence[str] = (),
        keep_root: bool = True,
        environment: Mapping[str, str] | None = None,
        limit_seconds: float = LIMIT_SECONDS,
    ) -> None:
        self.name, self.limit_seconds = name, limit_seconds
        command = [python, "-W", "ignore", *options, __file__, str(root), str(int(keep_root)), target, *arguments]
        self._errors = tempfile.TemporaryFile()  # a pipe that nobody reads would fill up and stop the worker
        self.process = subprocess.Popen(
            command,
            cwd=root,
            env={**os.environ, **(environment or {})},
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
            limit_seconds: the time for the answer; the worker's own limit by default.
            **arguments: the method's arguments, all of them JSON.

        Raises:
            Failed: when the method raised an exception, the process ended, or the time is over; then it is killed.
        """
        limit_seconds = self.limit_seconds if limit_seconds is None else limit_seconds
        try:
            print(json.dumps({"question": question, "arguments": arguments}), file=self.process.stdin, flush=True)
        except (BrokenPipeError, ValueError):  # it has ended, or was killed
            pass
        try:
            line = self._lines.get(timeout=limit_seconds)
        except queue.Empty:
            self._kill()
            raise Failed(f"{self.name}: no answer to {question!r} within {limit_seconds:g} s{self._quoted()}") from None
        if not line:
            self._lines.put("")  # so that the next question ends here, too
            raise Failed(f"{self.name}: the process {self._how_ended()} at {question!r}{self._quoted()}")
        message = json.loads(line)
        if "failed" in message:
            raise Failed(f"{self.name}: {message['failed']}")
        return message["answer"]

    def end(self) -> None:
        """Let the process end, and kill it if it does not."""
        try:
            self.process.stdin.close()  # on which the worker ends
        except BrokenPipeError:
            pass
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._kill()
        self._reader.join(END_SECONDS)
        if not self._reader.is_alive():  # else something that it started still holds its output
            self.process.stdout.close()
        self._errors.close()

    def _read(self) -> None:
        """Hand on the lines of the process, and an empty one at its end."""
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
        """Return the last lines of the process's standard error, for a message."""
        if self._errors.closed:
            return ""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()[-LAST_LINES:]
        return "".join(f"\n  {line}" for line in lines)


def kill_group(process: subprocess.Popen) -> None:
    """Kill a process that leads a session of its own, with all that it started, and wait for its end."""
    if hasattr(os, "killpg"):
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    else:
        process.kill()
    process.wait()


def serve(target: str, arguments: Sequence[str], *, root: str, keep_root: bool) -> None:
    """Answer the questions on standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # other output must not look like an answer
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
        sys.path.pop(0)  # the folder of this file, whose modules are no top-level modules
    serve(sys.argv[3], sys.argv[4:], root=sys.argv[1], keep_root=bool(int(sys.argv[2])))
