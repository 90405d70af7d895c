"""A model's folder, as far as its small files tell: what it is, and how large it will be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from engineroom import ConfigurationError
from engineroom.memory import kv_values_per_token
from engineroom.sources import missing_parts, read_json, read_safetensors_header

__all__ = ["ModelFolder", "is_model_folder", "read_folder", "tensors_of"]

_WEIGHTS: Final = ("*.safetensors", "pytorch_model*.bin", "consolidated*.pth")
_WIDTHS: Final = {"float32": 4, "float16": 2, "bfloat16": 2, "float": 4, "half": 2}
_DTYPES: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types of numbers as safetensors files write them."""
_ENCODERS: Final = frozenset(
    {"bert", "gte", "modernbert", "new", "nomic_bert", "roberta", "xlm-roberta"}
)
"""Kinds of models that vLLM has as encoders."""
DEFAULT_CONTEXT: Final = 8192
"""Most tokens of a context where the deployment does not say."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """What ``config.json`` and the sizes of the files tell of a model.

    :param trained: tokens of the context that it was trained for; ``None``: it is not said.
    :param token_values: numbers that the key/value cache keeps for a token; 0: not known.
    :param dtype: type of the weights' numbers; ``auto``: it is not said.
    :param end_tokens: tokens that end a generation.
    :param encoder: it is known to make vectors of texts, and to keep no key/value cache.
    """

    path: Path
    architectures: tuple[str, ...]
    weight_bytes: int
    trained: int | None
    token_values: int
    dtype: str
    end_tokens: frozenset[int]
    encoder: bool = False

    def context(self, most: int | None) -> int:
        """Tokens of the context: ``most``, or as trained and at most 8192."""
        return most or min(self.trained or DEFAULT_CONTEXT, DEFAULT_CONTEXT)

    def token_bytes(self, dtype: str) -> int:
        """Bytes of key/value cache for a token, computed in ``dtype`` (``auto``: the files')."""
        return self.token_values * _WIDTHS.get(self.dtype if dtype == "auto" else dtype, 2)

    def loaded_bytes(self, dtype: str) -> int:
        """Bytes of the weights once they are loaded in ``dtype``."""
        if dtype in ("auto", self.dtype):
            return self.weight_bytes
        return self.weight_bytes * _WIDTHS.get(dtype, 2) // _WIDTHS.get(self.dtype, 2)


def is_model_folder(path: Path) -> bool:
    """Whether a folder holds weights of transformers' format. A look, which never raises."""
    try:
        config = read_json(path / "config.json", dict)
    except ConfigurationError:
        return False
    return bool(_architectures(config)) and bool(_weight_files(path))


def read_folder(path: Path) -> ModelFolder:
    """Look into a folder.

    :raises ConfigurationError: it is no folder of a model, or a damaged one; the message says
        what to do.
    """
    where = repr(str(path))
    if not path.is_dir():
        hint = ""
        if path.suffix.lower() == ".gguf":
            hint = (
                "; GGUF files are run by engineroom-llamacpp; for vLLM, save it as transformers "
                "does (from_pretrained with gguf_file=, then save_pretrained)"
            )
        raise ConfigurationError(
            f"{where} is a file; vLLM runs models from folders as transformers saves them, with "
            f"config.json and weights{hint}"
        )
    if not (path / "config.json").is_file():
        raise ConfigurationError(
            f"{where} has no config.json; vLLM runs folders as transformers saves them: name the "
            "folder that has config.json, tokenizer.json and *.safetensors"
        )
    config = read_json(path / "config.json", dict)
    architectures = _architectures(config)
    if not architectures:
        raise ConfigurationError(
            f"{where}: config.json names no architectures, so that vLLM cannot tell what model "
            "it is; save the model again with transformers"
        )
    files = _weight_files(path)
    if not files:
        raise ConfigurationError(
            f"{where} has a config.json but no weights ({', '.join(_WEIGHTS)}); download or copy "
            "them, too"
        )
    if missing := missing_parts(file.name for file in files):
        raise ConfigurationError(
            f"{where} lacks {', '.join(missing[:12])} of its weights; download or copy all of them"
        )
    text = config.get("text_config")
    inner = {**config, **text} if isinstance(text, Mapping) else config
    return ModelFolder(
        path=path,
        architectures=architectures,
        weight_bytes=sum(file.stat().st_size for file in files),
        trained=_number(inner, "max_position_embeddings") or None,
        token_values=kv_values_per_token(config),
        dtype=_dtype(inner) or _dtype_of(files[0]) or "auto",
        end_tokens=_end_tokens(path, inner),
        encoder=inner.get("model_type") in _ENCODERS,
    )


def _architectures(config: Mapping[str, Any]) -> tuple[str, ...]:
    names = config.get("architectures")
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _weight_files(path: Path) -> list[Path]:
    for pattern in _WEIGHTS:
        if files := sorted(path.glob(pattern)):
            return files
    return []


def _number(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    return value if type(value) is int and value > 0 else 0


def _dtype(config: Mapping[str, Any]) -> str | None:
    said = config.get("dtype") or config.get("torch_dtype")
    return said if isinstance(said, str) and said in _WIDTHS else None


def _dtype_of(file: Path) -> str | None:
    """What most tensors of a safetensors file are made of, for folders that do not say."""
    counts = Counter(tensors_of(file).values())
    return next((_DTYPES[name] for name, _ in counts.most_common() if name in _DTYPES), None)


def tensors_of(file: Path) -> Mapping[str, str]:
    """The tensors of a safetensors file, and the type of each, as its header writes it.

    Nothing of another file, or of a damaged one.
    """
    try:
        return read_safetensors_header(file).dtypes if file.suffix == ".safetensors" else {}
    except ConfigurationError:
        return {}


def _end_tokens(path: Path, config: Mapping[str, Any]) -> frozenset[int]:
    ids: set[int] = set()
    sources = [config]
    if (path / "generation_config.json").is_file():
        sources.append(read_json(path / "generation_config.json", dict))
    for source in sources:
        value = source.get("eos_token_id")
        ids.update(v for v in (value if isinstance(value, list) else [value]) if type(v) is int)
    return frozenset(ids)
