"""The branches of reversible transformers: attention and feed-forward network, each after a LayerNorm.

F and G of a block (Kitaev et al., "Reformer", arXiv:2001.04451, section 3; Mangalam et al., "Reversible Vision
Transformers", arXiv:2302.04869, section 3.2): Y1 = X1 + Attention(X2), Y2 = X2 + FeedForward(Y1). The coupling adds, so
that a branch has no residual sum of its own.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memcnn.models.additive import AdditiveCoupling

__all__ = ["Attention", "FeedForward", "KeyValueCache", "StochasticDepth", "transformer_block"]


class StochasticDepth(nn.Module):
    """In training mode, set a sample to 0 with probability ``p``, and divide the others by 1 - p (arXiv:1603.09382).

    Torch's generator decides which samples are dropped, so that a reversible block can replay the choice.

    Args:
        p: the probability, 0 <= p < 1.

    Raises:
        ValueError: ``p`` is outside of this range.
    """

    def __init__(self, p: float):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"the probability of dropping a branch must be at least 0 and less than 1: got {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of x, (N, ...)."""
        if not self.training or self.p == 0:
            return x
        kept = torch.rand(len(x), *[1] * (x.dim() - 1), device=x.device) >= self.p
        return x * kept.to(x.dtype) / (1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class KeyValueCache:
    """The keys and values of the positions so far, for each attention layer that is called with this cache.

    ``length`` is the number of positions that every layer has seen. For inference: nothing here is differentiated.
    """

    def __init__(self) -> None:
        self.entries: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    @property
    def length(self) -> int:
        return min((keys.shape[-2] for keys, _ in self.entries.values()), default=0)

    def extended(self, layer: nn.Module, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values (N, heads, T, dim / heads), and return those of all positions of the layer.

        Raises:
            RuntimeError: gradients are recorded.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a key-value cache was used while gradients are recorded, but it is for generation: call the model "
                "under torch.no_grad(), or without cache"
            )
        if layer in self.entries:
            before = self.entries[layer]
            keys, values = torch.cat((before[0], keys), -2), torch.cat((before[1], values), -2)
        self.entries[layer] = keys, values
        return keys, values


class Attention(nn.Module):
    """LayerNorm, multi-head self-attention, stochastic depth.

    Args:
        dim: width of a token, a multiple of ``heads``.
        heads: number of heads.
        causal: a token attends to itself and to earlier ones only.
        drop: probability of stochastic depth.

    Raises:
        ValueError: ``heads`` does not divide ``dim``.
    """

    def __init__(self, dim: int, heads: int, *, causal: bool = False, drop: float = 0.0):
        super().__init__()
        if dim % heads:
            raise ValueError(f"the width of a token must be a multiple of the {heads} heads: got {dim}")
        self.heads, self.causal = heads, causal
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.drop = StochasticDepth(drop)

    def forward(self, x: Tensor, *, attention_mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """Return a tensor of the shape of x, (N, T, dim).

        Args:
            x: the tokens; with ``cache``, those after the cached ones.
            attention_mask: True where attention is allowed, or a number to add to its logits; of a shape that
                broadcasts to (N, heads, T, T). Not with ``causal``.
            cache: keys and values of earlier tokens.

        Raises:
            ValueError: the layer is causal, and there is an ``attention_mask``.
        """
        if self.causal and attention_mask is not None:
            raise ValueError("got an attention_mask for causal attention, which has a mask of its own; leave one out")
        n, length, dim = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        causal = self.causal
        if cache is not None:
            k, v = cache.extended(self, k, v)
            if causal and length < k.shape[-2]:  # queries are the last of the positions
                seen = torch.ones(length, k.shape[-2], dtype=torch.bool, device=x.device)
                attention_mask, causal = seen.tril(k.shape[-2] - length), False
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, is_causal=causal)
        return self.drop(self.proj(y.transpose(1, 2).reshape(n, length, dim)))


class FeedForward(nn.Sequential):
    """LayerNorm, linear to ``ratio * dim``, GELU, linear back, stochastic depth: (..., dim) to the same shape."""

    def __init__(self, dim: int, ratio: int = 4, *, drop: float = 0.0):
        super().__init__(
            nn.LayerNorm(dim),
            nn.Linear(dim, ratio * dim),
            nn.GELU(),
            nn.Linear(ratio * dim, dim),
            StochasticDepth(drop),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the layers for x."""
        return super().forward(x)


def transformer_block(dim: int, heads: int, *, causal: bool = False, drop: float = 0.0, **options: Any) -> nn.Module:
    """Return the coupling of attention as F and a feed-forward network as G, for streams (N, T, 2 * dim).

    Args:
        dim: width of each of the two streams.
        heads: number of heads.
        causal: as for ``Attention``.
        drop: as for ``Attention``.
        **options: those of ``AdditiveCoupling``, such as ``exact``.
    """
    attention = Attention(dim, heads, causal=causal, drop=drop)
    return AdditiveCoupling(attention, FeedForward(dim, drop=drop), split_dim=-1, **options)
