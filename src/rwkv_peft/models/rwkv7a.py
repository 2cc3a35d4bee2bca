"""RWKV-7a "x070a", DeepEmbed: RWKV-7 whose channel-mix is scaled by a small matrix that the token itself names.

That matrix (R,R) is the token's row of `s_emb` plus a linear function `s_emb_x` of its embedding; `s1` brings the input
down to R numbers, `s2` brings their product with the matrix up to the F inner channels, where `s0` is added.

Axes: B rows, T tokens, D width, F inner width, R rank, V vocabulary. Source: RWKV-LM, RWKV-v7/rwkv_v7a_demo.py.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import Tensor, nn

from ..ops import Backend
from ..ops.matrix import Linear
from ..ops.pieces import Vectors
from .base import Inputs, Shapes, Shared, shape_of, vector
from .layers import Documents
from .rwkv7 import ChannelMix7, Rwkv7, Rwkv7Sizes, TimeMix7


@dataclass(frozen=True)
class Rwkv7aSizes(Rwkv7Sizes):
    """Every size of a model, as its tensors have them."""

    rank_s: int

    @staticmethod
    def of(shapes: Shapes) -> Rwkv7aSizes:
        """The sizes of the model whose tensors have these shapes. Raises CheckpointError if one is missing."""
        return Rwkv7aSizes(**asdict(Rwkv7Sizes.of(shapes)), rank_s=shape_of(shapes, "blocks.0.ffn.s1", 2)[1])


class Rwkv7a(Rwkv7):
    """The model."""

    version = "x070a"
    title = "RWKV-7a"
    mark = ".ffn.s_emb.weight"
    sizes: Rwkv7aSizes

    sizes_of = staticmethod(Rwkv7aSizes.of)

    @staticmethod
    def mixes(sizes: Rwkv7aSizes, layer: int) -> tuple[TimeMix7, ChannelMix7a]:  # type: ignore[override]
        return TimeMix7(sizes, layer), ChannelMix7a(sizes)


class ChannelMix7a(ChannelMix7):
    """Two matrices with a squared ReLU between, times a scale that depends on the token."""

    def __init__(self, sizes: Rwkv7aSizes) -> None:
        super().__init__(sizes)
        D, R = sizes.width, sizes.rank_s
        self.s_emb = nn.Embedding(sizes.vocab_size, R * R)
        self.s_emb_x = Linear(D, R * R)
        self.s1, self.s2, self.s0 = vector(D, R), vector(R, sizes.ffn), vector(1, 1, sizes.ffn)

    def shares(self) -> Vectors:
        return self.x_k, None

    def forward(self, mixed: Inputs, shared: Shared, documents: Documents, op: Backend) -> Tensor:
        xk, x = mixed
        k = op.pieces.relu2(self.key(xk))
        return self.value(k * self.scale(x, shared, documents))  # type: ignore[no-any-return]

    def scale(self, x: Tensor, shared: Shared, documents: Documents) -> Tensor:
        """x (B,T,D) → (B,T,F)."""
        s0, s1, s2 = (s.to(x.dtype) for s in (self.s0, self.s1, self.s2))
        matrix: Tensor = self.s_emb(documents.tokens).to(x.dtype) + self.s_emb_x(shared.embedded)  # (B,T,R·R)
        low = (x @ s1)[:, :, None]  # (B,T,1,R)
        low = low @ matrix.view(*x.shape[:2], -1, s1.shape[1])
        return low.squeeze(2) @ s2 + s0
