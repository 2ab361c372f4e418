"""Reversible vision transformer: two streams of tokens, attention as F and the feed-forward network as G.

Mangalam et al., "Reversible Vision Transformers", arXiv:2302.04869, sections 3.2 (the block) and 3.3 (both streams
start as the patches' tokens, and are fused after the last block).
"""

from typing import Any

import torch
from torch import Tensor, nn

from memcnn.engine.exact import Grid
from memcnn.models.attention import transformer_block
from memcnn.models.streams import reversible_chain

__all__ = ["ReversibleViT", "reversible_vit_small", "reversible_vit_tiny"]


class ReversibleViT(nn.Module):
    """Patches to tokens, reversible transformer blocks, fusion of the two streams, linear classifier.

    Args:
        depth: number of blocks.
        dim: width of a token, a multiple of ``heads``.
        heads: number of attention heads.
        image_size: height and width of the image, a multiple of ``patch``.
        patch: height and width of a patch.
        num_classes: number of logits.
        image_channels: channels of the image.
        drop_path: probability of stochastic depth in the last block; it grows linearly from 0 in the first.
        fusion: "concat" normalises the two streams side by side, "mean" their average.
        exact: invert without rounding, as for ``AdditiveCoupling``.
        disable: keep the weights, but store every activation.

    Raises:
        ValueError: the sizes do not fit, or ``fusion`` is neither word.
    """

    def __init__(
        self,
        depth: int,
        dim: int,
        heads: int,
        *,
        image_size: int = 32,
        patch: int = 4,
        num_classes: int = 10,
        image_channels: int = 3,
        drop_path: float = 0.0,
        fusion: str = "concat",
        exact: bool | float | Grid = False,
        disable: bool = False,
    ):
        super().__init__()
        if image_size % patch:
            raise ValueError(f"image_size must be a multiple of patch: got {image_size} and {patch}")
        if fusion not in ("concat", "mean"):
            raise ValueError(f"fusion must be 'concat' or 'mean': got {fusion!r}")
        self.fusion = fusion
        self.image_size = torch.Size((image_size, image_size))
        self.patches = nn.Conv2d(image_channels, dim, patch, patch)
        self.position = nn.Parameter(torch.zeros(1, (image_size // patch) ** 2, dim))
        nn.init.trunc_normal_(self.position, std=0.02)
        drops = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = reversible_chain((transformer_block(dim, heads, drop=p, exact=exact) for p in drops), disable)
        fused = 2 * dim if fusion == "concat" else dim
        self.norm = nn.LayerNorm(fused)
        self.head = nn.Linear(fused, num_classes)

    def forward(self, x: Tensor, *, attention_mask: Tensor | None = None) -> Tensor:
        """Return the logits (N, num_classes) of images x (N, image_channels, image_size, image_size).

        Args:
            x: the images.
            attention_mask: a mask of pairs of patches; see ``memcnn.models.attention.Attention``.

        Raises:
            ValueError: the images have another size.
        """
        if x.shape[-2:] != self.image_size:
            height, width = self.image_size
            raise ValueError(
                f"images must be {height} x {width} pixels, the network's image_size: got {tuple(x.shape)}"
            )
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        masks = {} if attention_mask is None else {"attention_mask": attention_mask}
        return self.head(self.norm(self._fused(self.blocks(torch.cat((tokens, tokens), -1), **masks))).mean(1))

    def _fused(self, streams: Tensor) -> Tensor:
        """Return the tokens (N, T, C) of both streams (N, T, 2 * dim): side by side, or their mean."""
        if self.fusion == "concat":
            return streams
        x1, x2 = streams.chunk(2, -1)
        return (x1 + x2) / 2


def reversible_vit_tiny(num_classes: int = 10, **options: Any) -> ReversibleViT:
    """Return 12 blocks of width 192 with 3 heads, as ViT-Ti, for images (N, 3, 32, 32). Options as for the class."""
    return ReversibleViT(12, 192, 3, num_classes=num_classes, **options)


def reversible_vit_small(num_classes: int = 10, **options: Any) -> ReversibleViT:
    """Return 12 blocks of width 384 with 6 heads, as ViT-S, for images (N, 3, 32, 32). Options as for the class."""
    return ReversibleViT(12, 384, 6, num_classes=num_classes, **options)
