"""What lies at a source, found and checked without loading it.

Models come from anyone: what is no model, is damaged, points outside of its folder or may run
code of its own is refused here, with a typed error, before a library opens it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Final, Literal, NoReturn, TypeAlias

from engineroom import ConfigurationError, ModelConfig, resolve_source
from engineroom.sources import (
    HubSource,
    PathSource,
    Source,
    gguf_part_paths,
    is_gguf,
    parse_source,
    part_names,
    read_gguf_header,
    read_json,
    read_safetensors_header,
)
from engineroom_hf_transformers.options import HfTransformersOptions

__all__ = ["Checkpoint", "find_checkpoint", "looks_native"]

logger = logging.getLogger("engineroom.hf_transformers")

Format: TypeAlias = Literal["safetensors", "pickle", "gguf"]

_MAX_INDEX: Final = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on this machine.

    :param path: its folder, or its GGUF file.
    :param config: what ``config.json`` says; of a GGUF file its metadata, under the same names.
    :param weights: the files that hold its weights.
    :param values: how many numbers it has of each type, as safetensors names types; a GGUF file's
        are all counted as ``F32``, the type that they are unpacked to.
    """

    path: Path
    format: Format
    config: Mapping[str, Any]
    weights: tuple[Path, ...]
    values: Mapping[str, int] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self.path.parent if self.format == "gguf" else self.path


# ── finding ──────────────────────────────────────────────────────────────────────────────────


def looks_native(config: ModelConfig) -> bool:
    """Whether a source has the form that this runtime is for. Nothing is downloaded.

    A folder with ``config.json`` and weights, a safetensors file in one, or a repository on the
    hub. Never a GGUF file: llama.cpp's own format is loaded here only by a deployment that names
    this runtime.
    """
    try:
        source = parse_source(config.source or "")
        if isinstance(source, HubSource):
            return source.file is None or source.file.lower().endswith(".safetensors")
        path = resolve_source(source)
        if path.is_file() and path.suffix == ".safetensors":
            path = path.parent
        return (path / "config.json").is_file() and _weights_of(path) is not None
    except (LookupError, ValueError, OSError):  # ours among them
        return False


def find_checkpoint(source: str, options: HfTransformersOptions) -> Checkpoint:
    """The model that a source stands for, downloaded first if it is on the hub. Blocks.

    :raises ModelNotFoundError: there is no such path or repository.
    :raises ConfigurationError: what is there is damaged, no model, or may not be loaded without
        an option that is not set.
    """
    parsed = _with_revision(parse_source(source), options.revision)
    if isinstance(parsed, HubSource) and parsed.file and not parsed.file.endswith(".gguf"):
        parsed = HubSource(parsed.repo, parsed.revision, None)  # one file of a model is no model
    path = resolve_source(parsed)
    if path.is_file():
        if path.suffix == ".safetensors":
            path = path.parent
        elif is_gguf(path):
            header = read_gguf_header(path)
            if (files := len(gguf_part_paths(path))) > 1:
                raise ConfigurationError(
                    f"{str(path)!r} is a model in {files} files, of which Transformers would read "
                    "the first one only; merge them (llama-gguf-split --merge), or use llamacpp"
                )
            count = sum(math.prod(tensor.shape) for tensor in header.tensors)
            return Checkpoint(path, "gguf", header.config(), (path,), {"F32": count})
        else:
            raise ConfigurationError(
                f"{str(path)!r} is neither a folder with config.json and safetensors files nor a "
                "GGUF file; give the model's folder"
            )
    return _folder(path, options)


def _with_revision(source: Source, revision: str | None) -> Source:
    if revision is None:
        return source
    if not isinstance(source, HubSource):
        where = source.path if isinstance(source, PathSource) else source.file
        raise ConfigurationError(
            f"revision={revision!r} is for models on the hub, but {str(where)!r} is on this "
            "machine; remove the option, or write hf:owner/name"
        )
    if source.revision not in {None, revision}:
        raise ConfigurationError(
            f"source says revision {source.revision!r} of {source.repo}, and the option revision "
            f"says {revision!r}; give one of them"
        )
    return HubSource(source.repo, revision, source.file)


def _folder(folder: Path, options: HfTransformersOptions) -> Checkpoint:
    config = _model_config(folder)
    if (folder / "adapter_config.json").exists():
        # Transformers would load the model that the adapter names, from wherever that is.
        raise ConfigurationError(
            f"{str(folder)!r} is a model and an adapter at once; move adapter_config.json away to "
            "load the model, and give an adapter's folder as the option adapter"
        )
    if config.get("auto_map") and options.trust_remote_code:
        logger.warning("%s: running the Python code that comes with the model", folder)
    if not isinstance(config.get("model_type"), str):
        _refuse(folder / "config.json", "it does not say its model_type")
    architectures = config.get("architectures")
    if not (
        isinstance(architectures, list)
        and architectures
        and all(isinstance(name, str) for name in architectures)
    ):
        _refuse(
            folder / "config.json",
            "it names no architectures, so that nobody knows what the weights are for; add the "
            'class that they were saved from, e.g. "architectures": ["LlamaForCausalLM"]',
        )
    stored = _weights_of(folder)
    if stored is None:
        names = sorted(f.name for f in folder.iterdir() if f.is_file())
        if parts := [n for n in names if n.endswith(".safetensors") and len(part_names(n)) > 1]:
            raise ConfigurationError(
                f"{str(folder)!r} has {', '.join(parts[:12])}, but not their index, "
                "model.safetensors.index.json; download or copy that, too"
            )
        files = ", ".join(names[:12])
        raise ConfigurationError(
            f"{str(folder)!r} has no weights: neither model.safetensors nor an index of several "
            f"(it has {files}); download it again"
        )
    kind, first = stored
    if kind == "pickle" and not options.allow_pickle:
        raise ConfigurationError(
            f"{str(folder)!r} has no safetensors, only {first.name}: reading pickled weights may "
            "run code that comes with them. Convert them to safetensors, or set the option "
            "allow_pickle: true if you trust where they come from"
        )
    weights = _shards(first) if first.suffix == ".json" else (first,)
    if kind == "pickle":
        logger.warning("%s: unpickling the weights, which may run code that is in them", folder)
        return Checkpoint(folder, kind, config, weights)
    values: dict[str, int] = {}
    for path in weights:
        for dtype, count in read_safetensors_header(path).values.items():
            values[dtype] = values.get(dtype, 0) + count
    return Checkpoint(folder, kind, config, weights, values)


def _model_config(folder: Path) -> dict[str, Any]:
    if (folder / "config.json").is_file():
        return read_json(folder / "config.json", dict)
    if (folder / "adapter_config.json").is_file():
        raise ConfigurationError(
            f"{str(folder)!r} is an adapter, not a model; give the model that it was made for as "
            "source, and this folder as the option adapter"
        )
    raise ConfigurationError(
        f"{str(folder)!r} has no config.json, so it is no model of Transformers; give the folder "
        "that save_pretrained() wrote or the hub has, or the full name of a GGUF file"
    )


def _weights_of(folder: Path) -> tuple[Format, Path] | None:
    """The file of all weights or their index, by the names that Transformers looks for."""
    names: dict[str, Format] = {
        "model.safetensors": "safetensors",
        "model.safetensors.index.json": "safetensors",
        "pytorch_model.bin": "pickle",
        "pytorch_model.bin.index.json": "pickle",
    }
    for name, kind in names.items():
        if (folder / name).is_file():
            return kind, folder / name
    return None


def _shards(index: Path) -> tuple[Path, ...]:
    weight_map = read_json(index, dict, limit=_MAX_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        _refuse(index, "it has no weight_map")
    names = set(weight_map.values())
    for name in names:
        if not isinstance(name, str) or not _inside(name):
            _refuse(index, f"it points outside of its folder, to {str(name)[:80]!r}")
    paths = tuple(index.parent / name for name in sorted(names))
    if missing := [path.name for path in paths if not path.is_file()]:
        _refuse(index, f"of its files, {', '.join(missing[:8])} is not there")
    return paths


def _refuse(path: Path, why: str) -> NoReturn:
    raise ConfigurationError(f"{str(path)!r} cannot be used: {why}")


def _inside(name: str) -> bool:
    # By the name alone: files of the hub's cache are links to elsewhere.
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        if path.anchor or ".." in path.parts or not path.parts:
            return False
    return "\0" not in name
