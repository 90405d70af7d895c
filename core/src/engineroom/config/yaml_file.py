"""The YAML of a deployment file: read safely and within bounds, each value with its line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from engineroom.errors import ConfigurationError

__all__ = ["MAX_BYTES", "line_of", "plain_values", "read_document"]

MAX_BYTES: Final = 1 << 20
_MAX_NODES: Final = 100_000


def read_document(data: str | bytes, name: str) -> Any:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError

    yaml = YAML(typ="rt")  # executes no tags, and remembers where each value stood
    try:
        return yaml.load(data)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else 1
        problem = " ".join(filter(None, (error.context, error.problem)))
        raise ConfigurationError(f"{name}:{line}: not valid YAML: {problem}") from error
    except RecursionError:
        raise
    except Exception as error:  # the reader raises much else for odd bytes, tags and numbers
        problem = " ".join(str(error).split())
        raise ConfigurationError(f"{name}: not valid YAML: {problem}") from error


def plain_values(value: Any, line: int, count: list[int], name: str) -> Any:
    """Plain dicts, lists and scalars; bounded, because aliases can make a small file enormous."""
    count[0] += 1
    if count[0] > _MAX_NODES:
        raise ConfigurationError(f"{name}: expands to more than {_MAX_NODES} values")
    if isinstance(value, Mapping):
        _refuse_tag(value, line, name)
        return {
            _scalar(key, at := line_of(value, key, line), name): plain_values(item, at, count, name)
            for key, item in value.items()
        }
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        _refuse_tag(value, line, name)
        return [
            plain_values(item, line_of(value, place, line), count, name)
            for place, item in enumerate(value)
        ]
    return _scalar(value, line, name)


def _scalar(value: Any, line: int, name: str) -> Any:
    """The value itself: the reader's own types remember how it was written."""
    from ruamel.yaml.scalarbool import ScalarBoolean

    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, ScalarBoolean):  # an int to Python
        return bool(value)
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    _refuse_tag(value, line, name)
    raise ConfigurationError(
        f"{name}:{line}: {value} is read as a {type(value).__name__}; "
        "if it is meant as text, put it in quotes"
    )


def _refuse_tag(value: Any, line: int, name: str) -> None:
    if tag := getattr(getattr(value, "tag", None), "value", None):
        raise ConfigurationError(f"{name}:{line}: the tag {tag} means nothing here; leave it out")


def line_of(node: Any, key: Any, default: int) -> int:
    """The line on which an entry of a mapping or a list stands."""
    try:
        lines: Any = node.lc
        return 1 + int((lines.key(key) if isinstance(node, Mapping) else lines.item(key))[0])
    except (AttributeError, KeyError, IndexError, TypeError):  # merged in from elsewhere
        return default
