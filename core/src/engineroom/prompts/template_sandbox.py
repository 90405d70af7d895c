"""Jinja's sandbox with bounds: on what a template computes, and on what it writes.

Jinja's own keeps a template from getting at anything. It does not keep it from taking for ever, or
all memory: with nested loops, ``'a' * 10**10``, ``9**9**9`` or a macro that calls itself twice.
Here loops and calls are counted, what grows is measured before it is made, and a clock is looked at
on the way: a thread cannot be interrupted from outside. Nothing is computed while a template is
compiled.
"""

from __future__ import annotations

import functools
import re
import sys
import threading
import time
from collections.abc import Callable, Sized
from string import Formatter
from typing import Any, Final, NoReturn

from jinja2 import TemplateSyntaxError, nodes, pass_context
from jinja2.environment import Template
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.visitor import NodeTransformer

from engineroom.prompts.work import check_stopped

__all__ = ["MOST_CHARACTERS", "MOST_SECONDS", "MOST_STEPS", "BoundedEnvironment"]

MOST_STEPS: Final = 5_000_000
"""Turns of loops, calls, and elements that these are applied to."""
MOST_SECONDS: Final = 2.0
"""Of the CPU, for one rendering."""
MOST_CHARACTERS: Final = 2**26
"""Characters that are written or made on the way (an element of a list counts for eight), ten times
the longest prompts."""
_MOST_SOURCE: Final = 2**18
"""Characters of a template; long ones have 30,000."""
_MOST_BITS: Final = 4096
_MOST_WIDTH: Final = 1_000_000
_WIDTH: Final = re.compile(r"\d{7}|\*")
_GROWING: Final = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs"})
"""Methods of strings whose number is a length."""
_SPLITTING: Final = frozenset({"split", "rsplit", "splitlines"})
_SLOW: Final = frozenset({"indent", "title", "wordcount"})
"""Filters that take as long for a character as a turn takes."""
_SLOWEST: Final = frozenset({"striptags", "urlize", "wordwrap"})
"""Those that may take the square of that; no prompt needs them."""
_MOST_SLOWEST: Final = 2**14
_INSTANT: Final = frozenset({"length", "count", "first", "last", "default", "d", "attr", "safe"})
_LISTS: Final = _INSTANT | {
    *("batch", "dictsort", "groupby", "items", "list", "map", "random", "reject", "rejectattr"),
    *("reverse", "select", "selectattr", "slice", "sum"),
}
"""Filters that make no text of their input."""
_QUICK: Final = 16
"""Elements that pass in the time of a turn, where C passes them."""
_SWIFT: Final = 4096
"""Characters that do."""
_ELEMENT: Final = 8
"""Characters that take as much memory as an element of a list."""
_LOOK: Final = 256
"""Steps after which the clock is looked at."""
_PREFIX: Final = "engineroom."
_VALUES: Final = frozenset({"default", "d", "int", "float"})
"""Filters whose number is a value, not a length."""


class _Spent(threading.local):
    steps = 0
    characters = 0
    next_look = 0
    deadline = 0.0


class _Format(SandboxedFormatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        _check_widths(format_spec)
        return super().format_field(value, format_spec)


class _Slices(NodeTransformer):
    """Has slices measured."""

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802 - as Jinja has it
        self.generic_visit(node)
        return _through("cut", node) if isinstance(node.arg, nodes.Slice) else node


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment of one template, which may be rendered by several threads.

    What exceeds the bounds raises ``OverflowError`` while it is rendered.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(optimized=False, finalize=_written, **options)
        self._spent = _Spent()
        del self.globals["lipsum"]
        for name, apply in list(self.filters.items()):
            self.add_filter(name, apply)
        for built_in in (self.counted, self.turn, self.joined, self.cut, self.weighed):
            self.filters[_PREFIX + built_in.__name__] = built_in

    def compiled(self, source: str) -> Template:
        """The template, ready to be rendered, with what counts built into it.

        :raises jinja2.TemplateError: it is not valid, or too long.
        """
        if len(source) > _MOST_SOURCE:
            raise OverflowError(f"it has {len(source)} characters, more than {_MOST_SOURCE}")
        tree = _Slices().visit(self.parse(source))
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = _through("counted", loop.iter)
        bodies: list[nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block] = [
            *tree.find_all(nodes.For),
            *tree.find_all(nodes.Macro),
            *tree.find_all(nodes.CallBlock),
            *tree.find_all(nodes.Block),
        ]
        for node in bodies:
            text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
            count = _through("turn", nodes.Const(text, lineno=node.lineno))
            node.body.insert(0, nodes.ExprStmt(count, lineno=node.lineno))
        for join in list(tree.find_all(nodes.Concat)):
            join.nodes = [_through("joined", nodes.List(join.nodes, lineno=join.lineno))]
        for compare in list(tree.find_all(nodes.Compare)):
            compare.expr = _through("weighed", compare.expr)
            for operand in compare.ops:
                operand.expr = _through("weighed", operand.expr)
        return self.from_string(tree)

    def add_filter(self, name: str, apply: Callable[..., Any]) -> None:
        """One more filter, or another in place of one."""
        self.filters[name] = self._bounded(name, apply)

    def handle_exception(self, source: str | None = None) -> NoReturn:
        """As it was raised: the traceback that Jinja writes instead keeps the frames of all callers
        alive, and with those of a load the weights, until Python looks for cycles.
        """
        if isinstance(sys.exception(), TemplateSyntaxError):
            super().handle_exception(source)
        raise  # noqa: PLE0704 - what Jinja is handling; a name for it would be a cycle, too

    def begin(self) -> None:
        """What this thread renders next has all of the bounds to itself."""
        spent = self._spent
        spent.steps = spent.characters = spent.next_look = 0
        spent.deadline = time.thread_time() + MOST_SECONDS

    # ── what is built into templates ─────────────────────────────────────────────────────────

    def counted(self, values: Any) -> Any:
        """What a loop goes through."""
        if isinstance(values, Sized):
            self._step(len(values))
            return values
        return self._one_by_one(values)

    def _one_by_one(self, values: Any) -> Any:
        for value in values:
            self._step()
            yield value

    def turn(self, text: int) -> str:
        """A turn of a loop, or a call, which writes at most so much text of the template's own."""
        self._step()
        self.make(text)
        return ""

    def joined(self, parts: list[Any]) -> str:
        """What ``~`` makes."""
        for part in parts:
            self.weighed(part)
        texts = [str(part) for part in parts]
        self.make(sum(map(len, texts)))
        return "".join(texts)

    def cut(self, part: Any) -> Any:
        """What a slice is, which no other bound sees."""
        if isinstance(part, Sized):
            self.make(_room(part))
            self._step(1 + _effort(part))
        return part

    def weighed(self, value: Any) -> Any:
        """What is to be compared or written, which takes as long as there is in it.

        Lists may have one another many times, and so be larger than all that was made of them.
        """
        todo = [value]
        while todo:
            item = todo.pop()
            if isinstance(item, dict):
                self._step(1 + len(item))
                todo += item.values()
            elif isinstance(item, list | tuple | set):
                self._step(1 + len(item))
                todo += item
            elif isinstance(item, str):
                self._step(len(item) // _SWIFT)
                if item is not value:
                    self.make(len(item))
            elif isinstance(item, Sized):
                self._step(1 + len(item))
        return value

    def make(self, count: int) -> None:
        """Account for characters, or elements, before they are made."""
        self._spent.characters += count
        if self._spent.characters > MOST_CHARACTERS:
            raise OverflowError(f"it makes more than {MOST_CHARACTERS} characters")

    def _step(self, count: int = 1) -> None:
        spent = self._spent
        spent.steps += count
        if spent.steps < spent.next_look:
            return
        if spent.steps > MOST_STEPS:
            raise OverflowError(f"it takes more than {MOST_STEPS} steps")
        now = time.thread_time()
        if now > spent.deadline:
            raise OverflowError(f"it takes more than {MOST_SECONDS:g} seconds of the CPU")
        check_stopped()
        spent.next_look = min(spent.steps + _LOOK, MOST_STEPS + 1)

    # ── what Jinja asks ──────────────────────────────────────────────────────────────────────

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute it, unless it would be too large."""
        if operator == "%" and isinstance(left, str):
            return self._printed(left, right)
        if isinstance(left, int) and isinstance(right, int):
            _check_integers(operator, left, right)
        elif operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, Sized) and isinstance(times, int):
                    self.make(_room(many) * max(0, times))
        elif operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
            self.make(_room(left) + _room(right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call it, unless what it makes would be too large."""
        values = (*args, *kwargs.values())
        __self._step(1 + sum(map(_effort, values)))
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            __self._step(_effort(owner))
            name = str(getattr(__obj, "__name__", ""))
            if name in _GROWING:
                _check_lengths(values)
            if name in _SPLITTING:
                __self.make(_ELEMENT * _pieces(owner, values))
            __self._may_grow((owner, *values))
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """``str.format``, with bounds."""
        if super().wrap_str_format(value) is None:
            return None
        formatter: Formatter = _Format(self)
        source: str = value.__self__
        mapped = value.__name__ == "format_map"

        @functools.wraps(value)
        def wrapper(*args: Any, **kwargs: Any) -> str:
            if mapped:
                (kwargs,), args = args, ()
            self._may_grow((source, *args, *kwargs.values()))
            text = formatter.vformat(source, args, kwargs)
            self.make(len(text))
            return text

        return wrapper

    def _printed(self, source: str, values: Any) -> str:
        _check_widths(source)
        self._may_grow((source, *(values if isinstance(values, tuple) else (values,))))
        text: str = source % values
        self.make(len(text))
        return text

    def _bounded(self, name: str, apply: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that fails where it would make too much."""
        first = 0 if getattr(apply, "jinja_pass_arg", None) is None else 1

        @functools.wraps(apply)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            values = (*args[first:], *kwargs.values())
            if name in _LISTS:
                self._step(1 + (0 if name in _INSTANT else _effort(values[0])))
                if name not in _INSTANT and isinstance(values[0], str):
                    self.make(_ELEMENT * len(values[0]))
            else:
                for value in values:
                    self.weighed(value)
                if name in _SLOW:
                    self._step(len(str(values[0])))
                if name in _SLOWEST:
                    self._slowest(name, len(str(values[0])))
            if name == "format":
                _check_widths(str(values[0]))
            elif name not in _VALUES:
                _check_lengths(values[1:])
            if name not in _LISTS:
                self._may_grow(values)
            result = apply(*args, **kwargs)
            if isinstance(result, str):
                self.make(len(result))
            return result

        return bounded

    def _slowest(self, name: str, count: int) -> None:
        if count > _MOST_SLOWEST:
            raise OverflowError(f"it gives the filter {name} more than {_MOST_SLOWEST} characters")
        self._step(_QUICK * count)

    def _may_grow(self, values: tuple[Any, ...]) -> None:
        """Where each character of one text may become another text, as in ``replace``."""
        sizes = sorted(map(_characters, values))[-2:]
        if len(sizes) == 2 and sizes[0] * sizes[1] > MOST_CHARACTERS:
            raise OverflowError(f"it may make more than {MOST_CHARACTERS} characters")


def _through(name: str, value: nodes.Node) -> nodes.Filter:
    """The value, as the environment's method of this name gives it back."""
    return nodes.Filter(value, _PREFIX + name, [], [], None, None, lineno=value.lineno)


@pass_context  # and so is not called while a template is compiled
def _written(context: Context, value: Any) -> Any:
    environment: Any = context.environment
    if not isinstance(value, str):
        value = str(environment.weighed(value))
    environment.make(len(value))
    return value


def _effort(value: Any) -> int:
    """Steps that C takes to go through a value once."""
    if isinstance(value, str):
        return len(value) // _SWIFT
    return len(value) // _QUICK if isinstance(value, Sized) else 0


def _room(value: Sized) -> int:
    return len(value) if isinstance(value, str) else _ELEMENT * len(value)


def _pieces(text: str, values: tuple[Any, ...]) -> int:
    """How many pieces a text is split into, at most."""
    separator = values[0] if values and isinstance(values[0], str) else ""
    return 1 + (text.count(separator) if separator else len(text) // 2)


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list | tuple):  # which may be joined
        return sum(len(item) if isinstance(item, str) else 1 for item in value)
    return len(value) if isinstance(value, Sized) else 0


def _check_integers(operator: str, left: int, right: int) -> None:
    bits = left.bit_length()
    if operator == "**":
        bits *= max(1, right)
    elif operator == "*":
        bits += right.bit_length()
    if bits > _MOST_BITS:
        raise OverflowError(f"it computes with numbers of more than {_MOST_BITS} bits")


def _check_lengths(values: tuple[Any, ...]) -> None:
    if any(isinstance(value, int) and abs(value) > _MOST_WIDTH for value in values):
        raise OverflowError(f"it asks for a length of more than {_MOST_WIDTH}")


def _check_widths(source: str) -> None:
    if _WIDTH.search(source):
        raise OverflowError(f"it may ask for a width of more than {_MOST_WIDTH}")
