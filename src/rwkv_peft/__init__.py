"""Fine-tune RWKV language models. The names below are the public interface; each is loaded when it is first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "AdapterConfig": "config",
    "TrainConfig": "config",
    "RwkvPeftError": "errors",
    "ModelState": "models.state",
    "Tokenizer": "data.tokenizer",
    "attach_adapter": "adapters",
    "generate": "inference",
    "load_adapter": "adapters",
    "load_model": "loading",
    "load_state": "export.states",
    "merge": "export.merge",
    "save_adapter": "adapters",
    "save_state": "export.states",
    "train": "training.run",
}
__all__ = [*_HOMES, "__version__"]  # noqa: PLE0604

if TYPE_CHECKING:
    from .adapters import attach_adapter as attach_adapter
    from .adapters import load_adapter as load_adapter
    from .adapters import save_adapter as save_adapter
    from .config import AdapterConfig as AdapterConfig
    from .config import TrainConfig as TrainConfig
    from .data.tokenizer import Tokenizer as Tokenizer
    from .errors import RwkvPeftError as RwkvPeftError
    from .export.merge import merge as merge
    from .export.states import load_state as load_state
    from .export.states import save_state as save_state
    from .inference import generate as generate
    from .loading import load_model as load_model
    from .models.state import ModelState as ModelState
    from .training.run import train as train


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
