"""The contract's parameters in vLLM's words, and what vLLM has no word for. Pure.

vLLM samples in this order: bias, penalties, temperature, ``min_p``, ``top_k``, ``top_p``. The
contract has ``min_p`` last. With ``top_k`` that makes no difference, since both keep the
likeliest; ``top_p`` would count the rest anew, so the two together are refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Final

from engineroom import ConfigurationError, GenerationParams
from engineroom.prompts import check_beams, check_token_ids

__all__ = ["beam_search", "check_params", "sampling_arguments", "stops_alone"]

_COLDEST: Final = 0.01
"""vLLM computes no temperature below this one."""
_STRONGEST: Final = 1e30
"""Largest repetition penalty: logits times this are still numbers in single precision."""
_WITHOUT_BEAMS: Final = (
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "structured_output",
)
"""What changes the choice of beams; ``top_k`` and the like change nothing where the likeliest is
taken."""


def beam_search(params: GenerationParams) -> bool:
    """Whether the request asks for beams."""
    return (params.num_beams or 1) > 1


def check_params(params: GenerationParams, n_vocab: int, *, speculative: bool = False) -> None:
    """Refuse what vLLM would do otherwise than the contract says, or not at all.

    :param n_vocab: tokens that the model has.
    :param speculative: the model runs with speculative decoding.
    :raises ConfigurationError: names the parameters and what to do instead.
    """
    check_token_ids(n_vocab, bias=params.logit_bias)
    if params.min_p and params.top_p not in (None, 1.0) and not params.greedy:
        raise ConfigurationError(
            "min_p together with top_p: vLLM applies min_p first, engineroom last, which keeps "
            "other tokens; leave one of them out, or use another runtime"
        )
    if speculative and (params.min_p or params.logit_bias):
        name = "min_p" if params.min_p else "logit_bias"
        raise ConfigurationError(
            f"{name}: vLLM ignores it with speculative decoding; leave it out, or load the model "
            "without speculative_config"
        )
    if beam_search(params):
        _check_beams(params)


def _check_beams(params: GenerationParams) -> None:
    if not params.greedy:
        raise ConfigurationError(
            "num_beams with sampling (beam sampling): vLLM has none; set do_sample=False or "
            "temperature=0, or use hf_transformers"
        )
    check_beams(params.num_beams)
    asked = [name for name in _WITHOUT_BEAMS if name in params.requested()]
    if asked:
        raise ConfigurationError(
            f"num_beams together with {', '.join(asked)}: vLLM's beams are searched by the model's "
            "own probabilities; leave it out, or use hf_transformers"
        )


def sampling_arguments(
    params: GenerationParams,
    *,
    room: int,
    n_vocab: int,
    stop_token_ids: Sequence[int] = (),
    written: int = 0,
) -> dict[str, Any]:
    """Arguments of vLLM's ``SamplingParams``, without ``structured_outputs``.

    :param room: tokens that the context has left for the answer.
    :param n_vocab: tokens that the model has.
    :param stop_token_ids: tokens with which the generation may end at once.
    :param written: tokens of the answer that were generated before.
    """
    limit = params.max_new_tokens
    most = room if limit is None else min(limit, room)
    least = min(max(params.least_tokens - written, 0), most)
    temperature = 1.0 if params.temperature is None else params.temperature
    if temperature < _COLDEST / 2:
        temperature = 0.0
    top_p = 1.0 if params.top_p is None else params.top_p
    greedy = params.greedy or temperature == 0.0 or top_p == 0.0
    arguments: dict[str, Any] = {
        "max_tokens": most,
        # Until then vLLM lets no end-of-sequence token come, and none of the stop tokens, which
        # may be any text: core finds them in it.
        "min_tokens": least,
        "temperature": 0.0 if greedy else max(temperature, _COLDEST),
        "repetition_penalty": min(params.repetition_penalty or 1.0, _STRONGEST),
        "presence_penalty": params.presence_penalty or 0.0,
        "frequency_penalty": params.frequency_penalty or 0.0,
        "logit_bias": dict(params.logit_bias) if params.logit_bias else None,
        "logprobs": params.logprobs,
        "prompt_logprobs": params.prompt_logprobs,
        "stop_token_ids": [] if least else list(stop_token_ids),
    }
    if not greedy:
        top_k = params.top_k or 0
        arguments |= {
            "top_p": top_p,
            "top_k": top_k if top_k < n_vocab else 0,
            "min_p": params.min_p or 0.0,
            "seed": params.seed,
        }
    return arguments


def stops_alone(stops: Sequence[str]) -> list[str]:
    """Stop sequences after which nothing that follows can change the result.

    Of two matches the one that starts first counts. A stop sequence in the middle of another
    therefore has to wait for what follows; one that is in the middle of none does not.
    """
    used = set().union(*stops)
    between = next(letter for letter in map(chr, itertools.count()) if letter not in used)
    middles = between.join(stop[1:-1] for stop in stops)
    return [stop for stop in dict.fromkeys(stops) if stop not in middles]
