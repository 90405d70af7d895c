"""Fields of other servers' APIs, which clients send here as well, and what becomes of them.

A field that asks for something is honoured, under this server's name for it, or refused by name,
or it changes no answer: then the answer's header says that it was ignored. What an API's own schema
says of a field goes before what stands here. docs/server.md has the table, row by row.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass
from typing import Any, Final

from engineroom.server.http.errors import ApiError

__all__ = [
    "ALIASES",
    "IDLE",
    "IGNORED",
    "REFUSED",
    "USE_INSTEAD",
    "KnownFields",
    "aliases_of",
    "by_own_names",
    "is_neutral",
    "with_peers",
]

_LIMITS: Final = ("max_tokens", "max_output_tokens")

ALIASES: Final[Mapping[str, tuple[str, ...]]] = {
    "repeat_penalty": ("repetition_penalty",),
    "min_new_tokens": ("min_tokens",),
    "n_predict": _LIMITS,
    "num_predict": _LIMITS,
    "max_new_tokens": _LIMITS,
    "max_tokens": _LIMITS,
    "max_output_tokens": _LIMITS,
    "max_completion_tokens": _LIMITS,
    "n_cmpl": ("n",),
    "thinking_token_budget": ("reasoning_budget",),
    "thinking_budget_tokens": ("reasoning_budget",),
    "reasoning_budget_tokens": ("reasoning_budget",),
    "thinking_budget": ("reasoning_budget",),
}
"""Names that others have for a field → its name here: the first of these that the API has."""

REFUSED: Final[Mapping[str, Collection[Any]]] = {
    # vLLM's
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "logprob_token_ids": ([],),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "guided_whitespace_pattern": (),
    "add_special_tokens": (False,),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "documents": ([],),
    "chat_template": (),
    "logits_processors": ([],),
    "prompt_embeds": (),
    "repetition_detection": (),
    "watermarking": (False,),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "return_token_offsets": (False,),
    "return_prompt_text": (False,),
    "routed_experts_prompt_start": (0,),
    "mm_payload": (),
    "return_mm_kwargs": (False,),
    "kv_transfer_params": ({},),
    "ec_transfer_params": ({},),
    "vllm_xargs": ({},),
    "enable_response_messages": (False,),
    "previous_input_messages": ([],),
    # llama-server's
    "typical_p": (1.0,),
    "top_n_sigma": (-1.0, 0.0),
    "dynatemp_range": (0.0,),
    "xtc_probability": (0.0,),
    "dry_multiplier": (0.0,),
    "mirostat": (0,),
    "adaptive_target": (-1.0,),
    "repeat_last_n": (-1,),
    "min_keep": (0,),
    "samplers": ([],),
    "n_indent": (0,),
    "n_probs": (0,),
    "post_sampling_probs": (False,),
    "t_max_predict_ms": (0, -1),
    "return_tokens": (False,),
    "image_data": ([],),
    "lora": ([],),
    "grammar_lazy": (False,),
    "grammar_triggers": ([],),
    "preserved_tokens": ([],),
    "parse_tool_calls": (True,),
    "reasoning_format": ("auto", "deepseek"),
    "reasoning_in_content": (False,),
    "thinking_forced_open": (False,),
    # Ollama's
    "options": ({},),
    "think": (),
    "raw": (False,),
    "system": ("",),
    "template": ("",),
    "context": ([],),
    "images": ([],),
    "tfs_z": (1.0,),
    "penalize_newline": (True,),
    "penalize_nl": (True,),
    # of text-generation-webui, TGI and others
    "enable_thinking": (),
    "no_repeat_ngram_size": (0,),
    "top_a": (0.0,),
    "guidance_scale": (1.0,),
    "negative_prompt": ("",),
}
"""What no runtime is told → the values that ask for nothing. Any other is refused by name."""

USE_INSTEAD: Final[Mapping[str, str]] = {
    "use_beam_search": "use num_beams",
    "stop_token_ids": "use stop",
    "bad_words": "use logit_bias",
    "allowed_token_ids": "use logit_bias or structured_outputs",
    "guided_whitespace_pattern": "white space in JSON is the same for all",
    "documents": "use chat_template_kwargs.documents",
    "chat_template": "set the option chat_template of the model",
    "repeat_last_n": "repetition_penalty counts all of the text",
    "n_probs": "use logprobs",
    "t_max_predict_ms": "use timeout_s",
    "lora": "use adapter",
    "options": "send its parameters beside model",
    "think": "use reasoning_effort, reasoning.effort or thinking",
    "system": "send it as a message of role system",
    "enable_thinking": "use chat_template_kwargs.enable_thinking",
}
"""Some of these → what a client may do, if it is to do more than leave the field out."""

IGNORED: Final[Mapping[str, tuple[Collection[Any], str]]] = {
    "request_id": ((), "send the header x-request-id"),
    "session_id": ((), "no sessions are kept here"),
    "stream_interval": ((1,), "each step is sent as it comes"),
    "id_slot": ((-1,), "requests have no slots to choose from"),
    "cache_prompt": ((True,), "prefixes are found again; cache_salt keeps them apart"),
    "timings_per_token": ((False,), "/metrics has the times"),
    "return_progress": ((False,), "no progress is told while a prompt is read"),
    "response_fields": (([],), "the answer has all of its fields"),
    "sse_ping_interval": ((), "the server's --heartbeat says it"),
    "backend_sampling": ((False,), "where tokens are sampled is the runtime's affair"),
    "speculative.n_max": ((), "the model's options say how much is drafted"),
    "speculative.n_min": ((), "the model's options say how much is drafted"),
    "speculative.p_min": ((), "the model's options say how much is drafted"),
    "keep_alive": ((), "how long a model stays is the deployment's affair"),
    "num_ctx": ((), "the context is as large as the model was loaded with"),
    "num_keep": ((), "a prompt is never cut"),
    "n_keep": ((0, -1), "a prompt is never cut"),
    "n_discard": ((0,), "a prompt is never cut"),
}
"""What changes no text → the values that ask for nothing, and what the client is told otherwise."""

IDLE: Final = frozenset({
    "mirostat_tau", "mirostat_eta",
    "dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers",
    "xtc_threshold", "dynatemp_exponent", "adaptive_decay",
    "truncation_side", "media_io_kwargs", "mm_processor_kwargs", "guided_decoding_backend",
})  # fmt: skip
"""What says how to do something that is refused, and nothing where it is not asked for; or which
of several ways to do it, where there is one."""


def is_neutral(value: Any, neutral: Collection[Any]) -> bool:
    """Whether a value asks for nothing: ``1`` is as good as ``1.0``, and neither is ``true``."""
    if value is None:
        return True
    return any(
        value == other and isinstance(value, bool) is isinstance(other, bool) for other in neutral
    )


@dataclass(frozen=True, slots=True)
class KnownFields:
    """What becomes of the fields that an API does not honour.

    :param refused: by name, unless their value asks for nothing.
    :param ignored: the client is told so, unless their value asks for nothing.
    :param idle: they say nothing here.
    """

    refused: Mapping[str, Collection[Any]]
    ignored: Mapping[str, tuple[Collection[Any], str]]
    idle: Collection[str]


def with_peers(fields: Collection[str], own: KnownFields) -> KnownFields:
    """What becomes of others' fields as well.

    :param fields: those that the API honours.
    :param own: what it says itself of further ones.
    """
    known = {*fields, *own.refused, *own.ignored, *own.idle}
    return KnownFields(
        {**{n: v for n, v in REFUSED.items() if n not in known}, **own.refused},
        {**{n: v for n, v in IGNORED.items() if n not in known}, **own.ignored},
        {*(IDLE - known), *own.idle},
    )


def aliases_of(fields: Set[str]) -> dict[str, str]:
    """What others call the API's fields → the API's name, where that is another.

    :param fields: those that it honours or refuses.
    """
    return {
        name: next(own for own in owns if own in fields)
        for name, owns in ALIASES.items()
        if name not in fields and not fields.isdisjoint(owns)
    }


def by_own_names(
    raw: dict[str, Any], aliases: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The body with the API's own names, and what the client called them.

    :param aliases: of :func:`aliases_of`.
    :raises ApiError: 400: one field has two values.
    """
    names = {name: own for name in raw if (own := aliases.get(name)) is not None}
    if not names:
        return raw, {}
    body = {name: value for name, value in raw.items() if name not in names}
    called: dict[str, str] = {}
    for name, own in names.items():
        if (value := raw[name]) is None:
            continue
        nested = isinstance(value, list | dict)  # so deep, maybe, that it cannot be compared
        if (other := body.get(own)) is not None and (nested or other != value):
            both = f"{called.get(own, own)} and {name} contradict each other; give one of them"
            raise ApiError(400, both, "invalid_value", name)
        body[own], called[own] = value, name
    return body, called
