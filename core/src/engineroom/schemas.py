"""What goes in: the same on every runtime. What comes out is in :mod:`engineroom.responses`.

Every schema refuses unknown fields. ``None`` always means the neutral value (no limit but the
context, temperature 1, no truncation, no penalty), never a default of the runtime or of the
model's files.
"""

from __future__ import annotations

import hashlib
import sys
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, Self, TypeAlias

from pydantic import ConfigDict, Field, PrivateAttr, model_validator

from engineroom.field_types import (
    FewFields,
    Float,
    FrozenSchema,
    Identifier,
    Int,
    JsonObject,
    LogitBias,
    MessageCalls,
    NotEmpty,
    OrDefault,
    Text,
    Texts,
    TokenId,
)
from engineroom.responses import (
    FINISH_REASONS,
    FinishReason,
    InferenceResponse,
    PromptLogprob,
    TokenLogprob,
)
from engineroom.thinking import contradictions, told_to_template
from engineroom.tools import NamedTool, ToolChoice, Tools, tool_names

__all__ = [
    "FINISH_REASONS",
    "MAX_GRAMMAR_CHARS",
    "MAX_LITERAL_CHARS",
    "MAX_STOP_CHARS",
    "STRUCTURED_KINDS",
    "ChatMessage",
    "FinishReason",
    "FrozenSchema",
    "GenerationParams",
    "InferenceRequest",
    "InferenceResponse",
    "OnUnsupported",
    "PrefixCacheScope",
    "PromptLogprob",
    "ReasoningEffort",
    "RequestKind",
    "StructuredOutput",
    "TokenLogprob",
]

ReasoningEffort: TypeAlias = Literal["minimal", "low", "medium", "high"]

OnUnsupported: TypeAlias = Literal["error", "warn"]

PrefixCacheScope: TypeAlias = Literal["key", "shared"]
"""Who finds again what an engine has computed of a prompt: requests of the same key, or all."""

MAX_STOP_CHARS: Final = 16_384
"""Most characters that all stop sequences of a request may have together: the automaton that
looks for them costs some hundred bytes a character, and a request may come from anyone."""

MAX_GRAMMAR_CHARS: Final = 262_144
"""Most characters of a grammar, a JSON schema, or all choices together."""
MAX_LITERAL_CHARS: Final = 16_384
"""Most characters of a regular expression, or of one text in a grammar, schema or choice: what may
come next costs the thread that decodes a time that grows with them."""
MAX_CHOICES: Final = 10_000


STRUCTURED_KINDS: Final = ("json_schema", "json_object", "regex", "choice", "grammar")
"""What a text may be asked to match, of which a request has one."""

_Literal = Annotated[Text, Field(min_length=1, max_length=MAX_LITERAL_CHARS)]
_Grammar = Annotated[Text, Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)]


class StructuredOutput(FewFields, FrozenSchema):
    """What the text must match: exactly one of these."""

    json_schema: JsonObject | bool | None = None
    """JSON that is valid by this schema; its keys come in the schema's order."""
    json_object: Literal[True] | None = None
    """Any JSON object."""
    regex: _Literal | None = None
    """A regular expression that the whole text matches."""
    choice: (
        Annotated[
            list[_Literal],
            Field(fail_fast=True, min_length=1, max_length=MAX_CHOICES),
        ]
        | None
    ) = None
    """One of these texts."""
    grammar: _Grammar | None = None
    """A grammar in Lark, as llguidance reads it, or in GBNF (its rules have ``::=``)."""

    @model_validator(mode="after")
    def _exactly_one(self) -> StructuredOutput:
        present = [name for name in STRUCTURED_KINDS if getattr(self, name) is not None]
        if len(present) != 1:
            raise ValueError(
                f"give exactly one of {', '.join(STRUCTURED_KINDS)}; "
                + (f"got {' and '.join(present)}" if present else "got none of them")
            )
        if sum(map(len, self.choice or ())) > MAX_GRAMMAR_CHARS:
            raise ValueError(f"choice may have {MAX_GRAMMAR_CHARS} characters together")
        return self

    @property
    def kind(self) -> str:
        """Which of them it is."""
        return next(name for name in STRUCTURED_KINDS if getattr(self, name) is not None)


class GenerationParams(FewFields, FrozenSchema):
    """How to generate. A runtime honours each field, refuses it by name or warns about it.

    The order in which sampling applies them is the same everywhere: ``logit_bias``,
    penalties, ``temperature``, ``top_k``, ``top_p``, ``min_p``.
    """

    max_new_tokens: Annotated[Int, Field(ge=0)] | None = 256
    """Most tokens to generate; 0: none, the prompt is read and that is all; ``None``: until the
    context is full."""
    min_tokens: Annotated[Int, Field(ge=0)] | None = None
    """Before so many tokens no end-of-sequence token comes, and no stop sequence ends the text.
    A form that the answer must match ends it all the same."""
    ignore_eos: bool | None = None
    """No end-of-sequence token ever comes: the text goes on to its limit, to a stop sequence, or
    to the end of its form."""
    temperature: Annotated[Float, Field(ge=0.0, le=2.0)] | None = 0.7
    """0 is greedy; ``None`` is 1."""
    top_p: Annotated[Float, Field(ge=0.0, le=1.0)] | None = None
    """Keep the smallest set of most likely tokens that has at least this probability (the most
    likely one is always kept); ``None`` and 1 keep all."""
    top_k: Annotated[Int, Field(ge=0)] | None = None
    """Keep the k most likely tokens; ``None`` and 0 keep all."""
    repetition_penalty: Annotated[Float, Field(ge=1.0)] | None = None
    """Divide positive and multiply negative logits of tokens of the prompt and of the text so
    far by this (Keskar et al., 2019, arXiv:1909.05858); ``None`` and 1 change nothing."""
    do_sample: bool | None = True
    """``False`` is greedy (or plain beam search); ``None`` is ``True``."""
    num_beams: Annotated[Int, Field(ge=1)] | None = 1
    """Beams to search with; ``None`` and 1: no beam search."""
    early_stopping: bool | None = False
    """With beams: end as soon as ``num_beams`` complete candidates exist."""
    min_p: Annotated[Float, Field(ge=0.0, le=1.0)] | None = None
    """Keep tokens that are at least this fraction as likely as the likeliest one."""
    seed: Annotated[Int, Field(ge=0, le=2**63 - 1)] | None = None
    """Seed of the request's own random generator; ``None``: a fresh one."""
    presence_penalty: Annotated[Float, Field(ge=-2.0, le=2.0)] | None = None
    """Subtracted from the logit of every token that the generated text has."""
    frequency_penalty: Annotated[Float, Field(ge=-2.0, le=2.0)] | None = None
    """Subtracted, times its count, from the logit of every token of the generated text."""
    logit_bias: LogitBias | None = None
    """Added to the logits: token id → bias."""
    logprobs: Annotated[Int, Field(ge=0, le=20)] | None = None
    """Report each token's log probability, and those of this many likeliest alternatives, as
    the model gave them (before bias, penalties and temperature)."""
    prompt_logprobs: Annotated[Int, Field(ge=0, le=20)] | None = None
    """Report the same of the prompt's tokens: how likely each was behind those before it. Not with
    ``num_beams``."""
    structured_output: StructuredOutput | None = None
    """What the text must match."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.prompt_logprobs is not None and (self.num_beams or 1) > 1:
            raise ValueError("prompt_logprobs cannot be told with num_beams; leave one of them out")
        least, most = self.min_tokens or 0, self.max_new_tokens
        if most is not None and least > most:
            raise ValueError(f"min_tokens ({least}) is more than the limit of {most} tokens")
        return self

    @property
    def greedy(self) -> bool:
        """True where the likeliest token is always taken."""
        return self.do_sample is False or self.temperature == 0 or self.top_k == 1

    @property
    def least_tokens(self) -> int:
        """Before so many tokens no end-of-sequence token may come."""
        return sys.maxsize if self.ignore_eos else self.min_tokens or 0

    def requested(self) -> frozenset[str]:
        """Fields whose value asks for something that a runtime must know how to do.

        Fields at their default or at their neutral value ask for nothing.
        """
        return frozenset(
            name
            for name, default in _PARAM_DEFAULTS.items()
            if (value := getattr(self, name)) != default
            and value not in _NEUTRAL.get(name, (None,))
        )


_PARAM_DEFAULTS: Final[Mapping[str, Any]] = {
    name: field.default for name, field in GenerationParams.model_fields.items()
}
_OFF_AT_0: Final = ("min_tokens", "top_k", "min_p", "presence_penalty", "frequency_penalty")
_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    **dict.fromkeys(("max_new_tokens", "temperature"), ()),
    **dict.fromkeys(("top_p", "repetition_penalty", "num_beams"), (None, 1)),
    **dict.fromkeys(_OFF_AT_0, (None, 0)),
    **dict.fromkeys(("ignore_eos", "early_stopping"), (None, False)),
    "do_sample": (None, True),
    "logit_bias": (None, {}),
}


class ChatMessage(FewFields, FrozenSchema):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | None = None
    name: Text | None = None
    tool_calls: MessageCalls | None = None
    tool_call_id: Text | None = None
    reasoning: Text | None = None
    """What the assistant thought before this message; templates show it or leave it out."""

    @model_validator(mode="after")
    def _has_content(self) -> ChatMessage:
        if self.content is None and not self.tool_calls:
            raise ValueError(f"the {self.role} message has no content")
        return self


INPUTS: Final = ("prompt", "prompt_token_ids", "messages")
"""What a request may ask to be continued, of which it has one."""


_ONE_INPUT: Final[list[Any]] = [
    {"required": [name], "properties": {name: {"not": {"type": "null"}}}} for name in INPUTS
]

RequestKind: TypeAlias = Literal["generate", "embed", "count", "tokenize", "detokenize", "rerank"]
"""What is asked of a model."""


class InferenceRequest(FewFields, FrozenSchema):
    """One request to one model: a ``prompt`` as it stands, its tokens, or chat ``messages``."""

    model_config = ConfigDict(json_schema_extra={"oneOf": _ONE_INPUT})
    kind: ClassVar[RequestKind] = "generate"
    model_id: Identifier
    prompt: Text | None = None
    """Text to continue, taken as it is: no chat template is applied."""
    prompt_token_ids: Annotated[list[TokenId], Field(fail_fast=True, min_length=1)] | None = None
    """A prompt as token ids of the model's own vocabulary, taken as they are: nothing is added,
    no token of the beginning either."""
    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1)] | None = None
    """A conversation, rendered with the model's own chat template."""
    params: Annotated[GenerationParams, OrDefault] = GenerationParams()
    stream: Annotated[bool, OrDefault] = False
    request_id: Annotated[Identifier, OrDefault] = Field(default_factory=lambda: str(uuid.uuid4()))
    stop_sequences: Annotated[list[NotEmpty], Field(fail_fast=True)] | None = None
    """Texts that end the generation; they are not part of the generated text."""
    timeout_s: Annotated[Float, Field(gt=0)] | None = None
    """Seconds from the call to the last token, waiting and loading included."""
    priority: Annotated[Int, Field(ge=-100, le=100), OrDefault] = 0
    """Waiting requests of a higher priority go first; two seconds of waiting are worth one step of
    it, so that nobody waits for ever."""
    tools: Tools | None = None
    """Tools that the model may call, in OpenAI's form; with ``messages`` only."""
    tool_choice: ToolChoice | None = None
    """Whether it is to call them; ``None``: as it likes (``auto``), where there are tools."""
    parallel_tool_calls: bool | None = None
    """``False``: one call at most; ``None`` and ``True``: as many as it likes."""
    template_args: JsonObject | None = None
    """More names for the model's chat template, ``{"enable_thinking": False}`` for instance."""
    continue_final_message: bool | None = None
    """Whether the last message, one of the assistant's, is continued; ``False``: a new one begins
    behind it. ``None``: it is continued, unless it is another's or calls tools."""
    reasoning: bool | ReasoningEffort | None = None
    """Whether the model thinks before it answers, or how hard; ``None``: its own way. A model that
    cannot be told is asked in vain, with a warning."""
    reasoning_budget: Annotated[Int, Field(ge=0)] | None = None
    """Most tokens of reasoning; then it is ended and the answer begins."""
    adapter: Identifier | None = None
    """Name of an adapter (LoRA) that was loaded with the model; ``None``: the model as it is."""
    cache_salt: Annotated[Text, Field(min_length=1, max_length=128)] | None = None
    """What was computed of a prompt is found again only by requests with the same salt; ``None``:
    by those without one. Where requests come with keys, also by those of the same key alone,
    unless the deployment says ``prefix_cache_scope: shared``."""
    metadata: Annotated[Texts, OrDefault] = Field(default_factory=dict)
    """The caller's own; handed to observers, never to the model."""
    on_unsupported: OnUnsupported | None = None
    """What to do about parameters that the runtime does not honour; ``None``: as the service."""

    _over_all_keys: bool = PrivateAttr(default=False)

    @property
    def offered_tools(self) -> list[dict[str, Any]] | None:
        """The tools that the model is told of; ``None``: there are none, or it may call none."""
        return None if self.tool_choice == "none" else self.tools or None

    @property
    def continues(self) -> bool:
        """Whether the last message is continued, and no new one begun."""
        if self.messages is None or self.continue_final_message is not None:
            return self.continue_final_message is True
        last = self.messages[-1]
        return last.role == "assistant" and not last.tool_calls

    @property
    def has_strict_tools(self) -> bool:
        """Whether a tool asks for calls that are valid by its schema."""
        return any(tool["function"].get("strict") is True for tool in self.offered_tools or ())

    @property
    def constrained(self) -> bool:
        """Whether there is a form that the answer must match."""
        if self.params.structured_output is not None:
            return True
        return self.requires_call or self.has_strict_tools

    @property
    def requires_call(self) -> bool:
        """Whether a tool has to be called."""
        return self.tool_choice not in (None, "none", "auto")

    @property
    def key_name(self) -> str | None:
        """Name of the key that the request came with; ``None``: it came without a server.

        Never the key itself. It is ``metadata["api_key"]``, which the server writes whatever the
        client says there; an application that knows its users may write it as well. Requests of
        one name belong together: in logs and metrics, in the order of who waits, and in what they
        may find of each other in a cache.
        """
        name = self.metadata.get("api_key")
        return name if isinstance(name, str) else None

    @property
    def cache_scope(self) -> str:
        """Within what handlers may use work again: opaque, to be compared with other requests'.

        It stands for ``key_name`` and ``cache_salt``; empty: neither counts. Nothing of what was
        computed in one scope may be of use in another, or tell of itself by counts or by time.
        """
        owner = "" if self._over_all_keys else self.key_name or ""
        if not owner and self.cache_salt is None:
            return ""
        parts = (owner, self.cache_salt or "")
        text = "".join(f"{len(part)}:{part}" for part in parts)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]

    def over_all_keys(self) -> Self:
        """The same request, in a cache scope that does not depend on its key."""
        request = self.model_copy()
        request._over_all_keys = True  # noqa: SLF001 - its own
        return request

    @model_validator(mode="after")
    def _one_input(self) -> InferenceRequest:
        present = [name for name in INPUTS if getattr(self, name) is not None]
        if len(present) != 1:
            which = f"{' and '.join(present)} were" if present else "none of them was"
            raise ValueError(
                f"give exactly one of prompt, prompt_token_ids and messages; {which} given"
            )
        if self.tools and self.messages is None:
            raise ValueError("tools are for messages; a prompt is taken as it is")
        if self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool):
            names = tool_names(self.tools or ())
            if not names:
                raise ValueError("tool_choice asks for a call, but there are no tools")
            if isinstance(self.tool_choice, NamedTool) and self.tool_choice.name not in names:
                raise ValueError(
                    f"tool_choice names {self.tool_choice.name[:64]!r}, but the tools are "
                    f"{', '.join(names[:8])}"
                )
        if self.continue_final_message:
            _check_continued(self.messages)
        told = told_to_template(self.template_args)
        if names := contradictions({"reasoning": self.reasoning}, told):
            raise ValueError(
                f"{names[0]} and template_args.{names[1]} contradict each other; give one of them"
            )
        if sum(map(len, self.stop_sequences or ())) > MAX_STOP_CHARS:
            raise ValueError(f"stop_sequences may have {MAX_STOP_CHARS} characters together")
        return self


def _check_continued(messages: list[ChatMessage] | None) -> None:
    if messages is None:
        raise ValueError("continue_final_message is for messages; a prompt is continued as it is")
    if (role := messages[-1].role) != "assistant":
        raise ValueError(
            "continue_final_message asks for the last message to be continued, which only one of "
            f"the assistant's can be; it is of the role {role}"
        )
    if messages[-1].tool_calls:
        raise ValueError(
            "continue_final_message asks for the last message to be continued, but it has "
            "tool_calls: send their results behind it, or write the call as text"
        )
