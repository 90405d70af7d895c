"""What a text must match: schemas, grammars, regular expressions and choices of hostile sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from corpus_apis import INFERENCE
from corpus_base import CANARY, Api, Row, Sizes, as_json, rows


def _body(**output: Any) -> bytes:
    params = {"max_new_tokens": 4, "structured_output": output}
    return as_json({"model_id": "m", "prompt": CANARY, "params": params})


def properties(count: int) -> dict[str, Any]:
    properties = {f"p{i}": {"type": "string"} for i in range(count)}
    return {"type": "object", "properties": properties}


def deep_schema(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string", "pattern": "(a+)+$"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def _rules(count: int) -> str:
    return "start: r0\n" + "".join(f'r{i}: r{i + 1} | "{i}"\n' for i in range(count))


def definitions(count: int) -> dict[str, Any]:
    chain = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": chain}


def _alternatives(count: int) -> str:
    return "start: " + " | ".join(f'"{i}"' for i in range(count))


FORMS: Final[dict[str, Callable[[Sizes], bytes]]] = {
    "a schema of ours, deep": lambda _: _body(json_schema=deep_schema(200)),
    "a schema of ours, wide": lambda sizes: _body(json_schema=properties(sizes.body // 80)),
    "a schema of ours, as wide as may be": lambda _: _body(json_schema=properties(1000)),
    "rules in a chain": lambda sizes: _body(grammar=_rules(sizes.body // 80)),
    "as many rules in a chain as may be": lambda _: _body(grammar=_rules(990) + 'r990: "x"\n'),
    "definitions in a chain": lambda sizes: _body(json_schema=definitions(sizes.body // 200)),
    "thousands of choices": lambda _: _body(choice=[f"choice {i} of many" for i in range(9000)]),
    "long choices": lambda _: _body(choice=["x" * 16_000 + str(i) for i in range(16)]),
    "thousands of alternatives": lambda _: _body(grammar=_alternatives(7000)),
    "a grammar of blank lines": lambda _: _body(grammar="\n" * 250_000 + 'root ::= "x"'),
    "a grammar of quotes": lambda _: _body(grammar='"\\"' * 16_000),
    "a regex that grows": lambda _: _body(regex="x?" * 8000),
    "a regex that must follow": lambda _: _body(regex="(x{1000}){1000}"),
}


def _of(build: Callable[[Sizes], bytes]) -> Callable[[Api, Sizes], bytes]:
    return lambda _, sizes: build(sizes)


ROWS: Final[tuple[Row, ...]] = tuple(
    rows((INFERENCE,), {name: _of(build) for name, build in FORMS.items()}, small=True)
)
