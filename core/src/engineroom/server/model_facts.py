"""What the files of a model say of it, without loading it: sizes, kinds, the chat template."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from engineroom.border import in_thread
from engineroom.errors import EngineRoomError
from engineroom.sources.gguf import GgufArray, GgufHeader, find_gguf, gguf_part_paths, is_gguf
from engineroom.sources.gguf_header import read_gguf_header
from engineroom.sources.json_file import read_json
from engineroom.sources.source import find_source

__all__ = ["ModelFacts", "facts_of"]

_KEPT: Final = 256
_LONG: Final = 1 << 16
"""Characters; no longer text of a file is told."""
_FILE_TYPES: Final = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K",
    11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S",
    17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS",
    23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M",
    30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4",
}  # fmt: skip
"""llama.cpp's numbers for how most of a file's tensors are written."""
_DTYPES: Final = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_TEMPLATE: Final = "tokenizer.chat_template"
_NOT_TOLD: Final = ("general.name", _TEMPLATE, "quantize.", "split.")
_Stamp = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a model's files; empty or ``None`` what is not.

    :param size: bytes of all of them.
    :param modified: when the last of them was written, in seconds since 1970.
    :param format: ``gguf`` or ``safetensors``.
    :param family: its architecture.
    :param parameter_size: how many parameters it has, as ``134.52M``.
    :param quantization: how most of them are written, as ``Q4_K_M``.
    :param context_tokens: the context that it was made for.
    :param info: what else a GGUF file says, by its names.
    """

    size: int | None = None
    modified: float | None = None
    format: str = ""
    family: str = ""
    parameter_size: str = ""
    quantization: str = ""
    context_tokens: int | None = None
    embedding_length: int | None = None
    template: str = ""
    license: str = ""
    info: Mapping[str, Any] = field(default_factory=dict)


_NOTHING: Final = ModelFacts()


async def facts_of(source: str) -> ModelFacts:
    """What the files of a source say. One that is not on this machine, or not readable, says
    nothing.
    """
    return await in_thread(lambda: _facts(source))


def _facts(source: str) -> ModelFacts:
    try:
        path = find_source(source)
        if path is None:
            return _NOTHING
        if path.is_dir() and not (path / "config.json").is_file():
            path = find_gguf(path)
        return _read(path, _stamps(path))
    except (EngineRoomError, OSError, ValueError):  # a source of a runtime's own, or gone
        return _NOTHING


def _stamps(path: Path) -> _Stamp:
    """The files, and by what is seen that they are others."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else gguf_part_paths(path)
    found = ((str(file), file.stat()) for file in files)
    return tuple((name, facts.st_size, facts.st_mtime_ns) for name, facts in found)


@lru_cache(maxsize=_KEPT)
def _read(path: Path, stamps: _Stamp) -> ModelFacts:
    """Files that are as they were are not read again."""
    size = sum(size for _, size, _ in stamps) or None
    modified = max((written for _, _, written in stamps), default=0) / 1e9 or None
    if path.is_dir():
        return _of_folder(path, size, modified)
    if not is_gguf(path):
        return ModelFacts(size=size, modified=modified)
    header = read_gguf_header(path)
    metadata, count = header.metadata, sum(math.prod(t.shape) for t in header.tensors)
    kind = metadata.get("general.file_type")
    return ModelFacts(
        size=size,
        modified=modified,
        format="gguf",
        family=header.architecture,
        parameter_size=_in_words(count),
        quantization=_FILE_TYPES.get(kind, "") if isinstance(kind, int) else "",
        context_tokens=header.number("context_length"),
        embedding_length=header.number("embedding_length"),
        template=_text(metadata.get(_TEMPLATE)),
        license=_text(metadata.get("general.license")),
        info=_info(header, count),
    )


def _of_folder(folder: Path, size: int | None, modified: float | None) -> ModelFacts:
    config = read_json(folder / "config.json", dict)
    template = folder / "chat_template.jinja"
    family, context = config.get("model_type"), config.get("max_position_embeddings")
    hidden = config.get("hidden_size")
    text = template.read_text(encoding="utf-8", errors="replace") if template.is_file() else ""
    info: dict[str, Any] = {}
    if isinstance(family, str):
        info["general.architecture"] = family
    return ModelFacts(
        size=size,
        modified=modified,
        format="safetensors" if size else "",
        family=family if isinstance(family, str) else "",
        quantization=_DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), ""),
        context_tokens=context if isinstance(context, int) else None,
        embedding_length=hidden if isinstance(hidden, int) else None,
        template=_text(text),
        info=info,
    )


def _info(header: GgufHeader, count: int) -> dict[str, Any]:
    told = {
        name: value
        for name, value in header.metadata.items()
        if not name.startswith(_NOT_TOLD) and not isinstance(value, GgufArray | bytes)
        if not isinstance(value, str) or len(value) <= _LONG
    }
    return {**told, "general.parameter_count": count}


def _text(value: Any) -> str:
    return value if isinstance(value, str) and len(value) <= _LONG else ""


def _in_words(count: int) -> str:
    """A number as Ollama writes it."""
    if count >= 10**9:
        return f"{count / 10**9:.1f}B"
    if count >= 10**6:
        return f"{count / 10**6:.2f}M"
    return f"{count / 1000:.2f}K" if count >= 1000 else str(count)
