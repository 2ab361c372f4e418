"""Time training steps on small tensors, where Python takes more time than arithmetic.

    python -m bench.small_tensors            chains and RevNets on the CPU and, where there is one, on the GPU
    python -m bench.small_tensors --quick    short chains and RevNet-38 at batch 1 only

Two tables are printed. The first has a chain of 32 blocks on 2 x 64 x 4 x 4, of this project and its peers. Each
contender runs in its own process on one thread of the CPU, and its CPU time is measured. A step that recomputes takes
at least 4/3 of the time of plain autograd; the last column is a block's time beyond that, in microseconds. The second
table has the full training step of the RevNets at batch 1, 8 and 100 with the engine on and off: eagerly and, on a GPU,
captured in a CUDA graph. All steps of a table are interleaved, so that drift affects them equally.

``python -m bench.peers --install`` installs the peers. If a contender is not installed or fails, the command prints its
name and the reason, and leaves it out.
"""

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial

import pandas as pd
import torch

from bench.audit.peer.chains import CONTENDERS, PEERS
from bench.audit.peers import TINY_BLOCKS, VENV, contenders, measure_time
from bench.modes import prepared
from bench.networks import Network
from bench.result import spread
from bench.speed.timing import timed
from memcnn import cli
from memcnn.models.resnet import MODELS

CASE = {"batch": 2, "channels": 64, "side": 4}
BATCHES = 1, 8, 100
LEFT_OUT = {"upstream"}
"""MemCNN 1.5.2 computes wrong gradients on current PyTorch, so its time means nothing."""


def chain_rows(names: list[str], *, blocks: int, rounds: int, failures: list[dict]) -> pd.DataFrame:
    """Time a chain of each contender.

    Args:
        names: keys of ``CONTENDERS``.
        blocks: number of blocks of the chain.
        rounds: number of rounds. In each one every contender runs three steps, and the fastest one counts.
        failures: receives a row for each contender that fails.

    Returns:
        Rows with "contender", "round" and "seconds".
    """
    with contenders(names, failures) as running:
        for _ in running.each(lambda worker: worker.ask("build", blocks=blocks, **CASE)):
            pass
        for _ in running.each(lambda worker: worker.ask("step", repeat=5)):  # warms up
            pass
        return pd.DataFrame(measure_time(running, blocks, rounds, CASE, steps=3, clock="cpu_seconds"))


def chain_table(rows: pd.DataFrame, *, blocks: int) -> pd.DataFrame:
    """Return milliseconds a step, the ratio to plain, and microseconds a block above 4/3 of plain."""
    seconds = rows.pivot(index="round", columns="contender", values="seconds")
    ordered = [name for name in CONTENDERS if name in seconds]
    return pd.DataFrame(
        [
            {
                "contender": name,
                "ms a step": spread(1e3 * seconds[name], None),
                "/ plain": spread(seconds[name] / seconds["plain"], None),
                "us a block above 4/3 of plain": spread(
                    1e6 * (seconds[name] - 4 / 3 * seconds["plain"]) / blocks, None
                ),
            }
            for name in ordered
        ]
    )


def network_steps(
    names: list[str], batch: int, mode: str, device: torch.device
) -> Iterator[tuple[tuple[str, str], Callable[[int], None]]]:
    """Yield, for each network with the engine off and on, its name with "plain" or "reversible", and its step."""
    for name in names:
        for subject in ("plain", "reversible"):
            step = prepared(Network(name, subject, batch, "small", mode), device)[1]
            yield (name, subject), partial(_repeat, step.run)


def _repeat(run: Callable[[], None], count: int) -> None:
    for _ in range(count):
        run()


def network_table(names: list[str], batches: tuple[int, ...], device: torch.device, limit: float) -> pd.DataFrame:
    """Return the milliseconds of a step with the engine off and on, and their ratio.

    Args:
        names: RevNets, keys of ``MODELS``.
        batches: numbers of images.
        device: where the steps run; on a GPU they are timed eagerly and captured.
        limit: seconds for each batch and mode, after which no further round begins.
    """
    rows = []
    for mode in ("eager", "graph") if device.type == "cuda" else ("eager",):
        for batch in batches:
            seconds, _ = timed(dict(network_steps(names, batch, mode, device)), device, limit)
            rows += [
                {
                    "device": device.type,
                    "mode": mode,
                    "network": name,
                    "batch": batch,
                    "engine off, ms": spread(1e3 * seconds[name, "plain"], None),
                    "engine on, ms": spread(1e3 * seconds[name, "reversible"], None),
                    "on / off": spread(seconds[name, "reversible"] / seconds[name, "plain"], None),
                }
                for name in names
            ]
    return pd.DataFrame(rows)


@cli.command("bench.small_tensors")
def main(arguments: list[str] | None = None) -> int:
    """Measure and print both tables. Return 0, or 1 if plain autograd could not be measured."""
    parser = cli.parser_from("bench.small_tensors", __doc__, whole=True)
    parser.add_argument("--quick", action="store_true", help="4 blocks, RevNet-38 at batch 1, three rounds")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="time for each batch and mode (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    blocks, rounds = (4, 3) if options.quick else (TINY_BLOCKS, 15)
    installed = VENV.is_dir()
    names = [name for name in CONTENDERS if name not in LEFT_OUT and (installed or name not in PEERS)]
    failures = [
        {"contender": name, "reason": "not installed: run python -m bench.peers --install"}
        for name in PEERS
        if name not in LEFT_OUT and not installed
    ]
    rows = chain_rows(names, blocks=blocks, rounds=rounds, failures=failures)
    for failure in failures:
        print(f"left out: {failure['contender']}: {failure['reason']}")
    if rows.empty or "plain" not in set(rows.contender):
        print("bench.small_tensors: plain autograd failed, so there is nothing to compare with", file=sys.stderr)
        return 1
    print(f"Load before: {os.getloadavg()[0]:.1f}. Median [quartiles] of {rounds} interleaved rounds.\n")
    print(chain_table(rows, blocks=blocks).to_string(index=False), "\n")
    networks = ["revnet38"] if options.quick else [name for name in MODELS if name.startswith("revnet")]
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        seconds = 0.0 if options.quick else options.seconds
        table = network_table(networks, BATCHES[:1] if options.quick else BATCHES, torch.device(device), seconds)
        print(table.to_string(index=False), "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
