"""What a GGUF file says of itself: its architecture, sizes and tensors, and its other files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from engineroom.errors import ConfigurationError
from engineroom.sources.parts import missing_parts, part_names

__all__ = [
    "MAGIC",
    "GgufArray",
    "GgufHeader",
    "GgufTensor",
    "find_gguf",
    "gguf_part_paths",
    "is_gguf",
    "whole",
]

MAGIC: Final = b"GGUF"
_MAX_LISTED: Final = 12
_CONFIG_NAMES: Final = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "v_head_dim",
    "context_length": "max_position_embeddings",
    "full_attention_interval": "full_attention_interval",
}


@dataclass(frozen=True, slots=True)
class GgufArray:
    """An array of the metadata.

    :param values: its numbers, where they are few; its strings, as bytes, where the reader was
        asked to keep them.
    :param kind: GGUF's number for the type of its values.
    """

    length: int
    values: tuple[Any, ...] | None = field(default=None, compare=False, repr=False)
    kind: int | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor's entry.

    :param kind: ggml's number for the type of its values.
    :param offset: of its data, from the beginning of the file.
    :param size: bytes of its data; 0: the type is not known here.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a GGUF file says of itself.

    :param metadata: scalar and string values; of arrays only their length.
    :param tensor_bytes: bytes of all tensors.
    :param kinds: GGUF's number for the type of each value of the metadata.
    """

    version: int
    metadata: Mapping[str, Any]
    tensor_count: int
    tensor_bytes: int
    file_bytes: int
    tensors: tuple[GgufTensor, ...] = field(default=(), repr=False)
    kinds: Mapping[str, int] = field(default_factory=dict, repr=False)
    path: Path | None = None

    @property
    def file(self) -> str:
        """The file, for messages."""
        return repr(str(self.path)) if self.path is not None else "the model"

    @property
    def architecture(self) -> str:
        """The model's architecture, e.g. ``llama``."""
        return str(self.metadata.get("general.architecture", ""))

    def number(self, key: str) -> int | None:
        """A number of the architecture's own, e.g. ``block_count``.

        ``None``: it is not there, or is not one whole number (some have one for each layer).
        """
        return whole(self.metadata.get(f"{self.architecture}.{key}"))

    def numbers(self, key: str, count: int) -> tuple[int, ...] | None:
        """A number of the architecture's own for each of ``count`` layers.

        ``None``: it is not there, or is neither one whole number nor one for each layer.
        """
        value = self.metadata.get(f"{self.architecture}.{key}")
        if isinstance(value, GgufArray):
            values = value.values or ()
            fits = len(values) >= count and all(whole(number) is not None for number in values)
            return values[:count] if fits else None
        one = whole(value)
        return None if one is None else (one,) * count

    def config(self) -> dict[str, Any]:
        """The model's sizes as ``config.json`` would say them, under its names.

        What differs between layers is a list with a number for each.
        """
        sizes = {
            name: self._size(key)
            for key, name in _CONFIG_NAMES.items()
            if f"{self.architecture}.{key}" in self.metadata
        }
        windowed = self._size("attention.sliding_window_pattern")
        for key, name in (("key_length", "head_dim"), ("value_length", "v_head_dim")):
            short = self.number(f"attention.{key}_swa")
            if short and isinstance(windowed, Sequence) and isinstance(sizes.get(name), int):
                sizes[name] = [short if layer else sizes[name] for layer in windowed]
        if self.number("attention.key_length_mla"):  # else keys and values are unpacked
            sizes["kv_lora_rank"] = self.number("attention.kv_lora_rank")
            sizes["qk_rope_head_dim"] = self.number("rope.dimension_count")
        return {"model_type": self.architecture} | sizes

    def _size(self, key: str) -> Any:
        value = self.metadata.get(f"{self.architecture}.{key}")
        return list(value.values or ()) if isinstance(value, GgufArray) else value


def is_gguf(path: Path) -> bool:
    """Whether the file begins like a GGUF file."""
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def gguf_part_paths(path: Path) -> list[Path]:
    """The files of a model in several, by the name of the first; of any other file, itself."""
    names = part_names(path.name)
    return [path.with_name(name) for name in names] if path.name == names[0] else [path]


def find_gguf(path: Path) -> Path:
    """The GGUF file that a path stands for. Blocks.

    :param path: a file, which stands for itself; or a folder with one model in it.
    :returns: of a model in several files the first one.
    :raises ConfigurationError: the folder has no model, or more than one, or lacks a file of it.
    """
    if not path.is_dir():
        return path
    files = sorted(file.name for file in path.glob("*.gguf"))
    models = sorted({part_names(name)[0] for name in files})
    if len(models) != 1:
        inside = "" if files else _in_folders(path)
        of = "" if len(models) == len(files) else f" of {len(models)} models"
        raise ConfigurationError(
            f"{str(path)!r} is a folder with {len(files)} GGUF files{of} "
            f"({_listed(models)}){inside}; name one file"
        )
    if missing := missing_parts(files):
        raise ConfigurationError(
            f"{str(path)!r} has a model in {len(part_names(models[0]))} files, of which "
            f"{_listed(missing)} is not there; download or copy all of them"
        )
    return path / models[0]


def _in_folders(path: Path) -> str:
    """Where GGUF files are, should they be one folder further in."""
    further = sorted(
        {part_names(file.relative_to(path).as_posix())[0] for file in path.glob("*/*.gguf")}
    )
    return f", and further in {_listed(further)}" if further else ""


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return (", ".join(names[:_MAX_LISTED]) or "none") + more


def whole(value: Any) -> int | None:
    """A whole number; ``None``: it is none, or a truth value."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None
