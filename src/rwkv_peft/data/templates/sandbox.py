"""The sandbox in which Jinja files run: what they may use, and how much of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from ...packages import optional

MOST_STEPS = 1_000_000  # rounds of loops and calls of macros in one rendering, and numbers of its ranges
STEP, ROUNDS = "__step__", "__rounds__"  # what a template calls so that these are counted


def environment_with(start: str, end: str) -> Any:
    """Jinja as Hugging Face sets it up, without access to anything but what it is given.

    `start` and `end` are written where generation tags stand. Undefined variables are errors; but a field that a
    message lacks is false in a condition, as in the templates that test `message.tool_calls`.
    """
    jinja2 = optional("jinja2", "--template")
    sandbox, ext = optional("jinja2.sandbox", "--template"), optional("jinja2.ext", "--template")

    class Generation(ext.Extension):  # type: ignore[misc, name-defined]
        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> list[Any]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            before, after = (
                jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)], lineno=line) for mark in (start, end)
            )
            return [before, *body, after]

    class Undefined(jinja2.StrictUndefined):  # type: ignore[misc, name-defined]
        def __bool__(self) -> bool:
            lacks = isinstance(self._undefined_obj, dict) and self._undefined_exception is jinja2.UndefinedError
            return False if lacks else super().__bool__()

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, undefined=Undefined, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    del environment.globals["lipsum"]  # makes as much text as it is asked for, and another each time
    return environment


class Budget:
    """What one rendering may do, so that none goes on forever: steps in loops and macros, and numbers of `range`."""

    def __init__(self) -> None:
        self.steps = self.numbers = MOST_STEPS

    def functions(self) -> dict[str, Any]:
        """What a template must be given under these names, once for each rendering."""
        return {"range": self.range, STEP: self.step, ROUNDS: self.rounds}

    def step(self) -> None:
        """A call of a macro, or a round of a loop that calls itself. Raises Jinja's TemplateError if it is too much."""
        self._spend(1)

    def rounds(self, items: Any) -> Any:
        """`items` for a loop, of which each is a step."""
        if not hasattr(items, "__len__"):
            return self._counted(items)
        self._spend(len(items))
        return items

    def range(self, *bounds: int) -> range:
        """Python's `range`, with as many numbers as are left."""
        numbers = range(*bounds)
        self.numbers -= len(numbers)
        if self.numbers < 0:
            _raise_exception(f"its ranges hold more than {MOST_STEPS:,} numbers")
        return numbers

    def _counted(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._spend(1)
            yield item

    def _spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            _raise_exception(f"goes on for more than {MOST_STEPS:,} steps of its loops and macros")


def count_steps(tree: Any) -> None:
    """Let the loops and macros in a parsed template spend steps of the `Budget` that it is given."""
    nodes = optional("jinja2", "--template").nodes

    def call(name: str, *arguments: Any, lineno: int) -> Any:
        return nodes.Call(nodes.Name(name, "load"), list(arguments), [], None, None).set_lineno(lineno, override=False)

    for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
        if isinstance(node, nodes.For):
            node.iter = call(ROUNDS, node.iter, lineno=node.lineno)
        if not isinstance(node, nodes.For) or node.recursive:
            node.body.insert(0, nodes.ExprStmt(call(STEP, lineno=node.lineno), lineno=node.lineno))
    tree.set_environment(tree.environment)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as it is: Jinja's own filter writes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(text: str) -> None:
    raise optional("jinja2", "--template").TemplateError(text)
