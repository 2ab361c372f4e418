"""Compare this project with its peers: what programs they get right, and what a training step costs with them.

    python -m bench.peers --install    put the peers into results/peers-venv, with the running torch, and compare
    python -m bench.peers --quick      a small case: about two minutes on two cores
    python -m bench.peers              about twenty

Writes peers.json and, from it alone, peers.md. Contenders whose package is not installed are left out.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from pathlib import Path

import torch

from bench.peer.behaviours import BEHAVIOURS
from bench.peer.chains import CONTENDERS, PEERS, ROOT
from bench.peer_tables import render
from memcnn.training.environment import device_info, git_state, software_versions

VENV = ROOT / "results" / "peers-venv"
TINY = {"batch": 2, "channels": 4, "side": 4}
TINY_BLOCKS, TINY_STEPS = 32, 5


class Failed(RuntimeError):
    """A contender did not answer a command."""


class Contender:
    """A worker process, see ``bench.peer.worker``."""

    def __init__(self, name: str):
        python = _venv_python() if name in PEERS else Path(sys.executable)
        start = "import sys; sys.path.insert(0, sys.argv.pop()); from peer.worker import main; del sys.path[0]; main()"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "99"}
        self.name = name
        self.process = subprocess.Popen([python, "-I", "-W", "ignore", "-c", start, name, str(ROOT / "bench")],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def ask(self, command: str, **arguments) -> dict:
        try:
            print(json.dumps({"command": command, **arguments}), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line) if line else {"failed": f"the process ended at {command!r}"}
        if "failed" in answer:
            raise Failed(f"{self.name}: {answer['failed']}")
        return answer

    def end(self) -> None:
        with self.process:  # closes its stdin, on which it ends
            pass


@contextmanager
def contenders(names: Sequence[str]) -> Iterator[list[Contender]]:
    """Their processes, all started before the first is waited for; one that fails to start is left out and named."""
    with ExitStack() as stack:
        started = [Contender(name) for name in names]
        ready = []
        for contender in started:
            stack.callback(contender.end)
            try:
                version = contender.ask("hello")["torch"]
            except Failed as failure:
                print(f"left out: {failure}", file=sys.stderr)
                continue
            if version != torch.__version__:
                raise SystemExit(f"{contender.name} runs torch {version}, this process {torch.__version__}: delete "
                                 f"{VENV.relative_to(ROOT)} and run bench.peers --install")
            ready.append(contender)
        yield ready


def install(folder: Path = VENV, requirements: Iterable[str] = PEERS.values()) -> None:
    """Packages without their dependencies: those that matter come from the running environment."""
    venv.create(folder, with_pip=True, clear=True)
    (site,) = folder.glob("lib/python*/site-packages")
    running = dict.fromkeys(sysconfig.get_paths()[kind] for kind in ("purelib", "platlib"))
    (site / "running.pth").write_text("\n".join(running) + "\n", "utf-8")
    for requirement in requirements:
        command = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", requirement]
        subprocess.run(command, check=False)


def _venv_python() -> Path:
    return VENV / "bin" / "python"


def measure_behaviours(workers: list[Contender]) -> dict:
    """The outcome of each behaviour, and the evaluations of F and G, with each contender."""
    outcomes, evaluations = [], []
    for worker in workers:
        _progress(f"behaviours: {worker.name}")
        for title in BEHAVIOURS:
            outcomes.append({"contender": worker.name, "behaviour": title, **worker.ask("behaviour", title=title)})
        evaluations.append({"contender": worker.name, **worker.ask("evaluations")})
    return {"behaviours": outcomes, "evaluations": evaluations}


def measure_memory(workers: list[Contender], blocks: int, case: dict) -> list[dict]:
    """Leaves the workers with what they built."""
    rows = []
    for worker in workers:
        _progress(f"memory: {blocks} blocks, {worker.name}")
        worker.ask("build", blocks=blocks, **case)
        rows.append({"contender": worker.name, "blocks": blocks, **worker.ask("memory")})
    return rows


def measure_work(workers: list[Contender], case: dict) -> list[dict]:
    rows = []
    for worker in workers:
        worker.ask("build", blocks=2, **{**case, "batch": 2})
        rows.append({"contender": worker.name, **worker.ask("work")})
    return rows


def measure_time(workers: list[Contender], blocks: int, rounds: int, case: dict, steps: int = 1) -> list[dict]:
    """Of what is built. A round is ``steps`` steps of every contender in turn, each round another one first."""
    rows = []
    for number in range(rounds):
        _progress(f"time: {blocks} blocks of {case['batch']} x {case['channels']} x {case['side']}^2, "
                  f"round {number + 1} of {rounds}")
        first = number % len(workers)
        for worker in workers[first:] + workers[:first]:
            seconds = worker.ask("step", repeat=steps)["seconds"]
            rows.append({"contender": worker.name, "blocks": blocks, "round": number, "seconds": min(seconds)})
    return rows


def measure(*, quick: bool) -> Iterator[dict]:
    """The result so far, once for each depth at which time is taken."""
    names = [name for name in CONTENDERS if name not in PEERS or _venv_python().is_file()]
    case = {"batch": 4 if quick else 32, "channels": 64, "side": 32}
    rounds, shallow, depths = (3, 2, (4, 8)) if quick else (9, 4, (16, 32))
    result = {"quick": quick, "case": case, "peers": PEERS, "rounds": rounds, "tiny": {**TINY, "blocks": TINY_BLOCKS},
              "started": datetime.now(timezone.utc).isoformat(timespec="minutes"), "load_before": os.getloadavg(),
              "device": {**device_info(torch.device("cpu")), "threads": 1, "cores": os.cpu_count()},
              "software": software_versions(), **git_state()}
    with contenders(names) as workers:  # of their own: what forks must not have run a backward pass
        result |= measure_behaviours(workers)
    with contenders(names) as workers:
        result["work"] = measure_work(workers, case)
        for worker in workers:
            worker.ask("build", blocks=TINY_BLOCKS, **TINY)
            worker.ask("step", repeat=TINY_STEPS)
        result["tiny_time"] = measure_time(workers, TINY_BLOCKS, 3 * rounds, TINY, TINY_STEPS)
        result["memory"], result["time"] = measure_memory(workers, shallow, case), []
        for blocks in depths:
            result["memory"] += measure_memory(workers, blocks, case)  # which warms up, too
            result["time"] += measure_time(workers, blocks, rounds, case)
            yield {**result, "load_after": os.getloadavg()}


def _progress(text: str) -> None:
    print(f"[{datetime.now():%H:%M:%S}] {text}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.peers", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="batch 4, depths 4 and 8, 3 rounds")
    parser.add_argument("--install", action="store_true", help="first (re)make results/peers-venv")
    parser.add_argument("--out", type=Path, default=Path("results/peers"), help="folder of the files (%(default)s)")
    arguments = parser.parse_args()
    if arguments.install:
        install()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for result in measure(quick=arguments.quick):
        (arguments.out / "peers.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        (arguments.out / "peers.md").write_text(text := render(result), "utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
