"""RWKV-7 "x070": one forward for training, for contexts in pieces and for inference.

Parameters have the names of the official files, where `att` is the time-mix (attention's place) and `ffn` the
channel-mix: `x_*` mix a token with the one before; `receptance key value output` are the matrices; `w* a* v* g*` are
low-rank functions of the token for the decay, the in-context learning rate, the value residual and the gate
(`w0 + act(x @ w1) @ w2`); `k_k k_a` make the removal key and the replacement key, `r_k` is the bonus of the current
token, `ln_x` normalises heads.

Axes: B rows, T tokens, D width, H heads, N head size, V vocabulary, L layers, S documents.
Source: "RWKV-7 Goose" (arXiv 2503.14456).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import CheckpointError
from ..ops import Backend
from .layers import Documents, GroupNorm, LayerNorm, Linear
from .state import ModelState

Shapes = Mapping[str, tuple[int, ...]]
LN_EPS = 1e-5
LN_X_EPS = 64e-5


@dataclass(frozen=True)
class Rwkv7Sizes:
    """Every size of a model, as its tensors have them."""

    layers: int
    width: int
    head_size: int
    vocab_size: int
    ffn: int
    rank_w: int
    rank_a: int
    rank_v: int
    rank_g: int

    @property
    def heads(self) -> int:
        return self.width // self.head_size

    @staticmethod
    def of(shapes: Shapes) -> Rwkv7Sizes:
        """The sizes of the model whose tensors have these shapes. Raises CheckpointError if one is missing."""
        layers = len({m[1] for name in shapes if (m := re.match(r"blocks\.(\d+)\.", name))})
        vocab_size, width = _shape(shapes, "emb.weight", 2)
        heads, head_size = _shape(shapes, "blocks.0.att.r_k", 2)
        if heads * head_size != width:
            raise CheckpointError(
                f"blocks.0.att.r_k {heads, head_size}: {heads} heads of {head_size} are not the width {width}"
            )
        rank_w, rank_a, rank_g = (_shape(shapes, f"blocks.0.att.{x}1", 2)[1] for x in "wag")
        rank_v = _shape(shapes, "blocks.1.att.v1", 2)[1] if layers > 1 else 1  # layer 0 has no value residual
        ffn = _shape(shapes, "blocks.0.ffn.key.weight", 2)[0]
        return Rwkv7Sizes(layers, width, head_size, vocab_size, ffn, rank_w, rank_a, rank_v, rank_g)


class Rwkv7(nn.Module):
    """The model. `op` is the backend of the recurrence; set it before calling."""

    version = "x070"
    mark = ".att.r_k"  # how the names in a file tell this version
    unused = frozenset({"blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"})  # layer 0 has no value residual
    op: Backend
    like: Tensor
    source: str = ""  # name of the file that the weights came from, and their fingerprint
    fingerprint: str = ""

    sizes_of = Rwkv7Sizes.of

    def __init__(self, sizes: Rwkv7Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.grad_checkpoint = False
        # empty, in the dtype and on the device of the activations, so that `.to()` and `.double()` move them too
        self.register_buffer("like", torch.empty(0), persistent=False)
        self.emb = nn.Embedding(sizes.vocab_size, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes, layer) for layer in range(sizes.layers))
        self.ln_out = LayerNorm(sizes.width, LN_EPS)
        self.head = Linear(sizes.width, sizes.vocab_size)

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations; weights that train may be stored in another."""
        return self.like.dtype

    def forward(
        self, tokens: Tensor, state: ModelState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """Logits (B,T,V) of the token after each of `tokens` (B,T) int64, and the state after the last.

        With `cu_seqlens`, S+1 rising offsets from 0 to T, B is 1 and the row holds S documents that do not see each
        other; `state` then has S entries. Raises ValueError if the shapes do not fit.
        """
        x, state = self.hidden(tokens, state, cu_seqlens)
        return self.head(x), state

    def hidden(
        self, tokens: Tensor, state: ModelState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """As `forward`, but stops before the head: (B,T,D)."""
        documents = Documents(tokens, cu_seqlens)
        state = state or ModelState.zeros(self, documents.count)
        if state.wkv.shape[1] != documents.count:
            raise ValueError(f"state has {state.wkv.shape[1]} entries; the tokens hold {documents.count} documents")
        x = self.emb(tokens).to(self.dtype)
        v_first = self.like  # layer 0 sets it
        wkv, shift = [], []
        for block, wkv_in, shift_in in zip(self.blocks, state.wkv, state.shift, strict=True):
            args = (x, v_first, wkv_in, shift_in, documents, self.op)
            if self.grad_checkpoint and torch.is_grad_enabled():
                x, v_first, wkv_out, shift_out = checkpoint(block, *args, use_reentrant=False)
            else:
                x, v_first, wkv_out, shift_out = block(*args)
            wkv.append(wkv_out)
            shift.append(shift_out)
        return self.ln_out(x), ModelState(torch.stack(wkv), torch.stack(shift))


class Block(nn.Module):
    """One layer: time-mix, then channel-mix, each added to its input."""

    def __init__(self, sizes: Rwkv7Sizes, layer: int) -> None:
        super().__init__()
        if layer == 0:
            self.ln0 = LayerNorm(sizes.width, LN_EPS)
        self.ln1 = LayerNorm(sizes.width, LN_EPS)
        self.ln2 = LayerNorm(sizes.width, LN_EPS)
        self.att = TimeMix(sizes, layer)
        self.ffn = ChannelMix(sizes)
        self.is_first = layer == 0

    def forward(
        self, x: Tensor, v_first: Tensor, wkv: Tensor, shift: Tensor, documents: Documents, op: Backend
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (B,T,D), v_first (B,T,D), wkv (S,H,N,N), shift (2,S,D) → the same four after this layer."""
        if self.is_first:
            x = self.ln0(x)
        out, v_first, wkv, att_last = self.att(self.ln1(x), v_first, wkv, shift[0], documents, op)
        x = x + out
        out, ffn_last = self.ffn(self.ln2(x), shift[1], documents)
        return x + out, v_first, wkv, torch.stack((att_last, ffn_last))


class TimeMix(nn.Module):
    """The recurrence and what prepares its inputs."""

    time_parameters = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "v0", "k_k", "k_a", "r_k")

    def __init__(self, sizes: Rwkv7Sizes, layer: int) -> None:
        super().__init__()
        D, H, N = sizes.width, sizes.heads, sizes.head_size
        self.heads, self.is_first = H, layer == 0
        for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "k_k", "k_a"):
            self.register_parameter(name, _vector(1, 1, D))
        self.w1, self.w2 = _vector(D, sizes.rank_w), _vector(sizes.rank_w, D)
        self.a1, self.a2 = _vector(D, sizes.rank_a), _vector(sizes.rank_a, D)
        self.g1, self.g2 = _vector(D, sizes.rank_g), _vector(sizes.rank_g, D)
        if not self.is_first:
            self.v0, self.v1, self.v2 = _vector(1, 1, D), _vector(D, sizes.rank_v), _vector(sizes.rank_v, D)
        self.r_k = _vector(H, N)
        self.receptance, self.key, self.value, self.output = (Linear(D, D) for _ in range(4))
        self.ln_x = GroupNorm(H, D, eps=LN_X_EPS)

    def forward(
        self, x: Tensor, v_first: Tensor, wkv: Tensor, before: Tensor, documents: Documents, op: Backend
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        p = {name: value.to(x.dtype) for name, value in self.named_parameters(recurse=False)}
        shifted, last = documents.shift(x, before)
        delta = shifted - x
        xr, xw, xk, xv, xa, xg = (x + delta * p[name] for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g"))
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        raw_w = p["w0"] + torch.tanh(xw @ p["w1"]) @ p["w2"]
        w = -F.softplus(-raw_w.to(torch.promote_types(x.dtype, torch.float32))) - 0.5
        iclr = torch.sigmoid(p["a0"] + (xa @ p["a1"]) @ p["a2"])
        gate = torch.sigmoid(xg @ p["g1"]) @ p["g2"]
        if self.is_first:
            v_first = v
        else:
            v = v + (v_first - v) * torch.sigmoid(p["v0"] + (xv @ p["v1"]) @ p["v2"])
        kk = F.normalize(self._split(k * p["k_k"]), dim=-1)
        k = k * (1 + (iclr - 1) * p["k_a"])
        r, w, k, v_heads, iclr = (self._split(y) for y in (r, w, k, v, iclr))
        y, wkv = op.wkv7(r, w, k, v_heads, kk, iclr, wkv, documents.cu_seqlens)
        bonus = (r * k * p["r_k"]).sum(-1, keepdim=True) * v_heads  # (B,T,H,N)
        y = self.ln_x(y.flatten(2)) + bonus.flatten(2)
        return self.output(y * gate), v_first, wkv, last

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, -1)  # (B,T,D) → (B,T,H,N)


class ChannelMix(nn.Module):
    """Two matrices with a squared ReLU between."""

    time_parameters = ("x_k",)

    def __init__(self, sizes: Rwkv7Sizes) -> None:
        super().__init__()
        self.x_k = _vector(1, 1, sizes.width)
        self.key = Linear(sizes.width, sizes.ffn)
        self.value = Linear(sizes.ffn, sizes.width)

    def forward(self, x: Tensor, before: Tensor, documents: Documents) -> tuple[Tensor, Tensor]:
        shifted, last = documents.shift(x, before)
        k = self.key(x + (shifted - x) * self.x_k.to(x.dtype))
        return self.value(torch.relu(k).square()), last


def _vector(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape))


def _shape(shapes: Shapes, name: str, axes: int) -> tuple[int, ...]:
    if name not in shapes:
        raise CheckpointError(f"tensor {name} is missing; get the file again")
    if len(shapes[name]) != axes or 0 in shapes[name]:
        raise CheckpointError(f"tensor {name} has shape {shapes[name]}; it should have {axes} axes; get the file again")
    return shapes[name]
