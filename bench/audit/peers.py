"""Compare this project with its peers: the programs that they get right, and time and memory of a training step.

    python -m bench.peers --install    first install the peers into results/peers-venv, with the running torch
    python -m bench.peers --quick      a small case: about two minutes on two cores
    python -m bench.peers              about twenty minutes
    python -m bench.peers --render     write the page again, from the last results

The command writes peers.json, and peers.md from peers.json alone. It leaves out a contender whose package is not
installed or whose process fails. Exit status: 0 if all contenders answered, 1 if one failed.
"""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from bench.audit.peer.behaviours import BEHAVIOURS
from bench.audit.peer.chains import CONTENDERS, PEERS, ROOT
from bench.audit.peer_tables import render
from bench.worker import Failed, Interpreter, Worker
from memcnn import cli
from memcnn.training.environment import device_info, git_state, software_versions

VENV = ROOT / "results" / "peers-venv"
TINY = {"batch": 2, "channels": 4, "side": 4}
TINY_BLOCKS, TINY_STEPS = 32, 5


@dataclass(frozen=True)
class Contenders:
    """The workers of all contenders that have not failed, and the failures.

    Attributes:
        workers: one for each contender; a worker that fails is removed.
        failures: a row with "contender" and "reason" for each worker that failed.
    """

    workers: list[Worker]
    failures: list[dict]

    def each(self, ask: Callable[[Worker], dict], *, first: int = 0) -> Iterator[tuple[str, dict]]:
        """Call ``ask`` with each worker in turn, and yield the worker's name and its answer.

        A worker that fails moves from ``workers`` to ``failures``, and the others continue.

        Args:
            ask: asks one worker and returns its answer.
            first: number of the worker that starts.
        """
        for worker in self.workers[first:] + self.workers[:first]:
            try:
                answer = ask(worker)
            except Failed as failure:
                print(f"left out: {failure}", file=sys.stderr)
                self.workers.remove(worker)
                self.failures.append({"contender": worker.name, "reason": str(failure)})
            else:
                yield worker.name, answer


def start(name: str) -> Worker:
    """Start the worker of a contender; the worker of a peer runs in the environment of the peers."""
    interpreter = Interpreter(
        ROOT,
        python=_venv_python() if name in PEERS else sys.executable,
        options=("-I",),
        keep_root=False,  # a contender's memcnn must not be this project's
        environment={"OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "99"},
    )
    return Worker(name, "bench.audit.peer.worker:Contender", name, interpreter=interpreter)


@contextmanager
def contenders(names: Sequence[str], failures: list[dict] | None = None) -> Iterator[Contenders]:
    """Start all workers at once, wait until they are ready, and yield them; end them afterwards.

    Args:
        names: keys of ``CONTENDERS``.
        failures: receives a row for each contender that fails.
    """
    with ExitStack() as stack:
        ready = Contenders([start(name) for name in names], [] if failures is None else failures)
        for worker in ready.workers:
            stack.callback(worker.end)
        list(ready.each(_greet))
        yield ready


def _greet(worker: Worker) -> dict:
    """Wait until the worker is ready.

    Raises:
        Failed: it cannot import a package that it needs, or it runs another torch.
    """
    answer = worker.ask("hello")
    if answer["torch"] != torch.__version__:
        raise Failed(
            f"{worker.name}: it runs torch {answer['torch']}, this process {torch.__version__}; install it again: "
            "python -m bench.peers --install"
        )
    return answer


def install(folder: Path = VENV, requirements: Iterable[str] = PEERS.values()) -> None:
    """Install packages without their dependencies, which come from the running environment."""
    try:
        venv.create(folder, with_pip=True, clear=True)
    except subprocess.CalledProcessError as error:  # Debian's Python has no ensurepip by itself
        raise cli.Misuse(f"{folder}: making the environment failed ({error}); install Python's venv package") from None
    (site,) = folder.glob("lib/python*/site-packages")
    running = dict.fromkeys(sysconfig.get_paths()[kind] for kind in ("purelib", "platlib"))
    (site / "running.pth").write_text("\n".join(running) + "\n", "utf-8")
    for requirement in requirements:
        command = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", requirement]
        if subprocess.run(command, check=False).returncode:
            print(f"left out: pip could not install {requirement}; see above, and check the network", file=sys.stderr)


def _venv_python() -> Path:
    return VENV / "bin" / "python"


def measure_behaviours(running: Contenders) -> dict:
    """Return the outcome of each behaviour, and the evaluations of F and G, for each contender."""

    def behave(worker: Worker) -> dict:
        _progress(f"behaviours: {worker.name}")
        return {title: worker.ask("behaviour", title=title) for title in BEHAVIOURS}

    outcomes = [
        {"contender": name, "behaviour": title, **outcome}
        for name, found in running.each(behave)
        for title, outcome in found.items()
    ]
    evaluations = [{"contender": name, **answer} for name, answer in running.each(lambda w: w.ask("evaluations"))]
    return {"behaviours": outcomes, "evaluations": evaluations}


def measure_memory(running: Contenders, blocks: int, case: dict) -> list[dict]:
    """Build a chain in each worker and measure the memory of a step. The workers keep their chains."""

    def build(worker: Worker) -> dict:
        _progress(f"memory: {blocks} blocks, {worker.name}")
        worker.ask("build", blocks=blocks, **case)
        return worker.ask("memory")

    return [{"contender": name, "blocks": blocks, **answer} for name, answer in running.each(build)]


def measure_work(running: Contenders, case: dict) -> list[dict]:
    """Count the floating-point operations of the convolutions of two blocks at batch 2."""

    def build(worker: Worker) -> dict:
        worker.ask("build", blocks=2, **{**case, "batch": 2})
        return worker.ask("work")

    return [{"contender": name, **answer} for name, answer in running.each(build)]


def measure_time(
    running: Contenders, blocks: int, rounds: int, case: dict, steps: int = 1, clock: str = "seconds"
) -> list[dict]:
    """Time the chains that the workers have built.

    In each round every contender runs ``steps`` steps, and the fastest one counts. Another contender starts each
    round, so that drift affects all contenders equally. ``clock`` is "seconds" or "cpu_seconds"; the latter leave out
    the time in which other processes hold the processor.
    """
    rows = []
    for number in range(rounds):
        shape = f"{case['batch']} x {case['channels']} x {case['side']}^2"
        _progress(f"time: {blocks} blocks of {shape}, round {number + 1} of {rounds}")
        first = number % max(1, len(running.workers))
        for name, answer in running.each(lambda worker: worker.ask("step", repeat=steps), first=first):
            rows.append({"contender": name, "blocks": blocks, "round": number, "seconds": min(answer[clock])})
    return rows


def measure(*, quick: bool) -> Iterator[dict]:
    """Yield the result so far after each depth at which the contenders were timed."""
    names = [name for name in CONTENDERS if name not in PEERS or _venv_python().is_file()]
    case = {"batch": 4 if quick else 32, "channels": 64, "side": 32}
    rounds, shallow, depths = (3, 2, (4, 8)) if quick else (9, 4, (16, 32))
    failures: list[dict] = []
    result = {
        "quick": quick,
        "case": case,
        "peers": PEERS,
        "rounds": rounds,
        "tiny": {**TINY, "blocks": TINY_BLOCKS},
        "started": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "load_before": os.getloadavg(),
        "device": {**device_info(torch.device("cpu")), "threads": 1, "cores": os.cpu_count()},
        "software": software_versions(),
        **git_state(),
        "failures": failures,
    }
    with contenders(names, failures) as running:  # separate processes: a process that forks must not have run backward
        result |= measure_behaviours(running)
    with contenders(names, failures) as running:
        result["work"] = measure_work(running, case)
        result["tiny_time"] = _measure_tiny(running, 3 * rounds)
        result["memory"], result["time"] = measure_memory(running, shallow, case), []
        for blocks in depths:
            result["memory"] += measure_memory(running, blocks, case)  # this also warms up
            result["time"] += measure_time(running, blocks, rounds, case)
            yield {**result, "load_after": os.getloadavg()}


def _measure_tiny(running: Contenders, rounds: int) -> list[dict]:
    """Build and warm up a chain on tiny tensors in each worker, and time it."""

    def warm_up(worker: Worker) -> dict:
        worker.ask("build", blocks=TINY_BLOCKS, **TINY)
        return worker.ask("step", repeat=TINY_STEPS)

    list(running.each(warm_up))
    return measure_time(running, TINY_BLOCKS, rounds, TINY, TINY_STEPS)


def rendered(data: Path, render: Callable[[dict], str]) -> str:
    """Return the page of the results in a file.

    Args:
        data: the file, as JSON.
        render: makes the page.

    Raises:
        Misuse: the file does not hold the data that ``render`` needs.
    """
    try:
        return render(json.loads(data.read_text("utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise cli.Misuse(
            f"{data} does not hold the results of this command ({type(error).__name__}: {error}); measure again: leave "
            "--render out"
        ) from error


def _progress(text: str) -> None:
    print(f"[{datetime.now():%H:%M:%S}] {text}", file=sys.stderr, flush=True)


@cli.command("bench.peers")
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write peers.json and peers.md, print the page; return the exit status."""
    parser = cli.parser_from("bench.peers", __doc__, whole=True)
    parser.add_argument("--quick", action="store_true", help="batch 4, depths 4 and 8, 3 rounds")
    parser.add_argument("--install", action="store_true", help="first create results/peers-venv again")
    parser.add_argument("--render", action="store_true", help="only write peers.md from the folder's peers.json")
    parser.add_argument(
        "--out", type=cli.output_folder, default="results/peers", help="folder of the files (%(default)s)"
    )
    arguments = parser.parse_args(arguments)
    data, page = arguments.out / "peers.json", arguments.out / "peers.md"
    if arguments.render:
        page.write_text(rendered(data, render), "utf-8")
        return 0
    if arguments.install:
        install()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for result in measure(quick=arguments.quick):
        data.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        if "plain" in {row["contender"] for row in result["failures"]}:
            print("bench.peers: plain failed, so there is nothing to compare with; see above and peers.json",
                  file=sys.stderr)  # fmt: skip
            return 1
        page.write_text(text := render(result), "utf-8")
    print(text)
    return int(bool(result["failures"]))
