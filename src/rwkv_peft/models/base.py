"""What every RWKV version is: an embedding, layers of time-mix and channel-mix, a head. Versions differ in the mixes.

Parameters have the names of the official files, where `att` is the time-mix (attention's place) and `ffn` the
channel-mix. Axes: B rows, T tokens, D width, H heads, N head size, V vocabulary, L layers, S documents.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import AdapterConfig, ChatForm
from ..errors import CheckpointError
from ..ops import Backend
from ..ops.matrix import Linear, QuantizedLinear
from ..ops.pieces import LayerNorm, Vectors
from .layers import Documents, Embedding
from .state import ModelState, Sizes

Shapes = Mapping[str, tuple[int, ...]]
Inputs = tuple[Tensor, ...]
LN_EPS = 1e-5
LN_X_EPS = 64e-5


class Shared(NamedTuple):
    """What the first layer hands to all others."""

    embedded: Tensor
    """(B,T,D) the normalised embedding of the tokens."""
    v_first: Tensor
    """(B,T,D) RWKV-7's value of the first layer."""


class Keep:
    """How the inputs of what is computed anew are kept until then: as they are. Training has another way."""

    def around(self) -> AbstractContextManager[object]:
        """What to be in while `checkpoint` is called."""
        return nullcontext()

    def settle(self) -> None:
        """To be called after each backward pass."""


AS_THEY_ARE = Keep()


class TimeMix(nn.Module, ABC):
    """The recurrence and what prepares its inputs."""

    time_parameters: ClassVar[tuple[str, ...]]
    """Names of the parameters that are the part `time`."""
    heads: int
    time_state: nn.Parameter | None
    """(H,N,N) the learned initial state, where there is one: row = value index, column = key index."""
    shift_state: nn.Parameter | None
    """(D,) the same for the token shift."""

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("time_state", None)
        self.register_parameter("shift_state", None)

    def low_rank(self, x: Tensor, name: str, between: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """x (…,D) times the layer's own matrices `name`1 and `name`2, with a function in between."""
        inner = x @ getattr(self, f"{name}1").to(x.dtype)
        outer: Tensor = (inner if between is None else between(inner)) @ getattr(self, f"{name}2").to(x.dtype)
        return outer

    def split(self, x: Tensor) -> Tensor:
        """(B,T,D) → (B,T,H,N)."""
        return x.view(*x.shape[:-1], self.heads, -1)

    @abstractmethod
    def shares(self) -> Vectors:
        """The vectors (D,) or (1,1,D) by which the token before is mixed into each of the inputs."""

    @abstractmethod
    def forward(
        self, mixed: Inputs, wkv: Tensor | None, before: Tensor, shared: Shared, documents: Documents, op: Backend
    ) -> tuple[Tensor, Tensor, Shared]:
        """mixed (B,T,D) for each of `shares`, wkv (S,H,N,N) or None, before (S,D) → output, wkv after it, shared."""


class ChannelMix(nn.Module, ABC):
    """Two matrices with a squared ReLU between, on a token mixed with the one before."""

    time_parameters: ClassVar[tuple[str, ...]]
    shift_state: nn.Parameter | None
    """(D,) the learned initial token shift."""

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("shift_state", None)

    @abstractmethod
    def shares(self) -> Vectors:
        """As in TimeMix."""

    @abstractmethod
    def forward(self, mixed: Inputs, shared: Shared, documents: Documents, op: Backend) -> Tensor:
        """mixed (B,T,D) for each of `shares` → the output (B,T,D)."""


class Block(nn.Module):
    """One layer: time-mix, then channel-mix, each added to its input."""

    def __init__(self, width: int, layer: int, att: TimeMix, ffn: ChannelMix) -> None:
        super().__init__()
        self.is_first = layer == 0
        if self.is_first:
            self.ln0 = LayerNorm(width, LN_EPS)
        self.ln1 = LayerNorm(width, LN_EPS)
        self.ln2 = LayerNorm(width, LN_EPS)
        self.att = att
        self.ffn = ffn

    def forward(
        self,
        x: Tensor,
        shared: Shared,
        wkv: Tensor | None,
        shift: Tensor,
        documents: Documents,
        op: Backend,
        grad_checkpoint: str = "none",
        draws: bool = False,
        keep: Keep = AS_THEY_ARE,
    ) -> tuple[Tensor, Shared, Tensor, Tensor]:
        """x (B,T,D), wkv (S,H,N,N) or None for zeros, shift (2,S,D) → the same after this layer.

        `grad_checkpoint`: what the backward pass computes anew, instead of keeping it: none, block (the layer, as two
        halves), selective (its time-mix alone), operator (the recurrence alone). `draws`: whether random numbers are
        drawn in between. `keep`: how the inputs of halves are kept.
        """

        def run(half: Callable[..., Any], again: bool, *args: Any) -> Any:
            if not again or not torch.is_grad_enabled():
                return half(*args)
            with keep.around():
                return checkpoint(half, *args, use_reentrant=False, preserve_rng_state=draws)

        if grad_checkpoint == "operator":
            op = op.again
        again = grad_checkpoint in ("selective", "block")
        x, out, shared, wkv, att_last = run(self.mix_time, again, x, shared, wkv, shift[0], documents, op)
        again = grad_checkpoint == "block"
        x, ffn_last = run(self.mix_channels, again, x, out, shared, shift[1], documents, op)
        return x, shared, wkv, torch.stack((att_last, ffn_last))

    def mix_time(
        self, x: Tensor, shared: Shared, wkv: Tensor | None, before: Tensor, documents: Documents, op: Backend
    ) -> tuple[Tensor, Tensor, Shared, Tensor, Tensor]:
        """The first half: x, what is to be added to it, shared, wkv and the last input after these tokens."""
        if self.is_first:
            x = self.ln0(x)
            shared = shared._replace(embedded=x)
        x, mixed, last = op.pieces.norm_mix(x, None, self.ln1, before, documents, self.att.shares())
        out, wkv, shared = self.att(mixed, wkv, before, shared, documents, op)
        return x, out, shared, wkv, last

    def mix_channels(
        self, x: Tensor, out: Tensor, shared: Shared, before: Tensor, documents: Documents, op: Backend
    ) -> tuple[Tensor, Tensor]:
        """The second half: x after the layer, and its last input."""
        x, mixed, last = op.pieces.norm_mix(x, out, self.ln2, before, documents, self.ffn.shares())
        return x + self.ffn(mixed, shared, documents, op), last

    def start(self, zeros: Tensor) -> tuple[Tensor | None, Tensor]:
        """The learned initial states: wkv (S,H,N,N), or None; and shift (2,S,D), or `zeros` (S,D) twice."""
        learned = self.att.shift_state, self.ffn.shift_state
        shift = torch.stack([zeros if s is None else s.to(zeros.dtype).expand_as(zeros) for s in learned])
        wkv = self.att.time_state
        return None if wkv is None else wkv.expand(len(zeros), *wkv.shape), shift


class Rwkv(nn.Module, ABC):
    """A model of any version. `op` is the backend of the recurrence; set it before calling."""

    version: ClassVar[str]
    """As file names have it, e.g. x070."""
    wkv: ClassVar[int]
    """Which of the operators is its recurrence: 5, 6 or 7."""
    title: ClassVar[str]
    """For people, e.g. RWKV-7."""
    mark: ClassVar[str]
    """How the names in a file tell this version: one ends in it."""
    unused: ClassVar[frozenset[str]] = frozenset()
    """Tensors that official files hold and no program reads."""
    op: Backend
    like: Tensor
    source: str = ""  # name of the file that the weights came from, its path, and the weights' fingerprint
    path: Path | None = None
    fingerprint: str = ""
    quant: str = "none"  # how the matrices are stored
    adapter_config: AdapterConfig | None = None  # of the adapter that it has, and what it puts in whose place
    form: ChatForm = ChatForm()  # how conversations were written where it was trained
    adapter_bases: dict[str, Tensor]
    adapter_count: int = 0

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.grad_checkpoint: str | tuple[str, ...] = "none"  # of all layers, or of each; see `Block.forward`
        self.draws = True
        self.keep: Keep = AS_THEY_ARE
        self.adapter_bases = {}
        # empty, in the dtype and on the device of the activations, so that `.to()` and `.double()` move them too
        self.register_buffer("like", torch.empty(0), persistent=False)
        self.emb = Embedding(sizes.vocab_size, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes.width, i, *self.mixes(sizes, i)) for i in range(sizes.layers))
        self.ln_out = LayerNorm(sizes.width, LN_EPS)
        self.head = Linear(sizes.width, sizes.vocab_size)

    @staticmethod
    @abstractmethod
    def sizes_of(shapes: Shapes) -> Sizes:
        """The sizes of the model whose tensors have these shapes. Raises CheckpointError if one is missing."""

    @staticmethod
    @abstractmethod
    def mixes(sizes: Sizes, layer: int) -> tuple[TimeMix, ChannelMix]:
        """The two halves of a layer."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations; weights that train may be stored in another."""
        return self.like.dtype

    def forward(
        self, tokens: Tensor, state: ModelState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """Logits (B,T,V) of the token after each of `tokens` (B,T) int64, and the state after the last.

        `state` is where the tokens begin; None is `initial_state`. With `cu_seqlens`, S+1 rising offsets from 0 to T,
        B is 1 and the row holds S documents that do not see each other; `state` then has S entries. Raises ValueError
        if the shapes do not fit.
        """
        x, state = self.hidden(tokens, state, cu_seqlens)
        return self.head(x), state

    def hidden(
        self, tokens: Tensor, state: ModelState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """As `forward`, but stops before the head: (B,T,D)."""
        documents = Documents(tokens, cu_seqlens)
        state = state or self.initial_state(documents.count)
        if state.wkv.shape[1] != documents.count:
            raise ValueError(f"state has {state.wkv.shape[1]} entries; the tokens hold {documents.count} documents")
        x, shared = self.emb(tokens).to(self.dtype), Shared(self.like, self.like)  # layer 0 sets what is shared
        wkv, shift = [], []
        for block, wkv_in, shift_in, mode in zip(self.blocks, state.wkv, state.shift, self.checkpoints(), strict=True):
            args = (wkv_in, shift_in, documents, self.op, mode, self.draws, self.keep)
            x, shared, wkv_out, shift_out = block(x, shared, *args)
            wkv.append(wkv_out)
            shift.append(shift_out)
        return self.ln_out(x), ModelState(torch.stack(wkv), torch.stack(shift))

    def hidden_of(self, documents: Documents) -> Tensor:
        """As `hidden` of the tokens of `documents` from the initial state, but makes no state: (B,T,D)."""
        x, shared = self.emb(documents.tokens).to(self.dtype), Shared(self.like, self.like)
        zeros = x.new_zeros(documents.count, self.sizes.width)
        for block, mode in zip(self.layers(), self.checkpoints(), strict=True):
            args = (*block.start(zeros), documents, self.op, mode, self.draws, self.keep)
            x, shared, _, _ = block(x, shared, *args)
        return self.ln_out(x)  # type: ignore[no-any-return]

    def checkpoints(self) -> Sequence[str]:
        """`grad_checkpoint` of each layer."""
        one = self.grad_checkpoint
        return (one,) * self.sizes.layers if isinstance(one, str) else one

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every weight by its official name, whether it is a parameter or stored in another form."""
        layers = ((name, getattr(module, "base", module)) for name, module in self.named_modules())
        matrices = {f"{n}.weight": (m.rows, m.in_features) for n, m in layers if isinstance(m, QuantizedLinear)}
        return {name: tuple(p.shape) for name, p in self.named_parameters()} | matrices

    def layers(self) -> list[Block]:
        """The layers, in order."""
        return [cast(Block, block) for block in self.blocks]

    def initial_state(self, documents: int = 1) -> ModelState:
        """The state before any token: zeros, or what was learned where a layer has a `time_state` or `shift_state`."""
        state = ModelState.zeros(self, documents)
        starts = [block.start(state.shift[0, 0]) for block in self.layers()]
        if all(wkv is None for wkv, _ in starts):
            return ModelState(state.wkv, torch.stack([shift for _, shift in starts]))
        wkv = [zeros if learned is None else learned for zeros, (learned, _) in zip(state.wkv, starts, strict=True)]
        # a float64 one stays so
        dtype = torch.promote_types(wkv[0].dtype, torch.float32)
        return ModelState(torch.stack([w.to(dtype) for w in wkv]), torch.stack([shift for _, shift in starts]))


def vector(*shape: int) -> nn.Parameter:
    """A parameter without values yet."""
    return nn.Parameter(torch.empty(*shape))


def common_sizes(shapes: Shapes, heads_by: str) -> dict[str, int]:
    """The fields of `Sizes`; `heads_by` is a tensor (H,N). Raises CheckpointError if they do not fit together."""
    layers = len({m[1] for name in shapes if (m := re.match(r"blocks\.(\d+)\.", name))})
    vocab_size, width = shape_of(shapes, "emb.weight", 2)
    heads, head_size = shape_of(shapes, heads_by, 2)
    if heads * head_size != width:
        raise CheckpointError(f"{heads_by} {heads, head_size}: {heads} heads of {head_size} are not the width {width}")
    ffn = shape_of(shapes, "blocks.0.ffn.key.weight", 2)[0]
    return {"layers": layers, "width": width, "head_size": head_size, "vocab_size": vocab_size, "ffn": ffn}


def shape_of(shapes: Shapes, name: str, axes: int) -> tuple[int, ...]:
    """The shape of a tensor. Raises CheckpointError if it is missing, or has not so many axes."""
    if name not in shapes:
        raise CheckpointError(f"tensor {name} is missing; get the file again")
    if len(shapes[name]) != axes or 0 in shapes[name]:
        raise CheckpointError(f"tensor {name} has shape {shapes[name]}; it should have {axes} axes; get the file again")
    return shapes[name]
