"""Tools of hostile sizes, and calls in a history whose arguments are: JSON inside of a text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Final

from corpus_apis import CHAT, MESSAGES, RESPONSES
from corpus_base import CANARY, Api, Row, Sizes, body, quoted, repeated, rows
from corpus_forms import deep_schema, definitions, properties

_SAID: Final = f'{{"role":"user","content":"{CANARY}"}}'
_CHAT: Final = f'{{"model":"m","max_tokens":4,"messages":[{_SAID}'
_RESPONSES: Final = f'{{"model":"m","max_output_tokens":4,"input":[{_SAID}'
_CALLS: Final[Mapping[str, str]] = {
    CHAT.name: _CHAT + ',{"role":"assistant","content":null,"tool_calls":[{"id":"c",'
    '"type":"function","function":{"name":"f","arguments":%s}}]},'
    '{"role":"tool","tool_call_id":"c","content":"x"}]}',
    RESPONSES.name: _RESPONSES + ',{"type":"function_call","call_id":"c","name":"f",'
    '"arguments":%s},{"type":"function_call_output","call_id":"c","output":"x"}]}',
    MESSAGES.name: _CHAT + ',{"role":"assistant","content":[{"type":"tool_use","id":"c",'
    '"name":"f","input":%s}]},{"role":"user","content":[{"type":"tool_result",'
    '"tool_use_id":"c","content":"x"}]}]}',
}
"""A conversation with a call, and ``%s`` for its arguments: a text, or JSON."""
_TOOLS: Final[Mapping[str, str]] = {
    CHAT.name: _CHAT + '],"tool_choice":"required","tools":[{"type":"function","function":'
    '{"name":"f","parameters":%s}}]}',
    RESPONSES.name: _RESPONSES + '],"tool_choice":"required","tools":[{"type":"function",'
    '"name":"f","parameters":%s}]}',
    MESSAGES.name: _CHAT + '],"tool_choice":{"type":"any"},"tools":[{"name":"f",'
    '"input_schema":%s}]}',
}
_APIS: Final = (CHAT, RESPONSES, MESSAGES)


def _members(size: int) -> str:
    members, length = [], 0
    while length < size:
        members.append(f'"k{len(members)}":{len(members)}')
        length += len(members[-1]) + 1
    return "{" + ",".join(members) + "}"


_ARGUMENTS: Final[Mapping[str, Callable[[int], str]]] = {
    "lists in each other": lambda size: '{"a":' + "[" * (size // 2) + "]" * (size // 2) + "}",
    "objects in each other": lambda size: '{"a":' * (size // 6) + "1" + "}" * (size // 6),
    "as deep as may be": lambda _: '{"a":' * 100 + "1" + "}" * 100,
    "many members": _members,
    "one member over and over": lambda size: "{" + repeated('"a":1', size) + "}",
    "many numbers": lambda size: '{"a":[' + repeated("1", size) + "]}",
    "as many numbers as may be": lambda _: '{"a":[' + repeated("1", 250_000) + "]}",
    "a number of many digits": lambda size: '{"a":' + "9" * size + "}",
    "a long text": lambda size: '{"a":"' + "x" * size + '"}',
    "escapes": lambda size: '{"a":"' + "\\u0041" * (size // 6) + '"}',
    "cut": lambda size: '{"a":[' + "1," * (size // 2),
    "no JSON": lambda size: "{" * size,
}
_SCHEMAS: Final[Mapping[str, Callable[[int], Any]]] = {
    "deep": lambda _: deep_schema(200),
    "wide": lambda size: properties(size // 80),
    "as wide as may be": lambda _: properties(1000),
    "a chain of definitions": lambda size: {"type": "object", **definitions(size // 200)},
    "a pattern that grows": lambda _: {
        "type": "object",
        "properties": {"a": {"type": "string", "pattern": "(x?){8000}y"}},
        "required": ["a"],
    },
}


def _called(make: Callable[[int], str]) -> Callable[[Api, Sizes], bytes]:
    def build(api: Api, sizes: Sizes) -> bytes:
        # Quoted, each quote of it has a backslash.
        text = make(sizes.body if api is MESSAGES else sizes.body // 2)
        return body(_CALLS[api.name], text if api is MESSAGES else quoted(text))

    return build


def _offered(make: Callable[[int], Any]) -> Callable[[Api, Sizes], bytes]:
    return lambda api, sizes: body(_TOOLS[api.name], json.dumps(make(sizes.body)))


ROWS: Final[tuple[Row, ...]] = (
    *rows(_APIS, {f"arguments: {n}": _called(m) for n, m in _ARGUMENTS.items()}, small=True),
    *rows(_APIS, {f"a tool's schema: {n}": _offered(m) for n, m in _SCHEMAS.items()}, small=True),
)
