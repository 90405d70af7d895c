"""What a text that stands as it is must match, by its JSON schema: terms of a grammar in Lark.

Some models write an argument that is a string without quotes, up to a mark behind it. llguidance
knows the keywords of strings only for what stands in quotes, so they are regular expressions here.
Where validators read a keyword differently, only what all of them take is allowed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, Final

from engineroom.errors import ConfigurationError
from engineroom.generation.grammars import check_written, literal, regex_literal
from engineroom.generation.json_schemas import pointed_at

__all__ = ["NoTextError", "text_terms", "text_without"]

MAX_DEPTH: Final = 64
"""Most references, and schemas within schemas, that lead to one text."""
_UNIT: Final = re.compile(r"\[(\^?)((?:\\.|[^\]\\])*)\]|\\.|.", re.DOTALL)
"""A set of characters, an escape, or a character of a regular expression."""
_IN_SET: Final = re.compile(r"\\.|[\[&~]", re.DOTALL)
_ASCII: Final = {"d": "0-9", "w": "0-9A-Za-z_", "s": r"\t\n\x0B\x0C\r "}
"""Characters of which ECMAScript and others have different ideas beyond these."""
_ANY: Final = "(?s:.*)"


class NoTextError(Exception):
    """There is no text that is valid by a schema."""


def text_without(marks: Iterable[str]) -> str:
    """A term for any text in which none of these marks is."""
    within = " | ".join(map(literal, dict.fromkeys(marks)))
    return f"/{_ANY}/ & ~(/{_ANY}/ ({within}) /{_ANY}/)"


def text_terms(schema: Any, root: Mapping[str, Any]) -> list[str]:
    """Terms that a text must match, all of them, to be valid by a schema of strings.

    :param root: what references are looked up in.
    :raises NoTextError: none can be.
    :raises ConfigurationError: a pattern cannot be expressed, or it is too much.
    """
    return _Terms(root).of(schema, 0)


class _Terms:
    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._referred: dict[str, list[str] | None] = {}
        """What references lead to; ``None``: there is no such text."""

    def of(self, schema: Any, depth: int) -> list[str]:
        if schema is False:
            raise NoTextError
        if not isinstance(schema, Mapping):
            return []
        if depth > MAX_DEPTH:
            raise ConfigurationError(f"schemas of a text stand in more than {MAX_DEPTH} others")
        kinds = schema.get("type", "string")
        if kinds != "string" and not (isinstance(kinds, list) and "string" in kinds):
            raise NoTextError
        terms = [*_own_terms(schema)]
        if isinstance(reference := schema.get("$ref"), str):
            terms += self._at(reference, depth + 1)
        for part in _list(schema.get("allOf")):
            terms += self.of(part, depth + 1)
        for key in ("anyOf", "oneOf"):  # llguidance refuses one of which more than one may hold
            if key in schema:
                terms += self._one_of(_list(schema[key]), depth + 1)
        check_written(sum(map(len, terms)))
        return terms

    def _at(self, reference: str, depth: int) -> list[str]:
        if reference not in self._referred:
            self._referred[reference] = None
            with suppress(NoTextError):
                self._referred[reference] = self.of(pointed_at(self._root, reference), depth)
        if (terms := self._referred[reference]) is None:
            raise NoTextError
        return terms

    def _one_of(self, parts: list[Any], depth: int) -> list[str]:
        options: list[str] = []
        for part in parts:
            with suppress(NoTextError):
                if not (terms := self.of(part, depth)):
                    return []
                options.append(f"({' & '.join(terms)})")
        if not options:
            raise NoTextError
        return [f"({' | '.join(options)})"]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _own_terms(schema: Mapping[str, Any]) -> Iterable[str]:
    for options in (schema.get("enum"), [schema["const"]] if "const" in schema else None):
        if isinstance(options, list):
            texts = [literal(option) for option in options if isinstance(option, str)]
            if not texts:
                raise NoTextError
            yield f"({' | '.join(texts)})"
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    if least or most != "":
        yield f"/(?s:.{{{least},{most}}})/"
    if isinstance(pattern := schema.get("pattern"), str):
        yield f"/{regex_literal(_found(pattern))}/"
    if isinstance(name := schema.get("format"), str) and name in _FORMATS:
        yield f"({_FORMATS[name]})"


# ── patterns ─────────────────────────────────────────────────────────────────────────────────


def _found(pattern: str) -> str:
    """The regular expression of the texts in which another one finds something."""
    branches: list[list[str]] = [[]]
    depth = 0
    for unit in _UNIT.finditer(pattern):
        text = unit[0]
        depth += (text == "(") - (text == ")")
        if text == "|" and not depth:
            branches.append([])
        elif text in ("^", "$") and depth:
            raise _misplaced(pattern)
        else:
            branches[-1].append(_unit(unit))
    return "|".join(_branch(branch, pattern) for branch in branches)


def _branch(units: list[str], pattern: str) -> str:
    start, end = 0, len(units)
    while start < end and units[start] == "^":
        start += 1
    while end > start and units[end - 1] == "$":
        end -= 1
    inner = units[start:end]
    if "^" in inner or "$" in inner:
        raise _misplaced(pattern)
    before, behind = ("" if start else _ANY), ("" if end < len(units) else _ANY)
    return f"{before}(?:{''.join(inner)}){behind}"


def _misplaced(pattern: str) -> ConfigurationError:
    return ConfigurationError(
        f"pattern {pattern[:100]!r} has ^ or $ within it, which calls as this model writes them "
        "cannot keep to; put them at its ends"
    )


def _unit(unit: re.Match[str]) -> str:
    """The same for llguidance, which knows no ECMAScript."""
    text = unit[0]
    if unit[2] is None:
        return f"[{_ASCII[text[1]]}]" if text[0] == "\\" and text[1:] in _ASCII else text
    if text == "[^]":
        return "(?s:.)"
    negated = unit[1] == "^"

    def member(found: re.Match[str]) -> str:
        escape = found[0]
        if escape[0] != "\\":
            return f"\\{escape}"
        if not negated and escape[1] in _ASCII:
            return _ASCII[escape[1]]
        if negated and escape[1].lower() in _ASCII and escape[1].isupper():
            return f"[^{_ASCII[escape[1].lower()]}]"
        return escape

    return f"[{unit[1]}{_IN_SET.sub(member, unit[2])}]"


# ── formats ──────────────────────────────────────────────────────────────────────────────────

_YEAR = "[0-9]{4}"
_DAYS = (
    f"{_YEAR}-(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    f"|{_YEAR}-(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|{_YEAR}-02-(?:0[1-9]|1[0-9]|2[0-8])"
    "|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29"
)
_HOUR = "(?:[01][0-9]|2[0-3])"
_TIME = f"{_HOUR}:[0-5][0-9]:[0-5][0-9](?:\\.[0-9]{{1,6}})?(?:Z|[+-]{_HOUR}:[0-5][0-9])"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_ATOM = "[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_HEX = "[0-9A-Fa-f]"
_IPV4 = f"{_BYTE}(?:\\.{_BYTE}){{3}}"
_GROUP = f"{_HEX}{{1,4}}"
_IPV6 = "|".join(
    [
        f"(?:{_GROUP}:){{7}}{_GROUP}",
        *(f"(?:{_GROUP}:){{{n}}}(?::{_GROUP}){{1,{7 - n}}}" for n in range(1, 7)),
        f":(?::{_GROUP}){{1,7}}|(?:{_GROUP}:){{1,7}}:|::",
    ]
)
_CLOCK = "T(?:[0-9]+S|[0-9]+M(?:[0-9]+S)?|[0-9]+H(?:[0-9]+M(?:[0-9]+S)?)?)"
_DATES = "(?:[0-9]+D|[0-9]+M(?:[0-9]+D)?|[0-9]+Y(?:[0-9]+M(?:[0-9]+D)?)?)"
_IN_URI = f"(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%{_HEX}{{2}})"
_IN_HOST = f"(?:[A-Za-z0-9._~!$&'()*+,;=-]|%{_HEX}{{2}})"
_AUTHORITY = f"(?:(?:{_IN_HOST}|:)*@)?{_IN_HOST}+(?::[0-9]{{1,5}})?"
_URI = (
    f"[A-Za-z][A-Za-z0-9+.-]*:(?://{_AUTHORITY}(?:/{_IN_URI}*)*|/?{_IN_URI}+(?:/{_IN_URI}*)*)"
    f"(?:\\?(?:{_IN_URI}|[/?])*)?(?:#(?:{_IN_URI}|[/?])*)?"
)
_SHAPES: Final = {
    "date": _DAYS,
    "time": _TIME,
    "date-time": f"(?:{_DAYS})T{_TIME}",
    "duration": f"P(?:{_DATES}(?:{_CLOCK})?|{_CLOCK}|[0-9]+W)",
    "email": f"{_ATOM}(?:\\.{_ATOM})*@{_LABEL}(?:\\.{_LABEL})*",
    "hostname": f"{_LABEL}(?:\\.{_LABEL})*",
    "ipv4": _IPV4,
    "ipv6": _IPV6,
    "uri": _URI,
    "uuid": f"{_HEX}{{8}}(?:-{_HEX}{{4}}){{3}}-{_HEX}{{12}}",
}
_MORE: Final = {
    "date": " & ~/0000.*/",
    "date-time": " & ~/0000.*/",
    "email": " & /.{0,254}/ & ~/.{65,}@.*/",
    "hostname": " & /.{0,253}/",
}
_FORMATS: Final = {
    name: f"/{regex_literal(shape)}/{_MORE.get(name, '')}" for name, shape in _SHAPES.items()
}
