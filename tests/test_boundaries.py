"""Who may import whom inside the package, read from the source: a new room must first be written down here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import rwkv_peft

PACKAGE = Path(rwkv_peft.__file__).parent

FOR_ALL = {"config", "errors", "files", "packages", "__version__"}  # and a room may always import itself
READERS = {"checkpoint", "models", "ops", "packed", "adapters", "data", "loading"}
MAY_IMPORT = {
    "config": set(),
    "errors": set(),
    "files": set(),
    "packages": set(),
    "yaml_config": set(),
    "ops": set(),
    "models": {"ops"},
    "mapped": set(),
    "streamed": {"mapped"},
    "checkpoint": {"mapped", "streamed"},
    "packed": {"checkpoint", "ops"},
    "data": set(),
    "adapters": {"checkpoint", "packed", "models", "ops"},
    "loading": {"checkpoint", "models", "ops", "packed", "adapters"},
    "training": READERS | {"plan", "yaml_config"},
    "inference": READERS | {"export"},
    "chat_repl": READERS | {"inference"},
    "export": READERS,
    "inspection": READERS | {"export"},
    "preparation": {"data"},
    "plan": READERS,
    "demo": {"training", "inference", "export", "data", "loading", "models", "yaml_config"},
    "web": {"training", "inference", "export", "plan"},
    "legacy": {"yaml_config", "packed", "loading"},
    "doctor": {"ops", "loading"},
    "commands": {
        "training",
        "demo",
        "inference",
        "chat_repl",
        "inspection",
        "preparation",
        "export",
        "doctor",
        "plan",
        "web",
    },
    "cli": {"yaml_config", "legacy", "commands"},
    "__init__": READERS | {"training", "inference", "export"},
    "__main__": {"cli"},
}
# What a lazy room imports outside its functions; everything else inside
AT_ONCE = {
    "cli": {"commands", "config", "errors", "yaml_config", "__version__"},
    "commands": {"config"},
    "legacy": {"config", "errors", "yaml_config", "legacy"},
}
READS_ENVIRONMENT = {"training/engine.py", "ops/cuda/build.py"}

FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    """The top-level module or folder of the package that a file belongs to."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def rooms_named(node: ast.AST, path: Path) -> Iterator[str]:
    """The rooms, or other names of the package, that an import statement names; nothing for other packages."""
    if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        here = ["rwkv_peft", *path.relative_to(PACKAGE).parent.parts]
        base = [*here[: len(here) + 1 - node.level], *filter(None, [node.module])] if node.level else [str(node.module)]
        modules = [".".join([*base, alias.name]) for alias in node.names]
    else:
        return
    for module in modules:
        top, _, rest = module.partition(".")
        if top == "rwkv_peft" and rest:
            yield rest.partition(".")[0]


def outside_functions(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from outside_functions(node)


def test_every_room_is_written_down() -> None:
    assert MAY_IMPORT.keys() >= {room_of(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_stay_within_bounds(path: Path) -> None:
    room, tree = room_of(path), ast.parse(path.read_text(encoding="utf-8"))
    named = {name for node in ast.walk(tree) for name in rooms_named(node, path)}
    assert named - {room} <= MAY_IMPORT[room] | (FOR_ALL - {room})
    if room in AT_ONCE:
        at_once = {name for node in outside_functions(tree) for name in rooms_named(node, path)}
        assert at_once <= AT_ONCE[room]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_engine_reads_the_environment(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    reads = names & {"environ", "environb", "getenv", "getenvb"}
    assert not reads or path.relative_to(PACKAGE).as_posix() in READS_ENVIRONMENT


@pytest.mark.parametrize(
    ("file", "source", "rooms"),
    [
        ("models/x.py", "from ..training.run import train", {"training"}),
        ("models/x.py", "from .. import training", {"training"}),
        ("models/x.py", "from . import layers", {"models"}),
        ("models/x.py", "import rwkv_peft.cli", {"cli"}),
        ("models/x.py", "from rwkv_peft import cli, train", {"cli", "train"}),
        ("x.py", "from .data import text\nfrom . import __version__", {"data", "__version__"}),
        ("x.py", "import torch\nfrom torch import nn", set()),
    ],
)
def test_the_walker_sees_every_form_of_import(file: str, source: str, rooms: set[str]) -> None:
    found = {name for node in ast.walk(ast.parse(source)) for name in rooms_named(node, PACKAGE / file)}
    assert found == rooms
