"""LoRA adapters: loaded with the model, applied to a context."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from engineroom import ConfigurationError
from engineroom_llamacpp.library import last_error
from engineroom_llamacpp.metadata import NOT_COMPUTED, read_header
from engineroom_llamacpp.options import LlamaCppOptions

__all__ = ["Adapter", "load_adapters", "set_adapters"]


_STRING: Final = 8
_FLOAT32: Final = 6
_KINDS: Final = {
    "general.type": _STRING,
    "general.architecture": _STRING,
    "adapter.type": _STRING,
    "adapter.lora.alpha": _FLOAT32,
}
"""Types of values that llama.cpp takes for granted."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter in memory. It goes with the model that it was loaded for.

    :param name: what requests call it; ``None``: it applies to every request.
    """

    handle: Any
    scale: float
    name: str | None = None


def load_adapters(library: Any, model: Any, options: LlamaCppOptions) -> list[Adapter]:
    """Load the adapters of the options, in their order.

    :param model: llama.cpp's handle of the model, which owns them from here on.
    :raises ConfigurationError: there is no such file, or it is no adapter for the model.
    """
    adapters = []
    for adapter in options.lora:
        path = Path(adapter.path).expanduser()
        if not path.is_file():
            raise ConfigurationError(f"lora: there is no file {str(path)!r}; check the path")
        _check(path)
        handle = library.llama_adapter_lora_init(model, os.fsencode(path))
        if not handle:
            raise ConfigurationError(
                f"lora: llama.cpp cannot apply {str(path)!r} to this model: "
                f"{last_error('it does not say why')}; the adapter must be made for it"
            )
        adapters.append(Adapter(handle, adapter.scale, adapter.name))
    return adapters


def _check(path: Path) -> None:
    """Refuse what would end the process inside of llama.cpp."""
    header = read_header(path)
    for key, kind in _KINDS.items():
        if header.kinds.get(key, kind) != kind:
            raise ConfigurationError(
                f"lora: {str(path)!r} has a {key} of a type that adapters have not"
            )
    for tensor in header.tensors:
        if tensor.kind in NOT_COMPUTED:
            raise ConfigurationError(
                f"lora: {str(path)!r}: tensor {tensor.name[:80]!r} is of a type ({tensor.kind}) "
                "that no weights are of"
            )


def set_adapters(library: Any, context: Any, adapters: Sequence[Adapter]) -> None:
    """Apply these adapters, and no others, to what the context computes from now on.

    :raises ConfigurationError: llama.cpp cannot use them together.
    """
    count = len(adapters)
    handles = (library.llama_adapter_lora_p_ctypes * max(1, count))(
        *[adapter.handle for adapter in adapters]
    )
    scales = (ctypes.c_float * max(1, count))(*[adapter.scale for adapter in adapters])
    if library.llama_set_adapters_lora(context, handles, count, scales):
        raise ConfigurationError(
            f"lora: llama.cpp cannot use the adapters together: {last_error('it does not say why')}"
        )
