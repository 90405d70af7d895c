"""What fails in a load, as typed errors that say what to do."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from engineroom import ConfigurationError, EngineRoomError, ResourceNotAvailableError
from engineroom_hf_transformers.checkpoint import Checkpoint
from engineroom_hf_transformers.options import HfTransformersOptions
from engineroom_hf_transformers.sizes import estimate_bytes

__all__ = ["has", "short", "typed_errors"]

logger = logging.getLogger("engineroom.hf_transformers")

_LIBRARIES: Final[Mapping[str, str]] = {
    "bitsandbytes": "bitsandbytes accelerate", "bitsandbytes_4bit": "bitsandbytes accelerate",
    "bitsandbytes_8bit": "bitsandbytes accelerate", "gptq": "gptqmodel optimum",
    "awq": "gptqmodel", "hqq": "hqq", "torchao": "torchao", "quanto": "optimum-quanto accelerate",
    "compressed-tensors": "compressed-tensors", "eetq": "kernels accelerate",
    "aqlm": "aqlm accelerate", "higgs": "flute-kernel", "auto-round": "auto-round",
    "spqr": "spqr-quant", "fbgemm_fp8": "fbgemm-gpu", "quark": "amd-quark",
}  # fmt: skip
"""Method of quantisation → what to install."""


@contextmanager
def typed_errors(checkpoint: Checkpoint, options: HfTransformersOptions) -> Iterator[None]:
    """Make what the libraries raise inside our own errors.

    :raises ConfigurationError: the checkpoint cannot be loaded, or not without another library.
    :raises ResourceNotAvailableError: there is no memory for it.
    """
    try:
        yield
    except EngineRoomError:
        raise
    except ImportError as error:
        raise ConfigurationError(
            f"{str(checkpoint.path)!r} needs a library that is not installed: {short(error)}; "
            + _install(checkpoint, options, error)
        ) from error
    except Exception as error:  # what a checkpoint of unknown origin can make the library raise
        if _is_out_of_memory(error):
            needed = sum(estimate_bytes(checkpoint, options).values())
            raise ResourceNotAvailableError(
                f"there is no memory for {str(checkpoint.path)!r}, which needs about "
                f"{needed / 2**30:.2f} GiB ({needed} bytes) with its cache; unload other models, "
                "or set max_context, max_batch_size, dtype or quantization lower"
            ) from error
        logger.debug("loading %s failed", checkpoint.path, exc_info=True)
        raise ConfigurationError(
            f"transformers cannot load {str(checkpoint.path)!r}: {short(error)}"
        ) from error


def _install(checkpoint: Checkpoint, options: HfTransformersOptions, error: ImportError) -> str:
    stored = checkpoint.config.get("quantization_config")
    settings = options.quantization or (stored if isinstance(stored, dict) else {})
    method = str(settings.get("quant_method") or ("bitsandbytes" if settings else ""))
    if checkpoint.format == "gguf":
        return 'pip install "engineroom-hf-transformers[gguf]"'
    if "accelerate" in str(error) and method not in _LIBRARIES:
        return 'pip install "engineroom-hf-transformers[multi-gpu]"'
    if method:
        return f"pip install {_LIBRARIES.get(method, method)}"
    return f"pip install {error.name}" if error.name else "install it"


def _is_out_of_memory(error: Exception) -> bool:
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # The CPU's allocator has no error of its own.
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "not enough memory" in text or "can't allocate memory" in text or "out of memory" in text
    )


def short(error: BaseException) -> str:
    """An error's words on one line; the libraries' can be screens long."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 400 else words[:400].rstrip() + " …"


def has(module: str) -> bool:
    """Whether a library is installed."""
    from importlib.util import find_spec

    return find_spec(module) is not None
