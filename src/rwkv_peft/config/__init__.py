"""Every setting of every command, as dataclasses. Standard library only.

A field's docstring is its help text on the command line and names its unit. Checks that need nothing but the settings
themselves are here, in `check`; those that need a file or a device are where the file or the device is opened.
"""

from __future__ import annotations

from .adapter import ALIASES, FOREIGN, MEANT_FOR, METHODS, TRAIN_PARTS, AdapterConfig, check_method, check_part
from .common import ADVANCED, ESCAPES, Dtype, OnBadLine, Op, Overlong, TokenizerName, at_least, flag_of, words
from .data import (
    MICRO_BATCH,
    ChatForm,
    DataConfig,
    InspectConfig,
    Mask,
    PrepareConfig,
    ReadConfig,
    Sampling,
    Windows,
    shares_of,
)
from .plan import PlanConfig
from .train import LR, LR_STATE, TrainConfig
from .use import (
    ChatConfig,
    DemoConfig,
    DoctorConfig,
    ExportConfig,
    GenerateConfig,
    InferenceConfig,
    MergeConfig,
    SamplingConfig,
)

__all__ = [
    "ADVANCED", "ALIASES", "ESCAPES", "FOREIGN", "LR", "LR_STATE", "MEANT_FOR", "METHODS", "MICRO_BATCH", "TRAIN_PARTS",
    "AdapterConfig", "ChatConfig", "ChatForm", "DataConfig", "DemoConfig", "DoctorConfig", "Dtype", "ExportConfig",
    "GenerateConfig", "InferenceConfig", "InspectConfig", "Mask", "MergeConfig", "OnBadLine", "Op", "Overlong",
    "PlanConfig", "PrepareConfig", "ReadConfig", "Sampling", "SamplingConfig", "TokenizerName", "TrainConfig",
    "Windows", "at_least", "check_method", "check_part", "flag_of", "shares_of", "words",
]  # fmt: skip
