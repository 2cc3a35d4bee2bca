"""Settings of a training run."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

from ..errors import ConfigError
from .adapter import FOREIGN, MEANT_FOR, METHODS, AdapterConfig, check_method, check_part, method_name, read_peft_config
from .common import ADVANCED, Op, Quant, at_least, flag_of, words
from .data import MICRO_BATCH, DataConfig

LR, LR_FULL, LR_STATE = 2e-4, 2e-5, 0.1  # peak learning rates where none is given


@dataclass
class _Run:
    """What a run cannot do without; first, so that it may be given without names."""

    model: Path
    """Base model: an official `.pth` or `.safetensors` file."""
    data: list[str]
    out: Path
    """Folder of this run; must be new or empty."""


@dataclass
class TrainConfig(DataConfig, _Run):
    """Fine-tune a model on examples and write an adapter."""

    peft: str = "lora"
    """Method: lora, pissa, bone (= miss), bat, state, full, or `peft:METHOD` for most others of Hugging Face PEFT."""
    rank: int = 32
    """Inner dimension of each adapter; bone and bat: width of a block."""
    alpha: float | None = None
    """Scale: the adapter's product is multiplied by alpha/rank. [2 * rank; pissa: rank]"""
    dropout: Annotated[float, ADVANCED] = 0.0
    """Probability of zeroing an input of the adapter while training, from 0 to below 1."""
    targets: Annotated[tuple[str, ...], ADVANCED] = ()
    """Matrices to adapt, by the end of their name, e.g. `att.key` or `key`. [all matrices of att and ffn]"""
    rank_stabilised: Annotated[bool, ADVANCED] = False
    """LoRA: scale by alpha/sqrt(rank) instead of alpha/rank, so that high ranks learn as fast."""
    dora: Annotated[bool, ADVANCED] = False
    """LoRA: train the length of each row of the matrix apart from its direction (DoRA)."""
    svd_iterations: Annotated[int, ADVANCED] = 4
    """PiSSA: rounds of the randomised SVD; 0 takes the exact one, which is slower."""
    peft_config: Annotated[str, ADVANCED] = ""
    """For `peft:METHOD`: the settings of PEFT's own config class, as JSON or the path of a JSON file."""
    train_parts: tuple[str, ...] = ("auto",)
    """Parts trained in full beside the adapter: time ln emb head, state and shift (the learned initial state and token
    shifts), or none. [time ln; none with --peft state]"""
    adapter: Path | None = None
    """Go on training this adapter: a folder, or a `.pth` of the original program. Its method and sizes hold."""
    pissa_init: Annotated[Path | None, ADVANCED] = None
    """For an original PiSSA `.pth`: its file of initial values. [init_pissa.pth beside it]"""
    eval_data: Annotated[tuple[str, ...], ADVANCED] = ()
    """Examples to measure the loss on while training, read as --data is."""
    eval_fraction: float = 0.0
    """Share of the examples that is kept out of training to measure the loss on, from 0 to below 1."""
    eval_every: Annotated[int | None, ADVANCED] = None
    """Steps between two such measurements; the last step has one too. [a tenth of the run]"""
    patience: Annotated[int | None, ADVANCED] = None
    """Stop after so many measurements without a new best one. [never]"""
    micro_batch: int | None = None
    """Rows computed at once. [4; with --sampling pad 8, with only 1]"""
    grad_accum: int = 1
    """Micro-batches added up before a step."""
    epochs: float = 1.0
    """Passes over the data; --max-steps takes their place."""
    max_steps: int | None = None
    """Optimiser steps, however many epochs they take. [as --epochs says]"""
    lr: float | None = None
    """Peak learning rate. [2e-4; full: 2e-5; of states: --lr-state]"""
    lr_final: Annotated[float | None, ADVANCED] = None
    """Learning rate at the last step. [a tenth of --lr]"""
    lr_state: Annotated[float | None, ADVANCED] = None
    """Peak learning rate of a learned initial state, which wants a high one. [0.1; with --peft state, --lr if given]"""
    layerwise_lr: Annotated[bool | None, ADVANCED] = None
    """Twice the rate for the decays (RWKV-7 `w0`, RWKV-5/6 `time_decay`), as the original does. [with full only]"""
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """Learning rate after the warm-up; wsd stays at the peak, and falls at the end."""
    warmup_steps: Annotated[int, ADVANCED] = 10
    """Steps over which the learning rate rises from 0."""
    wsd_decay: Annotated[float, ADVANCED] = 0.2
    """Share of the steps over which wsd falls, from 0 to 1."""
    optim: Literal["adamw", "adamw8bit", "paged-adamw", "paged-adamw8bit", "adafactor", "muon"] = "adamw"
    """Optimiser; 8bit keeps its averages in 8 bits, paged keeps them in the CPU's memory."""
    master_weights: Annotated[Literal["fp32", "bf16"], ADVANCED] = "fp32"
    """Number format in which what trains is kept; bf16 is rounded stochastically, and takes half, gradients too."""
    weight_decay: Annotated[float, ADVANCED] = 0.0
    """Decay of the weights at each step, on matrices only."""
    weight_decay_final: Annotated[float | None, ADVANCED] = None
    """Weight decay at the last step, reached along a cosine. [--weight-decay throughout]"""
    betas: Annotated[tuple[float, float], ADVANCED] = (0.9, 0.99)
    """AdamW's averaging factors; adafactor, and muon for matrices, have their own."""
    adam_eps: Annotated[float, ADVANCED] = 1e-8
    """AdamW's epsilon, likewise."""
    clip: Annotated[float, ADVANCED] = 1.0
    """Largest norm of the gradient; 0 switches clipping off."""
    logit_penalty: Annotated[float, ADVANCED] = 1e-4
    """Strength of RWKV's pull of the largest logit to 0; 0 switches it off."""
    precision: Annotated[Literal["auto", "fp32", "bf16"], ADVANCED] = "auto"
    """Arithmetic of the matrices. [bf16 on a GPU, fp32 on a CPU]"""
    quant: Quant = "none"
    """Keep the frozen matrices in 8 or 4 bits: fp8 is the fastest on cards that have it, nf4 the smallest."""
    quant_head: Annotated[bool, ADVANCED] = False
    """The head too."""
    embedding: Annotated[Literal["auto", "cpu", "gpu"], ADVANCED] = "auto"
    """Memory that holds the embedding. [the CPU's where it does not train]"""
    grad_checkpoint: Literal["auto", "none", "operator", "selective", "block"] = "auto"
    """Recompute in the backward pass: nothing, the recurrence, the time-mix around it, or whole layers: slower, less
    memory. [as much as the GPU's memory asks for; none on a CPU]"""
    offload_checkpoints: Annotated[bool, ADVANCED] = False
    """Keep the inputs of what is recomputed in the CPU's memory; copies run beside the layers."""
    device: str = "auto"
    """`cpu`, `cuda` or `cuda:N`. [a GPU if there is one]"""
    graphs: Annotated[bool, ADVANCED] = True
    """On a GPU, launch a micro-batch as one CUDA graph where it can be one: by our kernels, and without dropout."""
    op: Annotated[Op, ADVANCED] = "auto"
    """Operator of the recurrence. [the best that runs here]"""
    seed: int = 0
    """Seed of the order of examples, of new weights and of dropout."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.model, self.out = Path(self.model), Path(self.out)
        self.eval_data = tuple(os.fspath(path) for path in words(self.eval_data))
        self.peft = method_name(self.peft)
        self.targets, self.train_parts = words(self.targets), words(self.train_parts)

    def resolved(self) -> TrainConfig:
        """A copy in which every setting that depends on others has its value. Call `check` first."""
        is_state, is_full = self.peft == "state", self.peft == "full"
        lr_state = self.lr_state or (self.lr if is_state and self.lr else LR_STATE)
        states_only = is_state and not {"time", "ln", "emb", "head"} & set(self.parts())
        lr = self.lr or (lr_state if states_only else LR_FULL if is_full else LR)
        return replace(
            self,
            train_parts=self.parts() or ("none",),
            micro_batch=self.micro_batch or MICRO_BATCH[self.sampling],
            lr=lr,
            lr_final=lr / 10 if self.lr_final is None else self.lr_final,
            lr_state=lr_state,
            layerwise_lr=is_full if self.layerwise_lr is None else self.layerwise_lr,
            weight_decay_final=self.weight_decay if self.weight_decay_final is None else self.weight_decay_final,
        )

    def check(self) -> None:
        """Raise `ConfigError` where a value is out of range or two settings contradict each other."""
        check_method(self.peft, allowed=METHODS)
        if self.peft != "full":
            self.adapter_config().check()
        self.check_adapter()
        self.parts()
        self.check_base()
        self.check_data()
        self.check_evaluation()
        self.check_master_weights()
        for name, remedy in (
            ("micro_batch", "try 1"), ("grad_accum", "try 1"), ("eval_every", "leave it out for ten in a run"),
            ("patience", "leave it out to train to the end"), ("max_steps", "leave it out to follow --epochs"),
        ):  # fmt: skip
            if getattr(self, name) is not None:
                at_least(flag_of(name), getattr(self, name), 1, remedy)
        if self.sampling == "only" and self.micro_batch not in (None, 1):
            raise ConfigError(f"--micro-batch {self.micro_batch}: must be 1 with --sampling only; leave it out")
        for flag, number in (("--epochs", self.epochs), ("--lr", self.lr), ("--lr-state", self.lr_state)):
            if number is not None and not number > 0:
                raise ConfigError(f"{flag} {number}: must be above 0; try {'1' if flag == '--epochs' else '2e-4'}")
        for flag, number in (
            ("--warmup-steps", self.warmup_steps), ("--weight-decay", self.weight_decay), ("--clip", self.clip),
            ("--logit-penalty", self.logit_penalty), ("--seed", self.seed), ("--lr-final", self.lr_final),
            ("--weight-decay-final", self.weight_decay_final),
        ):  # fmt: skip
            if number is not None and not 0 <= number < 2**63:
                raise ConfigError(f"{flag} {number}: must be at least 0{' and below 2**63' if number > 0 else ''}")
        if not 0 <= self.wsd_decay <= 1:
            raise ConfigError(f"--wsd-decay {self.wsd_decay}: must be from 0 to 1; try 0.2")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"--betas {self.betas[0]} {self.betas[1]}: both must be from 0 to below 1; try 0.9 0.99")
        if self.adam_eps <= 0:
            raise ConfigError(f"--adam-eps {self.adam_eps}: must be above 0; try 1e-8")

    def check_base(self) -> None:
        """Raise `ConfigError` where how the base is kept contradicts what trains."""
        if self.quant != "none" and self.peft == "full":
            raise ConfigError(f"--quant {self.quant}: not with --peft full, which trains the matrices; leave it out")
        if self.quant != "none" and self.peft.startswith(FOREIGN):
            raise ConfigError(f"--quant {self.quant}: not with PEFT's own methods, which need dense matrices; try lora")
        if self.quant_head and self.quant == "none":
            raise ConfigError("--quant-head: only with --quant; add one, or leave it out")
        if self.quant_head and "head" in self.parts():
            raise ConfigError("--quant-head: not with --train-parts head, which trains it; leave one out")
        if self.embedding == "cpu" and (self.peft == "full" or "emb" in self.parts()):
            raise ConfigError("--embedding cpu: the embedding trains; leave it out")
        if self.offload_checkpoints and self.grad_checkpoint in ("none", "operator"):
            raise ConfigError(
                f"--offload-checkpoints: not with --grad-checkpoint {self.grad_checkpoint}, which keeps no layer's "
                "input to compute it anew; try --grad-checkpoint block"
            )

    def check_master_weights(self) -> None:
        """Raise `ConfigError` where what trains is to be kept in bf16, and cannot be."""
        if self.master_weights == "fp32":
            return
        if not self.optim.endswith(("adamw", "adamw8bit")):
            others = "only with adamw, adamw8bit, paged-adamw and paged-adamw8bit"
            raise ConfigError(f"--master-weights bf16: not with --optim {self.optim}, {others}; leave one out")
        if self.precision == "fp32":
            raise ConfigError("--master-weights bf16: not with --precision fp32; use --precision bf16, or leave it out")
        if self.peft.startswith(FOREIGN):
            raise ConfigError(f"--master-weights bf16: not with --peft {self.peft}, which has its own; leave it out")

    def check_evaluation(self) -> None:
        """Raise `ConfigError` where what is said of measuring the loss contradicts itself."""
        if any(not source.strip() for source in self.eval_data):
            raise ConfigError("--eval-data: one name is empty; is a variable of the shell not set?")
        if not 0 <= self.eval_fraction < 1:
            raise ConfigError(f"--eval-fraction {self.eval_fraction}: must be from 0 to below 1; try 0.05")
        if self.eval_fraction and self.eval_data:
            raise ConfigError("--eval-fraction: not with --eval-data, which has the examples; leave one out")
        for name in ("eval_every", "patience"):
            if getattr(self, name) is not None and not self.evaluates:
                raise ConfigError(
                    f"{flag_of(name)}: only with --eval-fraction or --eval-data; add one, or leave it out"
                )

    @property
    def evaluates(self) -> bool:
        """Whether the loss is measured on examples that are not trained on."""
        return self.eval_fraction > 0 or bool(self.eval_data)

    def check_adapter(self) -> None:
        """Raise `ConfigError` where a setting contradicts that there is an adapter to go on with, or none."""
        if self.adapter is None:
            if self.pissa_init is not None:
                raise ConfigError(f"--pissa-init {self.pissa_init}: only with --adapter; leave it out")
            return
        if self.peft == "full":
            raise ConfigError("--adapter: not with --peft full, which trains every weight; merge the adapter first")
        if self.peft_config:
            raise ConfigError("--peft-config: not with --adapter, which has its own; leave it out")

    def without_effect(self) -> list[str]:
        """A line for each reason why settings that were given mean nothing. Call it before `resolved`."""
        given = {f.name for f in fields(self) if getattr(self, f.name) != f.default}
        of_others = {name for name, methods in MEANT_FOR.items() if self.peft not in methods}
        if self.peft.startswith(FOREIGN):
            of_others -= {"targets", "peft_config"}
        has_state = self.peft == "state" or self.adapter is not None or bool({"state", "shift"} & set(self.parts()))
        has_matrix = self.peft != "state" or bool({"emb", "head"} & set(self.parts()))
        is_usual = self.lr_final in (self.lr, None if self.lr is None else self.lr / 10)  # as `resolved` makes it
        rules: list[tuple[bool, set[str], str]] = [
            (True, of_others, f"with --peft {self.peft}"),
            (self.adapter is not None, {"svd_iterations"}, "with --adapter"),
            (self.max_steps is not None, {"epochs"}, "with --max-steps"),
            (self.schedule != "wsd", {"wsd_decay"}, f"with --schedule {self.schedule}"),
            (self.schedule == "constant" and not is_usual, {"lr_final"}, "with --schedule constant"),
            (self.optim == "adafactor", {"betas", "adam_eps"}, "with --optim adafactor"),
            (not has_matrix, {"master_weights"}, "where no matrix trains"),
            (not has_state and self.lr_state != LR_STATE, {"lr_state"}, "where no state trains"),
            (self.sampling != "get", {"windows"}, f"with --sampling {self.sampling}"),
            (self.sampling != "pad", {"pad_side"}, f"with --sampling {self.sampling}"),
            (self.sampling == "get", {"overlong"}, "with --sampling get"),
        ]
        idle = [(sorted(map(flag_of, names & given)), why) for applies, names, why in rules if applies]
        parts = [part for part in self.train_parts if part in ("time", "ln", "emb", "head")]
        if self.peft == "full" and parts:
            idle.append((["--train-parts", *parts], "with --peft full"))
        return [f"{' '.join(flags)}: no effect {why}" for flags, why in idle if flags]

    def parts(self) -> tuple[str, ...]:
        """The trainable parts asked for, with the default and `none` resolved. Raises `ConfigError` on an unknown."""
        parts = self.train_parts if self.train_parts != ("none",) else ()
        if parts == ("auto",):
            parts = ("time", "ln") if self.peft not in ("state", "full") and self.adapter is None else ()
        for part in parts:
            check_part(part)
        return parts

    def adapter_config(self) -> AdapterConfig:
        """The adapter's settings as `attach_adapter` takes them."""
        return AdapterConfig(
            self.peft, self.rank, self.alpha, self.dropout, tuple(self.targets), self.rank_stabilised, self.dora,
            self.svd_iterations, read_peft_config(self.peft_config),
        )  # fmt: skip
