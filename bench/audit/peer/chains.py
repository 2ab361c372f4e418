"""The contenders: implementations of a chain of additive couplings, y1 = x1 + F(x2), y2 = x2 + G(y1)."""

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
"""The contenders that are other packages, with the requirement to install for each."""


class Coupling(nn.Module):
    """An additive coupling under plain autograd. x is (N, 2C, ...), and F and G keep the shape (N, C, ...)."""

    def __init__(self, F: nn.Module, G: nn.Module):
        super().__init__()
        self.F, self.G = F, G

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, 1)
        y1 = x1 + self.F(x2)
        y2 = x2 + self.G(y1)
        return torch.cat((y1, y2), 1)


class Checkpointed(Coupling):
    """An additive coupling inside ``torch.utils.checkpoint``."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class Chain(nn.Module):
    """A contender's chain.

    Attributes:
        branches: F and G of each block in turn, under names that do not depend on the contender.
        body: the contender's module, which holds the same branches.
    """

    def __init__(self, branches: Sequence[nn.Module], body: nn.Module):
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def plain(pairs, **_):
    """Return the chain under plain autograd."""
    return nn.Sequential(*(Coupling(F, G) for F, G in pairs))


def checkpointed(pairs, **_):
    """Return the chain with a checkpoint for each block."""
    return nn.Sequential(*(Checkpointed(F, G) for F, G in pairs))


def sequential(pairs, **_):
    """Return this project's ``ReversibleSequential``."""
    ours = _ours()
    return ours.ReversibleSequential(*(ours.AdditiveCoupling(F, G) for F, G in pairs))


def wrapped(pairs, **_):
    """Return an ``nn.Sequential`` of this project's wrapped blocks."""
    ours = _ours()
    return nn.Sequential(*(ours.InvertibleModuleWrapper(ours.AdditiveCoupling(F, G)) for F, G in pairs))


def upstream(pairs, *, random, passes):
    """Return an ``nn.Sequential`` of wrapped blocks of MemCNN 1.5.2."""
    peer = _peer("memcnn")
    return nn.Sequential(
        *(
            peer.InvertibleModuleWrapper(peer.AdditiveCoupling(F, G), preserve_rng_state=random, num_bwd_passes=passes)
            for F, G in pairs
        )
    )


def revtorch(pairs, *, random, passes):
    """Return RevTorch's ``ReversibleSequence``."""
    peer = _peer("revtorch")
    blocks = nn.ModuleList(peer.ReversibleBlock(F, G, fix_random_seed=random) for F, G in pairs)
    return peer.ReversibleSequence(blocks, eagerly_discard_variables=passes == 1)


def revlib(pairs, **_):
    """Return RevLib's ``ReversibleSequential``."""
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
    """Return the contender's chain of couplings.

    Args:
        contender: a key of ``CONTENDERS``.
        branches: F and G of each block in turn.
        random: ask the contender to replay random numbers, if it has such an option.
        passes: number of backward passes after one forward pass, for contenders that must know it.
    """
    pairs = list(zip(branches[::2], branches[1::2], strict=True))
    return Chain(branches, CONTENDERS[contender](pairs, random=random, passes=passes))


def conv_branch(channels: int) -> nn.Sequential:
    """Return the branch of ``bench.cases``. It keeps the shape (N, channels, H, W)."""
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
    """Import a package, and check that it lies in the folder ``home``, because two contenders are called memcnn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old peers warn about deprecated calls
        module = importlib.import_module(package)
    if not Path(module.__file__).resolve().is_relative_to(home.resolve()):
        raise ImportError(
            f"{package} was imported from {module.__file__}, expected in {home}: run bench.peers --install"
        )
    return module
