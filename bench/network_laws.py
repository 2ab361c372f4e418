"""Check the laws of reversible blocks on the reference networks, at realistic sizes, with ``python -m memcnn.verify``.

    python -m bench.network_laws                                    all networks: about a quarter of an hour
    python -m bench.network_laws --only glow momentum               some of them
    python -m bench.network_laws --csv reports/networks/laws.csv    the data of a table in docs/networks.md

The invertible part of each network is checked in training mode with its own engine: the encoder of i-RevNet, the blocks
of a transformer, a stage of a U-Net. Finite differences are left to the tests, which draw small networks. Prints
Markdown; ends with status 1 if a law does not hold.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
from torch import nn

from bench.reference import Field
from bench.tables import add_csv_option, publish
from memcnn import ReversibleSequential, cli
from memcnn.models.glow import Glow, glow_cifar
from memcnn.models.irevnet import IRevNet, irevnet_bijective, irevnet_injective
from memcnn.models.momentum import MomentumNet
from memcnn.models.ode import Leapfrog, ReversibleHeun
from memcnn.models.reformer import ReversibleLM
from memcnn.models.resnet import basic_branch
from memcnn.models.reversible_unet import InvertibleUNet, ReversibleUNet
from memcnn.models.reversible_vit import ReversibleViT

LAWS = ("inverse", "gradients", "state", "memory", "log_det")


@dataclass(frozen=True)
class Target:
    """The part of a network to verify.

    Attributes:
        network: the name of the network.
        what: the part and its size, as text.
        shape: shape of the part's input, as for ``memcnn.verify --shape``.
        chain: makes the part from the number of blocks (in each stage, if it has stages).
        blocks: the number of blocks.
        laws: the laws that apply to the part.
    """

    network: str
    what: str
    shape: str
    chain: Callable[[int], nn.Module]
    blocks: int
    laws: Sequence[str] = LAWS[:4]

    def module(self) -> nn.Module:
        """Return the part."""
        return self.chain(self.blocks)


def _momentum(blocks: int) -> nn.Module:
    return MomentumNet(*(basic_branch(16, 16) for _ in range(blocks)), gamma=0.9).blocks


def _scale(steps: int) -> nn.Module:
    """Return a scale of Glow without its down-sampling, so that it keeps the shape."""
    return ReversibleSequential(*list(Glow((3, 32, 32), 1, steps, 64).scales[0])[1:])


targets = SimpleNamespace(
    irevnet=Target(
        "i-RevNet",
        "encoder, 3 stages of 6",
        "4,3,32,32",
        lambda n: irevnet_bijective(units=(n, n, n)).encoder,
        6,
        LAWS[:3],
    ),
    irevnet_stage=Target(
        "i-RevNet", "a stage of 6", "4,12,16,16", lambda n: IRevNet((n,), initial=1, image_channels=12).encoder, 6
    ),
    irevnet_exact=Target(
        "i-RevNet, exact mode",
        "encoder, 3 stages of 6",
        "4,3,32,32",
        lambda n: IRevNet((n, n, n), exact=True).encoder,
        6,
        LAWS[:3],
    ),
    irevnet_zeros=Target(
        "i-RevNet, zeros",
        "injective encoder, 3 stages of 2",
        "4,3,32,32",
        lambda n: irevnet_injective(units=(n, n, n)).encoder,
        2,
        LAWS[1:3],
    ),
    vit=Target(
        "vision transformer", "12 blocks of width 192", "2,64,384", lambda n: ReversibleViT(n, 192, 3).blocks, 12
    ),
    momentum=Target("momentum network", "15 blocks of 16 channels, gamma 0.9", "2,32,32,32", _momentum, 15),
    glow=Target("Glow", "3 scales of 8 steps", "4,3,32,32", lambda n: glow_cifar(depth=n), 8, LAWS[:3]),
    glow_log_det=Target("Glow", "2 scales of 4 steps", "2,3,16,16", lambda n: Glow((3, 16, 16), 2, n, 32), 4, LAWS[4:]),
    glow_scale=Target("Glow", "a scale of 8 steps", "4,12,16,16", _scale, 8),
    lm=Target("language model", "6 blocks of width 256", "1,128,512", lambda n: ReversibleLM(256, n, 256, 8).blocks, 6),
    unet_3d=Target(
        "3-D U-Net",
        "a stage of 8, 16 channels",
        "1,16,16,16,16",
        lambda n: ReversibleUNet(4, 3, (16, 32), n, dims=3).encoder[0],
        8,
    ),
    iunet_2d=Target(
        "invertible U-Net", "3 resolutions, 4 a stage", "2,16,64,64", lambda n: InvertibleUNet(16, 3, n), 4
    ),
    ode=Target("ODE block", "Heun, 50 steps", "64,4", lambda n: ReversibleHeun(Field(2), n).blocks, 50),
    leapfrog=Target("ODE block", "leapfrog, 50 steps", "64,4", lambda n: Leapfrog(Field(2), n).blocks, 50),
)
"""The parts to verify, by a name that ``memcnn.verify`` can load."""


def command(name: str, file: str) -> list[str]:
    """Return the arguments of ``memcnn.verify`` that check a target and write the results to ``file``."""
    target = getattr(targets, name)
    path = f"bench.network_laws:targets.{name}"
    options = ["--shape", target.shape, "--laws", ",".join(target.laws), "--examples", "1", "--mode", "train"]
    options += ["--as-is", "--no-finite-differences", "--json", file]
    return [f"{path}.module", *options, *(["--chain", f"{path}.chain"] if "memory" in target.laws else [])]


def verified(name: str) -> list[dict]:
    """Return a row for each law of a target: the claim closest to its limit.

    Raises:
        RuntimeError: the verifier could not check the target.
    """
    target, begun = getattr(targets, name), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        run = [sys.executable, "-m", "memcnn.verify", *command(name, str(file))]
        done = subprocess.run(run, capture_output=True, text=True)
        if done.returncode not in (cli.DONE, cli.FAILED):
            raise RuntimeError(f"{name}: memcnn.verify ended with status {done.returncode}: {done.stderr.strip()}")
        found = json.loads(file.read_text("utf-8"))
    print(f"{name}: {found['summary']} ({time.monotonic() - begun:.0f} s)", file=sys.stderr, flush=True)
    return [
        {"target": name, "network": target.network, "part": target.what, "input": target.shape, "law": law}
        | worst([result for result in found["results"] if result["law"] == law])
        for law in target.laws
    ]


def worst(results: Sequence[dict]) -> dict:
    """Return the result with the largest error relative to its limit, and the numbers of claims and skipped claims."""
    measured = [result for result in results if result["verdict"] != "SKIP"]
    if not measured:
        return {"claim": results[0]["skipped"], "error": float("nan"), "limit": float("nan"), "verdict": "SKIP"}
    near = max(measured, key=lambda r: (r["verdict"] == "FAIL", float(r["error"]) / max(float(r["limit"]), 1e-300)))
    counts = {"claims": len(results), "skipped": len(results) - len(measured)}
    return {key: near[key] for key in ("claim", "error", "limit", "verdict")} | counts


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a line for each target, with the worst error of each law and its limit, as text for readers."""
    lines = []
    for _, one in rows.groupby("target", sort=False):
        first, laws = one.iloc[0], one.set_index("law")
        line = {"network": first["network"], "part": f"{first['part']}, {first['input'].replace(',', ' x ')}"}
        lines.append(line | {law: _cell(law, laws.loc[law]) if law in laws.index else "" for law in LAWS})
    return pd.DataFrame(lines)


def _cell(law: str, row: pd.Series) -> str:
    if row["verdict"] == "SKIP":
        return "skipped"
    shown = f"{row['error']:.1e} of {row['limit']:.1e}" if law != "memory" else _bytes(row)
    shown = "0" if row["error"] == 0 and law != "memory" else shown
    return shown + " FAILS" * (row["verdict"] == "FAIL")


def _bytes(row: pd.Series) -> str:
    return f"{row['error']:,.0f} of {row['limit']:,.0f} bytes"


@cli.command("bench.network_laws")
def main(arguments: Sequence[str] | None = None) -> int:
    """Verify and print; return 0, or 1 if a law does not hold."""
    parser = cli.parser_from("bench.network_laws", __doc__, whole=True)
    parser.add_argument("--only", nargs="+", choices=vars(targets), default=list(vars(targets)), help="default: all")
    add_csv_option(parser)
    args = parser.parse_args(arguments)
    rows = pd.DataFrame([row for name in args.only for row in verified(name)])
    publish(rows, table(rows), args.csv)
    return cli.FAILED if (rows["verdict"] == "FAIL").any() else cli.DONE


if __name__ == "__main__":
    sys.exit(main())
