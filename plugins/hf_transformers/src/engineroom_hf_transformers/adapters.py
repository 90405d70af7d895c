"""Adapters of PEFT: checked before they are loaded, and put into a model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from engineroom import ConfigurationError
from engineroom.sources import read_json, read_safetensors_header
from engineroom_hf_transformers.load_errors import has, short
from engineroom_hf_transformers.options import HfTransformersOptions

__all__ = ["adapter_folder", "with_adapter"]

logger = logging.getLogger("engineroom.hf_transformers")


def adapter_folder(options: HfTransformersOptions) -> Path | None:
    """The adapter's folder, its files checked; ``None``: none is wanted.

    :raises ConfigurationError: it is no adapter, damaged, not safe, or PEFT is not installed.
    """
    if options.adapter is None:
        return None
    folder = Path(options.adapter).expanduser()
    if not folder.is_dir():
        raise ConfigurationError(f"adapter: there is no folder {str(folder)!r}; check the path")
    if not (folder / "adapter_config.json").is_file():
        raise ConfigurationError(
            f"adapter: {str(folder)!r} has no adapter_config.json, so it is no adapter of PEFT"
        )
    read_json(folder / "adapter_config.json", dict)
    weights = folder / "adapter_model.safetensors"
    if weights.is_file():
        read_safetensors_header(weights)
    elif not (folder / "adapter_model.bin").is_file():
        raise ConfigurationError(f"adapter: {str(folder)!r} has no {weights.name}")
    elif not options.allow_pickle:
        raise ConfigurationError(
            f"adapter: {str(folder)!r} has no {weights.name}, only pickled weights, and reading "
            "those may run code that comes with them; convert them, or set the option "
            "allow_pickle: true if you trust where they come from"
        )
    else:
        logger.warning("%s: unpickling the adapter, which may run code that is in it", folder)
    if not has("peft"):
        raise ConfigurationError(
            'adapter: this needs peft; pip install "engineroom-hf-transformers[adapters]"'
        )
    return folder


def with_adapter(model: Any, folder: Path, options: HfTransformersOptions) -> Any:
    """The model with an adapter, merged into its weights where that can be done.

    :raises ConfigurationError: it does not fit the model.
    """
    from peft import PeftModel

    try:
        adapted: Any = PeftModel.from_pretrained(model, str(folder), is_trainable=False)
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # the adapter decides which of PEFT's classes complain
        raise ConfigurationError(
            f"adapter: {str(folder)!r} does not fit this model: {short(error)}"
        ) from error
    merge = getattr(adapted, "merge_and_unload", None)
    if merge is None or options.quantization is not None:
        return adapted  # prompts of its own, or weights that lose by being quantised anew
    try:
        return merge()
    except (NotImplementedError, ValueError, AttributeError) as error:
        logger.info("adapter %s is applied in every step: %s", folder, short(error))
        return adapted
