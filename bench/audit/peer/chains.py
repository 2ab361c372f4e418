"""The contenders: ways to run one chain of additive couplings, y1 = x1 + F(x2), y2 = x2 + G(y1)."""

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parents[3]
PEERS = {"upstream": "memcnn==1.5.2", "RevTorch": "revtorch==0.2.4", "RevLib": "revlib==1.7.2"}
"""The contenders that are somebody else's packages, and what to install for them."""


class Coupling(nn.Module):
    """x and y are (N, 2 C, ...), F and G keep the shape (N, C, ...)."""

    def __init__(self, F: nn.Module, G: nn.Module):
        super().__init__()
        self.F, self.G = F, G

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, 1)
        y1 = x1 + self.F(x2)
        y2 = x2 + self.G(y1)
        return torch.cat((y1, y2), 1)


class Checkpointed(Coupling):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class Chain(nn.Module):
    """A contender's module, and in ``branches`` F and G of each block in turn, whatever that module calls them."""

    def __init__(self, branches: Sequence[nn.Module], body: nn.Module):
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def plain(pairs, **_):
    return nn.Sequential(*(Coupling(F, G) for F, G in pairs))


def checkpointed(pairs, **_):
    return nn.Sequential(*(Checkpointed(F, G) for F, G in pairs))


def sequential(pairs, **_):
    ours = _ours()
    return ours.ReversibleSequential(*(ours.AdditiveCoupling(F, G) for F, G in pairs))


def wrapped(pairs, **_):
    ours = _ours()
    return nn.Sequential(*(ours.InvertibleModuleWrapper(ours.AdditiveCoupling(F, G)) for F, G in pairs))


def upstream(pairs, *, random, passes):
    peer = _peer("memcnn")
    return nn.Sequential(
        *(
            peer.InvertibleModuleWrapper(peer.AdditiveCoupling(F, G), preserve_rng_state=random, num_bwd_passes=passes)
            for F, G in pairs
        )
    )


def revtorch(pairs, *, random, passes):
    peer = _peer("revtorch")
    blocks = nn.ModuleList(peer.ReversibleBlock(F, G, fix_random_seed=random) for F, G in pairs)
    return peer.ReversibleSequence(blocks, eagerly_discard_variables=passes == 1)


def revlib(pairs, **_):
    return _peer("revlib").ReversibleSequential(*(branch for pair in pairs for branch in pair))


CONTENDERS: dict[str, Callable[..., nn.Module]] = {
    "plain": plain,
    "checkpoint": checkpointed,
    "ReversibleSequential": sequential,
    "wrapped blocks": wrapped,
    "upstream": upstream,
    "RevTorch": revtorch,
    "RevLib": revlib,
}


def chain(contender: str, branches: Sequence[nn.Module], *, random: bool = False, passes: int = 1) -> Chain:
    """The contender's chain of couplings of F, G, F, G, ... = ``branches``.

    Where a contender has options for these, ``random`` asks it to replay random numbers, and ``passes`` says how many
    backward passes one forward pass is for.
    """
    pairs = list(zip(branches[::2], branches[1::2], strict=True))
    return Chain(branches, CONTENDERS[contender](pairs, random=random, passes=passes))


def conv_branch(channels: int) -> nn.Sequential:
    """That of ``bench.cases``: (N, channels, H, W) to the same shape."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
    )


def _ours():
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return _imported("memcnn", ROOT)


def _peer(package: str):
    return _imported(package, Path(sys.prefix))


def _imported(package: str, home: Path):
    """The package, which must lie in the folder ``home``: two contenders are called memcnn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a peer's own, about its age
        module = importlib.import_module(package)
    if not Path(module.__file__).resolve().is_relative_to(home.resolve()):
        raise ImportError(f"{package} was found in another place than the contender's: run bench.peers --install")
    return module
