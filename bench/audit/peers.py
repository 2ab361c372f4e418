"""Compare this project with its peers: what programs they get right, and what a training step costs with them.

    python -m bench.peers --install    put the peers into results/peers-venv, with the running torch, and compare
    python -m bench.peers --quick      a small case: about two minutes on two cores
    python -m bench.peers              about twenty

Writes peers.json and, from it alone, peers.md. A contender whose package is not installed, or whose process fails, is
left out from there on. Exit status: 0 if all contenders answered, 1 if one failed.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from pathlib import Path

import torch

from bench.audit.peer.behaviours import BEHAVIOURS
from bench.audit.peer.chains import CONTENDERS, PEERS, ROOT
from bench.audit.peer_tables import render
from bench.worker import Failed, Worker
from memcnn.training.environment import device_info, git_state, software_versions

VENV = ROOT / "results" / "peers-venv"
TINY = {"batch": 2, "channels": 4, "side": 4}
TINY_BLOCKS, TINY_STEPS = 32, 5


def start(name: str) -> Worker:
    """Start the process of a contender (``bench.audit.peer.worker``); a peer runs in the environment of the peers."""
    return Worker(
        name,
        "bench.audit.peer.worker:Worker",
        name,
        root=ROOT,
        python=_venv_python() if name in PEERS else sys.executable,
        options=["-I"],
        keep_root=False,  # a contender's memcnn must not be this project's
        environment={"OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "99"},
    )


@contextmanager
def contenders(names: Sequence[str], failures: list[dict] | None = None) -> Iterator[list[Worker]]:
    """Start a process for each name, all before the first is waited for, and yield those that are ready.

    Args:
        names: keys of ``CONTENDERS``.
        failures: gets a row for each contender that fails to start.
    """
    with ExitStack() as stack:
        ready = [start(name) for name in names]
        for worker in ready:
            stack.callback(worker.end)
        for name, answer in each(ready, [] if failures is None else failures, lambda worker: worker.ask("hello")):
            if answer["torch"] != torch.__version__:
                raise SystemExit(
                    f"{name} runs torch {answer['torch']}, this process {torch.__version__}: delete "
                    f"{VENV.relative_to(ROOT)} and run bench.peers --install"
                )
        yield ready


def each(
    workers: list[Worker], failures: list[dict], ask: Callable[[Worker], dict], *, first: int = 0
) -> Iterator[tuple[str, dict]]:
    """Ask the workers in turn, from number ``first`` on; yield the name and the answer of each.

    A worker that fails is removed from ``workers`` and added to ``failures``; the others go on.
    """
    for worker in workers[first:] + workers[:first]:
        try:
            answer = ask(worker)
        except Failed as failure:
            print(f"left out: {failure}", file=sys.stderr)
            workers.remove(worker)
            failures.append({"contender": worker.name, "reason": str(failure)})
        else:
            yield worker.name, answer


def install(folder: Path = VENV, requirements: Iterable[str] = PEERS.values()) -> None:
    """Install packages without their dependencies, which come from the running environment."""
    venv.create(folder, with_pip=True, clear=True)
    (site,) = folder.glob("lib/python*/site-packages")
    running = dict.fromkeys(sysconfig.get_paths()[kind] for kind in ("purelib", "platlib"))
    (site / "running.pth").write_text("\n".join(running) + "\n", "utf-8")
    for requirement in requirements:
        command = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", requirement]
        subprocess.run(command, check=False)


def _venv_python() -> Path:
    return VENV / "bin" / "python"


def measure_behaviours(workers: list[Worker], failures: list[dict]) -> dict:
    """Return the outcome of each behaviour, and the evaluations of F and G, with each contender."""

    def behave(worker: Worker) -> dict:
        _progress(f"behaviours: {worker.name}")
        return {title: worker.ask("behaviour", title=title) for title in BEHAVIOURS}

    outcomes = [
        {"contender": name, "behaviour": title, **outcome}
        for name, found in each(workers, failures, behave)
        for title, outcome in found.items()
    ]
    evaluations = [
        {"contender": name, **answer} for name, answer in each(workers, failures, lambda w: w.ask("evaluations"))
    ]
    return {"behaviours": outcomes, "evaluations": evaluations}


def measure_memory(workers: list[Worker], failures: list[dict], blocks: int, case: dict) -> list[dict]:
    """Build a chain in each worker and measure its memory; the workers keep what they built."""

    def build(worker: Worker) -> dict:
        _progress(f"memory: {blocks} blocks, {worker.name}")
        worker.ask("build", blocks=blocks, **case)
        return worker.ask("memory")

    return [{"contender": name, "blocks": blocks, **answer} for name, answer in each(workers, failures, build)]


def measure_work(workers: list[Worker], failures: list[dict], case: dict) -> list[dict]:
    """Count the floating-point operations of the convolutions of two blocks at batch 2."""

    def build(worker: Worker) -> dict:
        worker.ask("build", blocks=2, **{**case, "batch": 2})
        return worker.ask("work")

    return [{"contender": name, **answer} for name, answer in each(workers, failures, build)]


def measure_time(
    workers: list[Worker], failures: list[dict], blocks: int, rounds: int, case: dict, steps: int = 1
) -> list[dict]:
    """Time what the workers have built, in rounds of ``steps`` steps of every contender in turn.

    Rotate the starting contender, so that drift affects all contenders equally.
    """
    rows = []
    for number in range(rounds):
        _progress(
            f"time: {blocks} blocks of {case['batch']} x {case['channels']} x {case['side']}^2, "
            f"round {number + 1} of {rounds}"
        )
        answers = each(workers, failures, lambda w: w.ask("step", repeat=steps), first=number % max(1, len(workers)))
        for name, answer in answers:
            rows.append({"contender": name, "blocks": blocks, "round": number, "seconds": min(answer["seconds"])})
    return rows


def measure(*, quick: bool) -> Iterator[dict]:
    """Yield the result so far, once for each depth at which time is taken."""
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
    with contenders(names, failures) as workers:  # of their own: a process that forks must not have run a backward pass
        result |= measure_behaviours(workers, failures)
    with contenders(names, failures) as workers:
        result["work"] = measure_work(workers, failures, case)

        def warm_up(worker: Worker) -> dict:
            worker.ask("build", blocks=TINY_BLOCKS, **TINY)
            return worker.ask("step", repeat=TINY_STEPS)

        list(each(workers, failures, warm_up))
        result["tiny_time"] = measure_time(workers, failures, TINY_BLOCKS, 3 * rounds, TINY, TINY_STEPS)
        result["memory"], result["time"] = measure_memory(workers, failures, shallow, case), []
        for blocks in depths:
            result["memory"] += measure_memory(workers, failures, blocks, case)  # this also warms up
            result["time"] += measure_time(workers, failures, blocks, rounds, case)
            yield {**result, "load_after": os.getloadavg()}


def _progress(text: str) -> None:
    print(f"[{datetime.now():%H:%M:%S}] {text}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bench.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="batch 4, depths 4 and 8, 3 rounds")
    parser.add_argument("--install", action="store_true", help="first (re)make results/peers-venv")
    parser.add_argument("--out", type=Path, default=Path("results/peers"), help="folder of the files (%(default)s)")
    arguments = parser.parse_args()
    if arguments.install:
        install()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for result in measure(quick=arguments.quick):
        (arguments.out / "peers.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        if "plain" in {row["contender"] for row in result["failures"]}:
            print("bench.peers: plain failed, to which the tables compare; see above, and peers.json", file=sys.stderr)
            return 1
        (arguments.out / "peers.md").write_text(text := render(result), "utf-8")
    print(text)
    return int(bool(result["failures"]))
