"""In an engine's process: log probabilities as the model gave them, under a grammar as well.

vLLM rules out in place what a grammar does not let follow, before it works out log probabilities.
They would be those among what may follow: 0 for a token without a choice, and minus infinity for
alternatives that the model liked better.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, Final

__all__ = ["install_unmasked", "keeping", "of_kept"]

_MASKS: Final = "vllm.v1.structured_output.utils"
_RUNNER: Final = "vllm.v1.worker.gpu_model_runner"
"""The one of CPUs, too. It has the function under its own name once it is imported."""
_SAMPLER: Final = "vllm.v1.sample.sampler"
_KEPT: Final = "_engineroom_unmasked"


def install_unmasked() -> None:
    """Keep logits from before they are masked, where log probabilities are asked for.

    Harmless when done twice.
    """
    masks: Any = importlib.import_module(_MASKS)
    sampler: Any = importlib.import_module(_SAMPLER)
    if hasattr(masks.apply_grammar_bitmask, _KEPT):
        return
    own = masks.apply_grammar_bitmask
    kept = keeping(own)
    for module in (masks, sys.modules.get(_RUNNER)):
        if getattr(module, "apply_grammar_bitmask", None) is own:
            setattr(module, "apply_grammar_bitmask", kept)  # noqa: B010 - of a type unknown here
    sampler.Sampler.compute_logprobs = staticmethod(of_kept(sampler.Sampler.compute_logprobs))


def keeping(apply_mask: Callable[..., None]) -> Callable[..., None]:
    """VLLM's function that masks a step's logits; a copy of them goes along with them."""

    @wraps(apply_mask)
    def apply(scheduled: Any, grammars: Any, input_batch: Any, logits: Any) -> None:
        unmasked = logits.clone() if input_batch.num_logprobs else None
        apply_mask(scheduled, grammars, input_batch, logits)
        if unmasked is not None:
            setattr(logits, _KEPT, unmasked)

    setattr(apply, _KEPT, True)
    return apply


def of_kept(compute: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """VLLM's function from logits to log probabilities; takes the copy, where there is one."""

    @wraps(compute)
    def compute_logprobs(logits: Any) -> Any:
        return compute(getattr(logits, _KEPT, logits))

    return compute_logprobs
