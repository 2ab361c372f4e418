"""Convert the weights of a network of MemCNN 1.5 into those of this version.

    python -m memcnn.convert 80000.pt revnet38.pt --unit-pixels

IN is a file with a state dict, written by torch.save. OUT receives the state dict of a network in memcnn.models.resnet.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from memcnn import cli
from memcnn.models.resnet import MODELS
from memcnn.weights import convert_state_dict


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.parser_from("memcnn.convert", __doc__, whole=True)
    parser.add_argument("source", metavar="IN", type=Path, help="state dict of MemCNN 1.5")
    parser.add_argument("target", metavar="OUT", type=Path, help="file to write")
    parser.add_argument(
        "--model", choices=MODELS, metavar="NAME", help=f"{', '.join(MODELS)} (default: the one that fits)"
    )
    parser.add_argument("--unit-pixels", action="store_true", help="scale the first convolution, so that the network "
                        "takes images from memcnn.data.normalise, not pixels from 0 to 255")  # fmt: skip
    return parser


def read_state(path: Path) -> dict:
    """Return the state dict in a file.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}; wanted a file that torch.save wrote") from error
    except Exception as error:  # unpicklers raise anything
        raise ValueError(
            f"{path} holds more than tensors, or torch.save did not write it: {type(error).__name__}. If it holds a "
            "whole module, load it with torch.load(..., weights_only=False), which can run code, and save its "
            "state_dict()"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        inside = (
            f"a dict of {', '.join(map(repr, list(state)[:5]))}" if isinstance(state, dict) else type(state).__name__
        )
        raise ValueError(f"{path} holds {inside}, wanted a state dict: save only the part that is one")
    return state


@cli.command("memcnn.convert")
def main(arguments: Sequence[str] | None = None) -> int:
    """Convert the file; return the exit status."""
    parser = build_parser()
    given = parser.parse_args(arguments)
    if given.target.exists():
        parser.error(f"argument OUT: {given.target} exists already; wanted a new file")
    if not given.target.parent.is_dir():
        parser.error(f"argument OUT: {given.target.parent} is not a folder; create it first")
    try:
        state = convert_state_dict(read_state(given.source), given.model, unit_pixels=given.unit_pixels)
    except ValueError as error:
        parser.error(str(error))
    torch.save(state, given.target)
    print(f"{given.target}: {len(state)} tensors")
    return cli.DONE


if __name__ == "__main__":
    sys.exit(main())
