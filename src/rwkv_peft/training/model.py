"""The model of a run: the adapter to go on with, the base, and what trains in it."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..adapters import SavedAdapter, attach_adapter, attach_saved, draws_random_numbers, read_adapter
from ..adapters.attach import adapted, check_apart
from ..adapters.trainable import add_parts, make_trainable, part_names
from ..config import LR, LR_STATE, ChatForm, TrainConfig
from ..loading import EMBEDDING, find_device, load_model
from ..models import STATES, Rwkv
from .checkpointing import choose_checkpoint, free_memory
from .offload import Offload
from .optim import keep_in_bf16


def saved_adapter(config: TrainConfig) -> SavedAdapter | None:
    """The adapter to go on with; a folder holds its own alpha. Raises CheckpointError."""
    if config.adapter is None:
        return None
    return read_adapter(config.adapter, config.alpha if config.adapter.is_file() else None, config.pissa_init)


def going_on(config: TrainConfig, saved: SavedAdapter | None) -> TrainConfig:
    """With the method of the adapter to go on with, its form of conversations, and the rates that suit it."""
    if saved is None:
        return config
    form = saved.form
    if ChatForm(config.template, "", config.stop_token, config.special_tokens) == ChatForm():
        config = replace(config, template=form.template, stop_token=form.stop_token, special_tokens=form.special_tokens)
    if config.peft == TrainConfig.peft:
        config = replace(config, peft=saved.config.peft if saved.config else "state")
    if config.lr is None and not all(name.endswith(STATES) for name in (*saved.tensors, *saved.parts)):
        config = replace(config, lr=LR, lr_state=config.lr_state or LR_STATE)
    return config


def load_base(config: TrainConfig, saved: SavedAdapter | None) -> Rwkv:
    """The model to train, kept as `config` says. Raises ConfigError and CheckpointError."""
    trains = config.peft == "full" or "emb" in config.parts() or (saved is not None and EMBEDDING in saved.parts)
    on_gpu = find_device(config.device).type == "cuda"
    embedding = config.embedding
    if embedding == "auto":
        embedding = "cpu" if on_gpu and not trains else "gpu"
    how = (config.precision, config.device, config.op, config.quant, config.quant_head, embedding)
    return load_model(config.model, *how)


def prepare(model: Rwkv, config: TrainConfig, saved: SavedAdapter | None = None) -> None:
    """Attach a new adapter, or the `saved` one to go on with, and let what is to train, train."""
    torch.manual_seed(config.seed)
    parts = config.parts()
    if config.peft == "full":
        add_parts(model, parts)
        make_trainable(model, [name for name, _ in model.named_parameters()])
    elif saved is None or config.adapter is None:
        attach_adapter(model, config.adapter_config(), parts)
    else:
        attach_saved(model, saved, config.adapter)
        assert model.adapter_config is not None
        model.adapter_config.dropout = config.dropout or model.adapter_config.dropout
        add_parts(model, parts)
        names = [name for part in parts for name in part_names(model, part)]
        check_apart({f"{name}.weight" for name, _ in adapted(model)}, names)
        make_trainable(model, names)
    if config.master_weights == "bf16":
        keep_in_bf16(model)
    model.draws = draws_random_numbers(model)
    if model.like.is_cuda:
        torch.cuda.empty_cache()  # of what was there on the way to here
    model.grad_checkpoint = checkpoint_of(model, config)
    if config.offload_checkpoints:
        assert config.micro_batch is not None
        numbers = config.micro_batch * config.ctx_len * model.sizes.width
        model.keep = Offload(model.like.device, numbers * model.like.element_size())
    model.train()


def checkpoint_of(model: Rwkv, config: TrainConfig) -> str | tuple[str, ...]:
    """What the layers compute anew; `auto` is decided for each of them."""
    if config.grad_checkpoint != "auto":
        return config.grad_checkpoint
    if model.like.device.type != "cuda":
        return "none"
    assert config.micro_batch is not None
    return choose_checkpoint(model, config.micro_batch * config.ctx_len, free_memory(model.like.device), config)
