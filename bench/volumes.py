"""The largest volume on which a 3-D U-Net can be trained on a card, predicted without the card.

    python -m bench.volumes                       a card of 24 GiB, 2 and 8 blocks a stage
    python -m bench.volumes --gib 80 --blocks 4

The network is ``ReversibleUNet(4, 3, (32, 64, 128), blocks, dims=3)`` in float32: four modalities, three classes. The
step has a batch of one, cross-entropy and SGD with momentum. ``memcnn.memory.predict_step_memory`` predicts the bytes
of all its tensors, in the blocks of CUDA's allocator. The reserve is for the CUDA context and the workspaces of
kernels, which are not predicted. Sides are multiples of 4. Prints Markdown.
"""

import sys
from collections.abc import Iterable, Sequence

import pandas as pd
import torch
from torch import Tensor

from bench.cases import THREE
from bench.reference import as_subject
from bench.result import GIB
from bench.tables import add_csv_option, publish
from memcnn import cli
from memcnn.memory import largest_that_fits, predict_step_memory
from memcnn.models.reversible_unet import ReversibleUNet

FACTOR = 4
"""The network halves the resolution twice, so sides must be multiples of this."""


def peak_bytes(subject: str, blocks: int, side: int) -> int:
    """Return the predicted peak of a training step on one volume."""

    def batch() -> tuple[Tensor, Tensor]:
        return torch.empty(1, 4, side, side, side), torch.zeros(1, side, side, side, dtype=torch.int64)

    def model() -> torch.nn.Module:
        return as_subject(ReversibleUNet(4, 3, (32, 64, 128), blocks, dims=3), subject)

    return predict_step_memory(model, batch, device="cuda").peak_bytes


def largest(gib: float, reserve: float, blocks: Iterable[int]) -> pd.DataFrame:
    """Return a row for each subject and number of blocks: the largest side, its peak, and the peak of the next side."""
    rows = []
    for count in blocks:
        for subject in THREE:
            small = 16  # memory grows with the third power of the side
            guess = small * ((gib - reserve) * GIB / peak_bytes(subject, count, FACTOR * small)) ** (1 / 3)
            found = largest_that_fits(
                lambda n, subject=subject, count=count: peak_bytes(subject, count, FACTOR * n),
                int((gib - reserve) * GIB),
                start=int(guess),
                limit=256,
            )
            side = FACTOR * found["largest"]
            rows.append(
                {
                    "card, GiB": gib,
                    "reserve, GiB": reserve,
                    "blocks a stage": count,
                    "activations": subject,
                    "largest side": side,
                    "voxels": side**3,
                    "peak bytes": found["peak_bytes"],
                    "peak bytes of the next side": found["next_peak_bytes"],
                }
            )
    return pd.DataFrame(rows)


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows as text for readers."""
    plain = rows[rows["activations"] == "plain"].set_index("blocks a stage")["voxels"]
    return pd.DataFrame(
        {
            "blocks a stage": rows["blocks a stage"],
            "activations": rows["activations"],
            "largest volume": [f"{side} x {side} x {side}" for side in rows["largest side"]],
            "voxels / plain": [
                f"{voxels / plain[blocks]:.1f}"
                for voxels, blocks in zip(rows["voxels"], rows["blocks a stage"], strict=True)
            ],
            "peak, GiB": [f"{size / GIB:.1f}" for size in rows["peak bytes"]],
        }
    )


@cli.command("bench.volumes")
def main(arguments: Sequence[str] | None = None) -> int:
    """Predict and print; return 0."""
    parser = cli.parser_from("bench.volumes", __doc__, whole=True)
    parser.add_argument("--gib", type=cli.number, default=24.0, help="memory of the card (%(default)s)")
    parser.add_argument("--reserve", type=cli.number, default=2.0, help="left for context and kernels (%(default)s)")
    parser.add_argument("--blocks", type=cli.count, nargs="+", default=[2, 8], help="blocks a stage (2 8)")
    add_csv_option(parser)
    args = parser.parse_args(arguments)
    if not 0 <= args.reserve < args.gib:
        parser.error(f"--reserve: got {args.reserve:g} GiB of {args.gib:g}, wanted at least 0 and less than --gib")
    rows = largest(args.gib, args.reserve, args.blocks)
    publish(rows, table(rows), args.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
