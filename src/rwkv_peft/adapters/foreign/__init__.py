"""Every other method of Hugging Face PEFT, through PEFT itself: `--peft peft:OFT`.

PEFT puts its own layers in the place of the model's, which become their `base_layer`. It is an optional package,
imported where it is used.
"""

from __future__ import annotations

from .attaching import attach
from .config import config_of
from .loading import load
from .merging import merge, merged_tensors, unmerge
from .saving import settings, tensors
from .side import is_merged, layers, of, parameters
from .single import extra_loss, follow

__all__ = [
    "attach", "config_of", "extra_loss", "follow", "is_merged", "layers", "load", "merge", "merged_tensors", "of",
    "parameters", "settings", "tensors", "unmerge",
]  # fmt: skip
