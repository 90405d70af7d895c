"""What fails in a step, as errors for the requests that were in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engineroom import EngineRoomError, InferenceError, ResourceNotAvailableError
from engineroom.engine import NoNumbersError

if TYPE_CHECKING:
    import torch

__all__ = ["nonsense", "step_error"]


def step_error(error: Exception, device: torch.device) -> EngineRoomError:
    """What a request hears of a step that failed on ``device``."""
    if isinstance(error, NoNumbersError):
        return nonsense()
    if _is_out_of_memory(error):
        return ResourceNotAvailableError(
            f"there was no memory left for the step on {device}; send it again "
            "later, or load the model with a smaller max_batch_size or max_context"
        )
    return InferenceError(
        f"the model failed in a step: {type(error).__name__}: {_first_line(error)}"
    )


def nonsense() -> InferenceError:
    """What a request hears whose next token cannot be chosen."""
    return InferenceError(
        "the model computed no numbers for the next token (NaN or infinity); its weights are "
        "damaged, or its dtype is too narrow: load it with dtype: float32 or bfloat16"
    )


def _is_out_of_memory(error: Exception) -> bool:
    import torch

    # On CPUs and Apple's GPUs torch has no class for it.
    said = ("DefaultCPUAllocator", "MPS backend out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in said)
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "it does not say why")
