"""An adapter outside a model: what a folder or a file holds."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..config import AdapterConfig, ChatForm

PREFIX = "base_model.model."  # PEFT's, before every name in its files; what all layers share has `base_model.` alone

# entries of adapter_config.json that are of no method
GENERAL = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision", "task_type",
}  # fmt: skip


def file_name(name: str) -> str:
    """The name in PEFT's files of an adapter's tensor."""
    return name if name.startswith("base_model.") else PREFIX + name


@dataclass(frozen=True)
class Base:
    """How a model keeps its matrices."""

    quant: str = "none"
    """As `--quant`."""
    quant_head: bool = False
    precision: str = "fp32"
    """Of what it computes with: fp32, bf16 or fp16."""


@dataclass
class SavedAdapter:
    """An adapter with what was trained beside it, under official names."""

    config: AdapterConfig | None
    """Its targets are the full names of the matrices; None if only parts were trained."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """E.g. `blocks.0.att.key.lora_A.weight`."""
    parts: dict[str, Tensor] = field(default_factory=dict)
    """E.g. `blocks.0.ln1.weight`, or `blocks.0.att.time_state`."""
    base: str = ""
    """Fingerprint of the base; empty if it was not written by us."""
    form: ChatForm = field(default_factory=ChatForm)
    """How conversations were written where it was trained."""

    against: Base = field(default_factory=Base)
    """What it was trained against."""

    def of_matrix(self, target: str) -> dict[str, Tensor]:
        """The adapter's tensors of one matrix, by their names within it."""
        start = f"{target}."
        return {name[len(start) :]: tensor for name, tensor in self.tensors.items() if name.startswith(start)}
