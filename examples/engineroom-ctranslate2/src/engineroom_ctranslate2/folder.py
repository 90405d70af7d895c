"""Folders with a CTranslate2 model: which they are, and what their files say.

A folder that ``ct2-transformers-converter --copy_files tokenizer.json tokenizer_config.json``
wrote has all that is needed: ``model.bin``, ``config.json`` and ``vocabulary.json`` for
CTranslate2, ``tokenizer.json`` for the tokenizer and ``tokenizer_config.json`` for the chat
template and the length of the context.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from engineroom import ConfigurationError

__all__ = ["ModelFiles", "is_model_folder", "read_files"]

_SPEC: Final = b"TransformerDecoderSpec\0"
"""What ``model.bin`` of a model that continues text begins with, after version and length."""
_PREFIX: Final = struct.Struct("<IH")
_MOST_CONTEXT: Final = 1 << 24
"""A longer ``model_max_length`` is the "unlimited" that transformers writes."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What the small files of a folder say.

    :param vocabulary: the tokens, by id.
    :param end_token: the text of the end-of-sequence token.
    :param chat_template: Jinja source; ``None``: the model has none.
    :param max_context_tokens: ``None``: not said.
    """

    path: Path
    vocabulary: list[str]
    end_token: str
    chat_template: str | None
    max_context_tokens: int | None


def is_model_folder(path: Path) -> bool:
    """Whether CTranslate2 wrote this folder, for a decoder-only model. Reads a few bytes."""
    try:
        with (path / "model.bin").open("rb") as file:
            head = file.read(_PREFIX.size + len(_SPEC))
    except OSError:
        return False
    return head[_PREFIX.size :] == _SPEC and _PREFIX.unpack_from(head)[1] == len(_SPEC)


def read_files(path: Path) -> ModelFiles:
    """Read everything but the weights and the tokenizer.

    :raises ConfigurationError: it is no such folder, or a file is missing or damaged.
    """
    if not is_model_folder(path):
        raise ConfigurationError(
            f"{str(path)!r} is no folder with a decoder-only CTranslate2 model: it has no "
            "model.bin that begins like one; convert the model with ct2-transformers-converter"
        )
    vocabulary = _read(path / "vocabulary.json", list)
    if not vocabulary or not all(isinstance(token, str) for token in vocabulary):
        raise ConfigurationError(
            f"{str(path / 'vocabulary.json')!r} is no list of tokens; convert the model again"
        )
    end_token = _read(path / "config.json", dict).get("eos_token")
    if not isinstance(end_token, str):
        raise ConfigurationError(
            f"{str(path / 'config.json')!r} names no eos_token; convert the model again"
        )
    tokenizer = path / "tokenizer_config.json"
    settings = _read(tokenizer, dict) if tokenizer.exists() else {}
    return ModelFiles(
        path=path,
        vocabulary=vocabulary,
        end_token=end_token,
        chat_template=_chat_template(path, settings),
        max_context_tokens=_context(settings.get("model_max_length")),
    )


def _chat_template(path: Path, settings: dict[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"{str(file)!r} cannot be read: {error}") from error
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _context(value: Any) -> int | None:
    fits = isinstance(value, int | float) and 2 <= value <= _MOST_CONTEXT
    return int(value) if fits else None


def _read(file: Path, kind: type) -> Any:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigurationError(
            f"{str(file.parent)!r} has no {file.name}; convert the model again, with "
            "--copy_files tokenizer.json tokenizer_config.json"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{str(file)!r} is damaged: {error}") from error
    if not isinstance(content, kind):
        raise ConfigurationError(
            f"{str(file)!r} is damaged: it holds a {type(content).__name__}, not a {kind.__name__}"
        )
    return content
