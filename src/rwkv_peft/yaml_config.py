"""Settings from and to plain values: YAML files, and the texts of flags, which pass the same checks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import ConfigError

T = TypeVar("T")

MUST_BE = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text; put it in quotes",
    Path: "a path",
}


@dataclass(frozen=True)
class Setting:
    """A field of a settings class, or of a class nested in it: all stand side by side."""

    name: str
    hint: Any
    """Its type, without `Annotated`."""
    marks: tuple[str, ...]
    """What `Annotated` says beside the type."""
    default: Any
    """`dataclasses.MISSING` if it must be given."""


def settings_of(kind: type[Any]) -> dict[str, Setting]:
    """Every setting of a dataclass by its name."""
    hints = get_type_hints(kind, include_extras=True)
    found: dict[str, Setting] = {}
    for field in fields(kind):
        hint = hints[field.name]
        if is_dataclass(hint):
            found |= settings_of(hint)  # type: ignore[arg-type]
        else:
            hint, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
            default = field.default if field.default_factory is MISSING else field.default_factory()
            found[field.name] = Setting(field.name, hint, tuple(marks), default)
    return found


def build(kind: type[T], values: Mapping[str, object]) -> T:
    """A `kind` with these converted values; what is not among them has its default."""
    hints = get_type_hints(kind)
    given: dict[str, object] = {}
    for field in fields(kind):  # type: ignore[arg-type]
        if is_dataclass(hints[field.name]):
            given[field.name] = build(hints[field.name], values)
        elif field.name in values:
            given[field.name] = values[field.name]
    return kind(**given)


def convert(value: object, hint: Any, where: str) -> Any:
    """A value of a YAML file, or the text of a flag, as the type `hint`.

    Raises ConfigError, which begins with `where`, if it is none.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):  # only `X | None` is used
        return None if value in (None, "none", ["none"]) else convert(value, inner[0], where)
    if origin in (list, tuple):
        items = value if isinstance(value, list) else [value]
        many = origin is list or inner[-1] is Ellipsis
        if not many and len(items) != len(inner):
            raise ConfigError(f"{where} {_shown(value)}: must be {len(inner)} values")
        kinds = [inner[0]] * len(items) if many else inner
        return origin(convert(item, kind, where) for item, kind in zip(items, kinds, strict=True))
    if origin is Literal:
        if value not in inner:
            raise ConfigError(f"{where} {_shown(value)}: allowed are {', '.join(inner)}")
        return value
    converted = _scalar(value, hint)
    if converted is None:
        raise ConfigError(f"{where} {_shown(value)}: must be {MUST_BE[hint]}")
    return converted


def read_yaml(path: Path, kind: type[Any]) -> dict[str, object]:
    """The settings in a YAML file, converted to the types that `kind` has for them.

    Raises ConfigError if the file cannot be read, or holds anything else.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give --config a YAML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8; save the file as UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise ConfigError(f"{path}{line}: broken YAML ({problem}); write one `name: value` a line") from error
    return _read_mapping({} if content is None else content, kind, str(path))


def to_yaml(config: Any) -> str:
    """A settings object as YAML that `read_yaml` reads back."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Lists on one line."""

    Dumper.add_representer(
        list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
    )
    return yaml.dump(_plain(asdict(config)), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def suggestion(name: str, names: Iterable[str], before: str = "") -> str:
    """`; did you mean …?` if one of `names` is close, else nothing; with `before` before the name."""
    near = get_close_matches(name, list(names), n=1)
    return f"; did you mean {before}{near[0]}?" if near else ""


def _read_mapping(content: object, kind: type[Any], where: str) -> dict[str, object]:
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: holds {_shown(content)}; write one `name: value` a line")
    known = settings_of(kind)
    nested = {name: hint for name, hint in get_type_hints(kind).items() if is_dataclass(hint)}
    values: dict[str, object] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name in nested:
            values |= _read_mapping(value, nested[name], f"{where}: {name}")  # type: ignore[arg-type]
        elif name in known:
            values[name] = convert(value, known[name].hint, f"{where}: {name}")
        else:
            raise ConfigError(f"{where}: {key} is no setting{suggestion(name, [*known, *nested])}")
    return values


def _scalar(value: object, hint: Any) -> object:
    """`value` as bool, int, float, str or Path; None if it is none."""
    if hint is bool:
        return {"true": True, "false": False}.get(str(value).lower())
    if hint in (str, Path):
        return hint(value) if isinstance(value, str) and (value or hint is str) else None
    # YAML 1.1 reads 1e-4 as text; and True is a number for Python, but not for people
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = hint(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and (hint is float or not isinstance(value, float)) else None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _shown(value: object) -> str:
    """A wrong value, as the user wrote it or nearly so, for a message of one line."""
    if isinstance(value, list):
        return " ".join(map(_shown, value)) or "[]"
    if isinstance(value, str) and value and value.isprintable():
        return value if len(value) <= 60 else f"{value[:60]}…"
    return "null" if value is None else repr(value)
