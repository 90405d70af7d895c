"""The YAML of a deployment file: read safely and within bounds, each value with its line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from engineroom.config.interpolation import FromEnvironment, WrongReferenceError, interpolated
from engineroom.errors import ConfigurationError

__all__ = ["MAX_BYTES", "Location", "PlainReader", "line_of", "read_document"]

MAX_BYTES: Final = 1 << 20
_MAX_NODES: Final = 100_000
_MAX_EXCHANGED: Final = 4 << 20
Location: TypeAlias = tuple[Any, ...]
"""Where a value stands: keys and places, from the outermost."""


def read_document(data: str | bytes, name: str) -> Any:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError

    yaml = YAML(typ="rt")  # executes no tags, and remembers where each value stood
    yaml.preserve_quotes = True  # by their types
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


@dataclass(eq=False)
class PlainReader:
    """Makes plain dicts, lists and scalars of what was read, within bounds.

    Aliases can make a small file enormous, and so can variables.

    :param name: what messages call the file.
    :param environ: the variables that values refer to.
    :param free: whether a mapping at a place may have keys that begin with ``x-``, which are left
        out: they are the file's own, to keep what anchors name.
    """

    name: str
    environ: Mapping[str, str]
    free: Callable[[Location], bool]
    problems: list[tuple[int, Location, str]] = field(default_factory=list)
    """References that cannot be followed, each with its line and its place."""
    _count: int = 0
    _exchanged: int = 0

    def plain(self, value: Any, line: int = 1, at: Location = ()) -> Any:
        """The value, in which references to the environment are followed.

        :raises ConfigurationError: it has a tag, is not plain, or expands to too much.
        """
        self._count += 1
        if self._count > _MAX_NODES:
            raise ConfigurationError(f"{self.name}: expands to more than {_MAX_NODES} values")
        if isinstance(value, Mapping):
            _refuse_tag(value, line, self.name)
            return dict(self._items(value, line, at))
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            _refuse_tag(value, line, self.name)
            return [
                self.plain(item, line_of(value, place, line), (*at, place))
                for place, item in enumerate(value)
            ]
        scalar = _scalar(value, line, self.name)
        if isinstance(scalar, str):
            return self._exchange(scalar, line, at, plain=not _quoted(value))
        return scalar

    def _items(self, value: Mapping[Any, Any], line: int, at: Location) -> Iterator[Any]:
        free = self.free(at)
        for written, item in value.items():
            here = line_of(value, written, line)
            key = _scalar(written, here, self.name)
            if not (free and isinstance(key, str) and key.startswith("x-")):
                yield key, self.plain(item, here, (*at, key))

    def _exchange(self, text: str, line: int, at: Location, *, plain: bool) -> Any:
        try:
            value = interpolated(text, self.environ, plain=plain)
        except WrongReferenceError as error:
            self.problems.append((line, at, str(error)))
            return text
        if isinstance(value, FromEnvironment):
            self._exchanged += len(value)
            if self._exchanged > _MAX_EXCHANGED:
                raise ConfigurationError(
                    f"{self.name}: what its variables hold has more than {_MAX_EXCHANGED} "
                    "characters together"
                )
        return value


def _quoted(value: Any) -> bool:
    from ruamel.yaml.scalarstring import PlainScalarString, ScalarString

    return isinstance(value, ScalarString) and not isinstance(value, PlainScalarString)


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
