"""JSON beside the weights, read within bounds: it comes from anyone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, TypeVar

from engineroom.errors import ConfigurationError

__all__ = ["read_json"]

_T = TypeVar("_T", dict[str, Any], list[Any])

_LIMIT: Final = 16 << 20
"""Bytes of a file; the largest configurations known have some kilobytes."""


def read_json(path: Path, kind: type[_T], *, limit: int = _LIMIT, what: str = "") -> _T:
    """Read a JSON file that holds an object or a list. Blocks.

    :param kind: ``dict`` or ``list``.
    :param limit: bytes that the file may have.
    :param what: it should hold, for the message.
    :raises ConfigurationError: it cannot be read, is too large or damaged, or holds something else.
    """
    try:
        size = path.stat().st_size
        if size > limit:
            raise ConfigurationError(
                f"{str(path)!r} is damaged: it has {size} bytes, and no model's has more than "
                f"{limit >> 20} MiB; download it again"
            )
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigurationError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except ConfigurationError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(
            f"{str(path)!r} is damaged: it is not valid JSON ({error}); download it again"
        ) from error
    if not isinstance(content, kind):
        what = what or ("JSON object" if kind is dict else "list")
        raise ConfigurationError(
            f"{str(path)!r} is damaged: it holds no {what} but {type(content).__name__}; "
            "download it again"
        )
    return content
