"""Running a model: token by token, the state handed on. B rows, V vocabulary."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .adapters import attach_saved, read_adapters
from .config import GenerateConfig, InferenceConfig, SamplingConfig
from .data.tokenizer import StreamDecoder, Tokenizer, tokenizer_for
from .errors import RwkvPeftError
from .export.states import check_state, load_state
from .loading import EMBEDDING, find_device, load_model
from .models import ModelState, Rwkv


class Session:
    """A model, and the state of what it has read and written so far."""

    def __init__(self, model: Rwkv, tokenizer: Tokenizer, state: ModelState | None = None) -> None:
        self.model, self.tokenizer, self.state = model, tokenizer, state
        self.start = state  # None is the model's own
        self.stop_token = tokenizer.end_token  # ends an answer, and so does the end token
        self.logits: Tensor | None = None  # (V,) of the token that comes next

    @torch.no_grad()
    def read(self, ids: Sequence[int]) -> None:
        """Let the model read at least one token."""
        tokens = torch.tensor([ids], device=self.model.like.device)
        hidden, self.state = self.model.hidden(tokens, self.state)
        self.logits = self.model.head(hidden[0, -1]).float()

    def write(self, sampling: SamplingConfig) -> Iterator[str]:
        """Pieces of the model's continuation, until the end token, a stop text, or the most tokens.

        The stop text is not part of the pieces.
        """
        random = torch.Generator()
        random.manual_seed(sampling.seed) if sampling.seed is not None else random.seed()
        decoder, stops = self.tokenizer.decoder(), StopTexts(sampling.stop)
        for _ in range(sampling.max_tokens):
            assert self.logits is not None, "read something first"
            token = sample(self.logits, sampling.temperature, sampling.top_p, random)
            if token in (self.tokenizer.end_token, self.stop_token):
                break
            yield from stops.feed(decoder.feed(token))
            if stops.reached:
                return
            self.read([token])
        yield from stops.feed(decoder.flush())
        if stops.held:
            yield stops.held


class StopTexts:
    """Passes text on, but holds back what may be the beginning of a stop text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = [stop for stop in stops if stop]
        self.held = ""
        self.reached = False

    def feed(self, text: str) -> Iterator[str]:
        """What of the text so far can be shown now."""
        self.held += text
        ends = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if ends:
            self.reached = True
            show = min(ends)
        else:
            show = len(self.held) - max((_overlap(self.held, stop) for stop in self.stops), default=0)
        if show:
            yield self.held[:show]
        self.held = "" if self.reached else self.held[show:]


def generate(
    model: Rwkv,
    tokenizer: Tokenizer,
    prompt: str,
    max_tokens: int = 100,
    temperature: float = 1.0,
    top_p: float = 0.5,
    stop: Sequence[str] = (),
    seed: int | None = None,
    state: ModelState | None = None,
) -> Iterator[str]:
    """Continue `prompt`, piece by piece; each piece is whole characters.

    Arguments:
        temperature: 0 takes the likeliest token. top_p: share of the probability that is considered, above 0 to 1.
        stop: texts that end the continuation and are left out; the end token always ends it.
        state: where to begin; the model's own learned state, or zeros, if None. It is not changed.

    Raises ConfigError if a number is out of range.
    """
    sampling = SamplingConfig(max_tokens, temperature, top_p, tuple(stop), seed)
    sampling.check()
    session = Session(model, tokenizer, state)
    session.read(tokenizer.encode(prompt) or [tokenizer.end_token])
    return session.write(sampling)


@torch.no_grad()
def answer_all(model: Rwkv, tokenizer: Tokenizer, prompts: Sequence[str], max_tokens: int) -> list[str]:
    """The likeliest continuation of each prompt up to the end token; all prompts at once, read as one packed row."""
    encoded = [tokenizer.encode(prompt) or [tokenizer.end_token] for prompt in prompts]
    device = model.like.device
    bounds = torch.tensor([0, *(len(ids) for ids in encoded)]).cumsum(0)
    row = torch.tensor([[token for ids in encoded for token in ids]], device=device)
    hidden, state = model.hidden(row, cu_seqlens=bounds)
    last = hidden[:, (bounds[1:] - 1).to(device)].transpose(0, 1)  # (B,1,D)
    written: list[Tensor] = []
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for _ in range(max_tokens):
        token = model.head(last).argmax(-1).masked_fill(done[:, None], tokenizer.end_token)
        written.append(token)
        done |= token[:, 0] == tokenizer.end_token
        if bool(done.all()):
            break
        last, state = model.hidden(token, state)
    return [_shown(tokenizer.decoder(), ids) for ids in torch.cat(written, dim=1).tolist()]


def sample(logits: Tensor, temperature: float, top_p: float, random: torch.Generator) -> int:
    """A token drawn from logits (V,): the likeliest ones that together have the probability `top_p`.

    Raises RwkvPeftError if one is NaN or Inf.
    """
    if not bool(torch.isfinite(logits).all()):
        raise RwkvPeftError("the model's logits are NaN or Inf; try --dtype fp32, or without the adapter or state")
    if temperature == 0:
        return int(logits.argmax())
    probabilities, tokens = torch.softmax(logits.cpu() / temperature, dim=-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities.masked_fill(before >= top_p, 0.0)
    return int(tokens[torch.multinomial(kept, 1, generator=random)])


def open_session(config: InferenceConfig) -> Session:
    """The model, adapter and tokenizer that `config` names. Raises the errors of loading them."""
    config.sampling.check()
    adapters = read_adapters(config.adapter, config.alpha, config.pissa_init)
    is_tuned = any(EMBEDDING in saved.parts for saved in adapters)
    embedding = "cpu" if find_device(config.device).type == "cuda" and not is_tuned else "gpu"
    model = load_model(config.model, config.dtype, config.device, config.op, config.quant, config.quant_head, embedding)
    for path, saved in zip(config.adapter, adapters, strict=True):
        attach_saved(model, saved, path)
    vocab_size, special_tokens = model.sizes.vocab_size, config.special_tokens or model.form.special_tokens
    tokenizer = tokenizer_for(config.tokenizer, vocab_size).with_special(special_tokens, vocab_size)
    session = Session(model, tokenizer)
    stop_token = model.form.stop_token if config.stop_token is None else config.stop_token
    if stop_token is not None:
        session.stop_token = tokenizer.stop_id(stop_token)
    if config.state is not None:
        state = load_state(config.state)
        check_state(model, state, config.state)
        session.state = session.start = state.to(model.like.device)
    return session


def run_generate(config: GenerateConfig) -> None:
    """Print the prompt's continuation as it comes."""
    session = open_session(config)
    session.read(session.tokenizer.encode(config.prompt) or [session.tokenizer.end_token])
    for piece in session.write(config.sampling):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _shown(decoder: StreamDecoder, ids: Sequence[int]) -> str:
    """The text of ids that a model wrote; those that the vocabulary leaves unused are no reason to stop."""
    return "".join(decoder.feed(token) for token in ids) + decoder.flush()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest beginning of `stop` that `text` ends in."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
