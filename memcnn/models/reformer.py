"""A language model of reversible transformer blocks, as in the Reformer.

Kitaev, Kaiser, Levskaya, "Reformer: The Efficient Transformer", arXiv:2001.04451, section 3: Y1 = X1 + Attention(X2),
Y2 = X2 + FeedForward(Y1). Attention is full and causal; the paper's hashed attention (section 2) is not included.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memcnn.engine.exact import Grid
from memcnn.models.attention import KeyValueCache, transformer_block
from memcnn.models.streams import check_shape, reversible_chain

__all__ = ["ReversibleLM", "reformer_small"]


class ReversibleLM(nn.Module):
    """Embedding, reversible blocks with causal attention, LayerNorm, and logits by the same embedding.

    Both streams start as the embedding of the tokens, and their mean is normalised at the end.

    Args:
        vocabulary: number of different tokens.
        depth: number of blocks.
        dim: width of a token, a multiple of ``heads``.
        heads: number of attention heads.
        context: the largest number of positions.
        drop: probability of stochastic depth.
        exact: invert without rounding, as for ``AdditiveCoupling``.
        disable: keep the weights, but store every activation.
    """

    def __init__(
        self,
        vocabulary: int,
        depth: int,
        dim: int,
        heads: int,
        *,
        context: int = 256,
        drop: float = 0.0,
        exact: bool | float | Grid = False,
        disable: bool = False,
    ):
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(vocabulary, dim)
        self.position = nn.Embedding(context, dim)
        for table in (self.embedding, self.position):
            nn.init.normal_(table.weight, std=0.02)
        blocks = (transformer_block(dim, heads, causal=True, drop=drop, exact=exact) for _ in range(depth))
        self.blocks = reversible_chain(blocks, disable)
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, *, cache: KeyValueCache | None = None) -> Tensor:
        """Return the logits of each next token, (N, T, vocabulary), for ``tokens``, int64 of shape (N, T).

        Args:
            tokens: the text so far; with ``cache``, only the tokens after the cached ones.
            cache: keys and values of earlier tokens, extended by this call. Only under ``torch.no_grad()``.

        Raises:
            ValueError: more than ``context`` positions, or tokens of another shape.
        """
        check_shape(tokens, ("N", "T"))
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        if end > self.context:
            raise ValueError(f"the model has {self.context} positions: got {end}; shorten the text, or raise context")
        x = self.embedding(tokens) + self.position(torch.arange(start, end, device=tokens.device))
        caches = {} if cache is None else {"cache": cache}
        x1, x2 = self.blocks(torch.cat((x, x), -1), **caches).chunk(2, -1)
        return F.linear(self.norm((x1 + x2) / 2), self.embedding.weight)

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, count: int, *, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return ``tokens``, int64 of shape (N, T), T > 0, and ``count`` further ones: (N, T + count).

        The model is in evaluation mode during the call. Each step after the first evaluates only the newest token,
        because keys and values of the others are cached.

        Args:
            tokens: the beginning of the text.
            count: number of tokens to add.
            temperature: divisor of the logits before the softmax; 0 takes the most probable token.
            generator: the generator that draws the tokens; None for torch's own.

        Raises:
            ValueError: T is 0, T + count is larger than ``context``, or ``temperature`` is negative.
        """
        if tokens.dim() != 2 or not tokens.shape[1]:
            raise ValueError(
                f"tokens must be (N, T) with T of at least 1, a text to continue: got {tuple(tokens.shape)}"
            )
        if temperature < 0:
            raise ValueError(f"temperature must be at least 0: got {temperature}")
        training = self.training
        self.eval()
        try:
            cache, new = KeyValueCache(), tokens
            for _ in range(count):
                logits = self(new, cache=cache)[:, -1]
                if temperature == 0:
                    new = logits.argmax(-1, keepdim=True)
                else:
                    new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
                tokens = torch.cat((tokens, new), 1)
        finally:
            self.train(training)
        return tokens


def reformer_small(vocabulary: int = 256, *, depth: int = 6, context: int = 256, disable: bool = False) -> ReversibleLM:
    """Return a model of bytes: 6 blocks of width 256 with 8 heads."""
    return ReversibleLM(vocabulary, depth, 256, 8, context=context, disable=disable)
