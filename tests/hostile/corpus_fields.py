"""Bodies that are wrong in their form: lists, nesting, numbers, names, JSON itself."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Final

from corpus_apis import (
    CHAT,
    COMPLETIONS,
    EVERY,
    INFERENCE,
    MESSAGES,
    OLLAMA_CHAT,
    READ_ALIKE,
    RESPONSES,
)
from corpus_base import CANARY, Api, Row, Sizes, Visit, body, joined, quoted, repeated, rows
from hostile_wire import post

ITEMS: Final = (
    "{}", "1", '""', "null", "[]", "1.5", "true", '"x"', "-1", '{"role":"user"}',
    '{"role":"user","content":[]}', '{"type":"text"}', '{"type":"text","text":1}',
    '{"type":"image_url","image_url":{"url":"data:,"}}', "[{}]", "[[]]", '{"":{}}', "1e308",
)  # fmt: skip
"""Most are wrong in most lists; some are right in some."""


TAKEN: Final = {"{}": 65_000, "[]": 65_000, '"x"': 65_000, "1": 520_000}
"""About as many as a body may have: more are refused before anybody looks at them."""
_REFUSED: Final = frozenset({"functions", "modalities"})
"""Refused before anybody looks into them, as ``mcp_servers`` is, which the small corpus has."""
_BIASED: Final = (CHAT, COMPLETIONS, INFERENCE)
"""Their ``logit_bias`` has small rows in corpus_texts."""
_ALIKE: Final = frozenset(api.name for api in READ_ALIKE)
UNCOUNTED: Final = 65_000
"""Bytes of a body that is taken as it is, whatever is in it."""


def _without_alike(made: Iterable[Row]) -> Iterator[Row]:
    """The small corpus goes to no route whose bodies are read as those of another."""
    for row in made:
        yield replace(row, small=False) if row.apis[0].name in _ALIKE else row


def _in_lists() -> Iterator[Row]:
    """A body of one item over and over, in each list of each route."""
    for api in EVERY:
        for place, (field, template) in enumerate(sorted(api.lists.items())):
            for kind, item in enumerate(ITEMS):
                # The small corpus takes the worst one, and others in turn.
                small = kind == 0 or kind == (place + 2) % len(ITEMS)
                small = small and field not in _REFUSED
                name = f"list {field}: {item}"
                yield _items(f"{name} over and over", api, template, item, small=small)
                if item in TAKEN:
                    few, some = UNCOUNTED // (len(item) + 1), TAKEN[item]
                    worst = small and kind == 0
                    yield _items(f"{name}, {few} of them", api, template, item, few, small=worst)
                    yield _items(f"{name}, {some} of them", api, template, item, some)


def _items(
    name: str, api: Api, template: str, item: str, count: int | None = None, *, small: bool = False
) -> Row:
    def build(_: Api | None, sizes: Sizes) -> bytes:
        size = sizes.body if count is None else count * (len(item) + 1)
        return body(template, repeated(item, size))

    return Row(name, build, (api,), small=small)


def _mixed(api: Api, sizes: Sizes) -> bytes:
    """Right ones, and a wrong one at the end."""
    template = next(iter(api.lists.values()))
    right = (
        '{"role":"user","content":"x"}' if "message" in template or "input" in template else '"x"'
    )
    return body(template, repeated(right, sizes.body) + ",{}")


DEEP: Final[tuple[tuple[str, str, str], ...]] = (
    ("lists", "[", "]"),
    ("objects", '{"a":', "}"),
    ("lists in objects", '{"a":[', "]}"),
)


def _nested(opening: str, closing: str, deep: int | None) -> Callable[[Api, Sizes], bytes]:
    def build(api: Api, sizes: Sizes) -> bytes:
        template = [*api.lists.values()][-1]
        count = deep or sizes.body // (len(opening) + len(closing))
        return body(template, opening * count + "1" + closing * count)

    return build


GIANTS: Final[dict[str, Callable[[Sizes], str]]] = {
    "an integer of all digits": lambda sizes: "9" * sizes.body,
    "an integer of 4,000 digits": lambda _: "9" * 4000,
    "an integer of 60,000 digits": lambda _: "9" * 60_000,
    "a fraction of 60,000 digits": lambda _: "0." + "3" * 60_000,
    "an integer of 100 digits": lambda _: "9" * 100,
    "10^400000": lambda _: "1" + "0" * 400_000,
    "a negative one": lambda sizes: "-" + "9" * sizes.body,
    "a fraction of all digits": lambda sizes: "0." + "3" * sizes.body,
    "1e400000": lambda _: "1e400000",
    "an exponent of all digits": lambda sizes: "1e" + "9" * sizes.body,
    "a digit after zeros": lambda sizes: "0." + "0" * sizes.body + "1",
    "more than 64 bits": lambda _: str(2**64 + 1),
    "all of 63 bits": lambda _: str(2**63 - 1),
    "1e300": lambda _: "1e300",
    "1e-300": lambda _: "1e-300",
    "zero": lambda _: "0",
    "less than zero": lambda _: "-0.0",
    "one and a half": lambda _: "1.5",
    "no number": lambda _: "true",
    "-2^63": lambda _: str(-(2**63)),
}


def _giant_numbers() -> Iterator[Row]:
    for what, number in GIANTS.items():
        fields = ((api, *field) for api in EVERY for field in api.numbers.items())
        for place, (api, field, template) in enumerate(fields):

            def build(
                _: Api | None,
                sizes: Sizes,
                template: str = template,
                number: Callable[[Sizes], str] = number,
            ) -> bytes:
                return body(template, number(sizes))

            small = what in ("an integer of all digits", "1e300") and place % 9 == 0
            yield Row(f"number {field}: {what}", build, (api,), small=small)


def _list_of_giants(api: Api, sizes: Sizes) -> bytes:
    return body([*api.lists.values()][-1], repeated("9" * 4000, sizes.body))


STRINGS: Final[dict[str, Callable[[Sizes], str]]] = {
    "a giant one": lambda sizes: quoted("x" * sizes.body),
    "half of a surrogate pair": lambda _: '"\\ud800"',
    "halves in the wrong order, over and over": lambda sizes: (
        '"' + r"\udc00\ud800" * (sizes.body // 12) + '"'
    ),
    "escapes over and over": lambda sizes: '"' + r"\u0041" * (sizes.body // 6) + '"',
    "NUL": lambda _: '"a\\u0000b"',
    "control characters": lambda _: quoted("".join(map(chr, range(32))) + "\x7f\x85\x9b"),
    "line breaks and a log line": lambda _: quoted("x\r\nERROR engineroom: \x1b[31mgone\x1b[0m"),
    "bidirectional ones": lambda _: quoted("a\u202eb\u2066c\u2069d\u200f"),
    "a path": lambda _: quoted("../../../../etc/passwd"),
    "a template": lambda _: quoted("{{ ''.__class__.__mro__ }}{% for i in range(10**9) %}x"),
    "a format": lambda _: quoted("%s%n{0.__class__}{}" * 100),
    "not text": lambda _: '{"a":1}',
    "nothing": lambda _: '""',
}


def _strings() -> Iterator[Row]:
    for what, string in STRINGS.items():
        for api in EVERY:
            for place, (field, template) in enumerate(api.texts.items()):

                def build(
                    _: Api | None,
                    sizes: Sizes,
                    template: str = template,
                    string: Callable[[Sizes], str] = string,
                ) -> bytes:
                    return body(template, string(sizes))

                # The first of each is a prompt; corpus_texts has those.
                small = (
                    place > 0 and what in ("a giant one", "bidirectional ones") and place % 3 == 1
                )
                yield Row(f"text {field}: {what}", build, (api,), small=small)


MEMBERS: Final[dict[str, Callable[[Sizes], str]]] = {
    "as many as fit": lambda sizes: joined(f'"k{i}":1' for i in range(sizes.body // 11)),
    "one name over and over": lambda sizes: repeated('"k":1', sizes.body),
    "a giant name": lambda sizes: f'"{"k" * sizes.body}":1',
    "names that hash alike": lambda sizes: joined(
        f'"{i * (2**61 - 1)}":1' for i in range(sizes.body // 26)
    ),
    "64 kB of them": lambda _: joined(f'"k{i}":1' for i in range(UNCOUNTED // 11)),
    "about as many as are taken": lambda _: joined(f'"k{i}":1' for i in range(60_000)),
    "nested objects": lambda sizes: joined(f'"k{i}":{{"a":{{}}}}' for i in range(sizes.body // 18)),
    "dunder names": lambda _: '"__class__":{},"__init__":1,"model_config":1,"model_fields":{}',
    "names in disguise": lambda _: '"a\\u202eb":1,"\\ud800":1,"\\u0000":1,"":1,"a\\r\\nb":1',
}


def _members() -> Iterator[Row]:
    for what, members in MEMBERS.items():
        for api in EVERY:
            for place, (field, template) in enumerate(api.objects.items()):

                def build(
                    _: Api | None,
                    sizes: Sizes,
                    template: str = template,
                    members: Callable[[Sizes], str] = members,
                ) -> bytes:
                    return body(template, members(sizes))

                small = what == "as many as fit" or (what == "names in disguise" and place == 0)
                small = small and (field != "logit_bias" or api not in _BIASED)
                yield Row(f"object {field}: {what}", build, (api,), small=small)


def _known_twice(api: Api, sizes: Sizes) -> bytes:
    """Fields that there are, over and over: the last one counts, or none does."""
    valid = api.prompt.replace("%s", quoted(CANARY), 1)
    name = valid.split('"')[1]
    return body("{%s," + valid[1:], repeated(f'"{name}":["{CANARY}"]', sizes.body))


def _valid(api: Api) -> bytes:
    return body(api.prompt, quoted(CANARY))


def _bytes_in_text(raw: bytes) -> Callable[[Api, Sizes], bytes]:
    def build(api: Api, sizes: Sizes) -> bytes:
        before, _, after = api.prompt.encode().partition(b"%s")
        return before + b'"' + raw * (sizes.body // len(raw)) + b'"' + after

    return build


def _tools(api: Api, sizes: Sizes) -> bytes:
    parameters = '{"type":"object","properties":{"a":{"type":"string"}}}'
    tool = f'{{"type":"function","function":{{"name":"f","parameters":{parameters}}}}}'
    return body(api.lists["tools"], repeated(tool, sizes.body))


JSONS: Final[dict[str, Callable[[Api, Sizes], bytes | Visit]]] = {
    "many right items and a wrong one": _mixed,
    "a list of integers of 4,000 digits": _list_of_giants,
    "one field over and over": _known_twice,
    "not UTF-8": _bytes_in_text(b"\xff\xfe"),
    "no JSON at all": lambda _, sizes: b"x" * sizes.body,
    "whitespace alone": lambda _, sizes: b" " * sizes.body,
    "gzip": lambda api, sizes: post(
        api.path, gzip.compress(b" " * sizes.body * 100), "content-encoding: gzip",
        patience_s=sizes.patience_s,
    ),
    "UTF-8 of surrogates": _bytes_in_text(b"\xed\xa0\x80"),
    "UTF-8 that is too long": _bytes_in_text(b"\xc0\x80"),
    "raw control characters": _bytes_in_text(b"\x01"),
    "UTF-16": lambda api, _: _valid(api).decode().encode("utf-16"),
    "a mark of byte order": lambda api, _: b"\xef\xbb\xbf" + _valid(api),
    "whitespace behind": lambda api, sizes: _valid(api) + b"\n" * sizes.body,
    "two bodies in one": lambda api, _: _valid(api) * 2,
    "a body that is a list": lambda _, sizes: b"[" + b"1," * (sizes.body // 2) + b"1]",
    "a body that is a number": lambda _, sizes: b"9" * sizes.body,
    "a body that is a text": lambda _, sizes: b'"' + b"x" * sizes.body + b'"',
    "a body that ends too soon": lambda api, _: _valid(api)[:-3],
    "NaN and Infinity": lambda _, __: b'{"model":NaN,"input":-Infinity}',
    "an empty body": lambda _, __: b"",
    "a content-type of another kind": lambda api, sizes: post(
        api.path, _valid(api), "content-type: text/plain", patience_s=sizes.patience_s
    ),
    **{
        f"{what} in each other, {deep or 'as deep as fits'}": _nested(opening, closing, deep)
        for what, opening, closing in DEEP
        for deep in (None, 900, 20_000)
    },
}  # fmt: skip
LISTS: Final = tuple(_without_alike(_in_lists()))
ROWS: Final = (
    *_without_alike(_giant_numbers()),
    *_without_alike(_strings()),
    *_without_alike(_members()),
    *rows(
        tuple(api for api in EVERY if api not in (OLLAMA_CHAT, *READ_ALIKE)),
        JSONS,
        small=[*list(JSONS)[:7], "lists in each other, 900"],
    ),
    *rows((OLLAMA_CHAT, *READ_ALIKE), JSONS),
    *rows((CHAT, RESPONSES, MESSAGES), {"tools with schemas": _tools}, small=True),
)
