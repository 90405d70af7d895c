"""The rules that a handler keeps: one for each check. Needs no pytest.

``test_some_rule`` checks the rule ``some-rule``, whose paragraph is
``docs/plugins.md#rule-some-rule``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

__all__ = ["PAGE", "RULES", "Rule", "rule_page"]

PAGE: Final = "docs/plugins.md"


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule.

    :param title: what it is about, in a few words.
    :param text: what a handler does, in one sentence.
    """

    title: str
    text: str


def rule_page(rule_id: str) -> str:
    """Where the rule is explained."""
    return f"{PAGE}#rule-{rule_id}"


_DISCOVERY: Final = {
    "handler-is-valid": Rule(
        "The class is a handler",
        "The handler is made without arguments, has a name and an api_version, and its methods "
        "have the kinds and the parameters of InferenceHandler.",
    ),
    "entry-point": Rule(
        "The entry point resolves",
        "The distribution publishes the class in the entry-point group engineroom.handlers, under "
        "the handler's own name, and the entry loads.",
    ),
    "import-is-light": Rule(
        "Importing the plugin loads no runtime",
        "Importing the plugin, making the handler and asking it about models loads none of its "
        "runtime; that waits until load_model.",
    ),
    "capabilities": Rule(
        "Capabilities are told",
        "capabilities() returns a Capabilities, the same each time, before anything is loaded.",
    ),
    "can-load": Rule(
        "can_load knows its own format",
        "can_load returns the bool True for a source in the runtime's native format.",
    ),
    "can-load-foreign": Rule(
        "can_load refuses foreign sources",
        "can_load returns the bool False, and raises nothing, for sources that do not exist, are "
        "empty, are in another format, or name nothing that could be.",
    ),
    "model-loads": Rule(
        "The model loads",
        "load_model returns a LoadedModel with the model_id and the config that it was given, and "
        "sizes that are numbers or None.",
    ),
    "can-handle": Rule(
        "can_handle knows its own models",
        "can_handle returns the bool True for a model that the handler has loaded.",
    ),
    "can-handle-foreign": Rule(
        "can_handle refuses foreign models",
        "can_handle returns the bool False, and raises nothing, for models of other runtimes and "
        "of none, whose model_object may be anything.",
    ),
    "questions-are-cheap": Rule(
        "Questions are cheap",
        "can_load, can_handle, capabilities and health answer in a moment: they are asked for "
        "every handler, and often.",
    ),
    "questions-change-nothing": Rule(
        "Questions have no side effects",
        "can_load and can_handle leave the model, its configuration, the environment, the threads "
        "and the tasks as they were.",
    ),
    "estimate-memory": Rule(
        "Memory is estimated in bytes",
        "estimate_memory returns a mapping from devices to bytes, or None, without loading.",
    ),
    "health": Rule(
        "Health is told",
        "health returns a HandlerHealth that is ok for a model that serves, with counts from 0 "
        "and a cache usage from 0 to 1 or None.",
    ),
    "missing-source": Rule(
        "A source that is not there has a typed error",
        "load_model raises ModelNotFoundError, ConfigurationError or ResourceNotAvailableError "
        "for a source that does not exist.",
    ),
    "unknown-option": Rule(
        "An unknown option is refused by name",
        "load_model raises a ConfigurationError that names an option which the runtime does not "
        "have.",
    ),
}

_TEXT: Final = {
    "answers": Rule(
        "infer answers",
        "infer returns an InferenceResponse with the request's ids, the text, the finish reason "
        "and, where they are known, the counts.",
    ),
    "chunks-are-text": Rule(
        "Chunks are str",
        "stream_infer yields str, and nothing else, that UTF-8 can write.",
    ),
    "stream-ends": Rule(
        "A stream ends",
        "After its last chunk the generator of stream_infer ends by itself, at once.",
    ),
    "nothing-after-the-end": Rule(
        "StreamEnd is the last item",
        "Where stream_infer yields a StreamEnd it does so once, and yields nothing after it.",
    ),
    "stream-equals-infer": Rule(
        "A stream and a whole answer are the same",
        "For the same greedy request the joined chunks are the text of infer, and the finish "
        "reason, the stop sequence and the counts are the same.",
    ),
    "stream-is-incremental": Rule(
        "A stream comes piece by piece",
        "Text is given out as it is generated, also where stop sequences are looked for: only what "
        "may still become one is held back.",
    ),
    "whole-characters": Rule(
        "Characters come whole",
        "A character that is split over tokens is held until it is whole; no half of one is "
        "streamed.",
    ),
    "stop-sequence": Rule(
        "A stop sequence is reported",
        "Where a stop sequence ends the text, finish_reason is stop_sequence and the response "
        "names it.",
    ),
    "stop-cut-over-tokens": Rule(
        "A stop sequence may be cut",
        "A stop sequence that comes in pieces, over several tokens, is found, and no piece of it "
        "is given out.",
    ),
    "stop-earliest": Rule(
        "The earliest stop sequence wins",
        "Of several stop sequences the one that starts first in the text ends it, whatever their "
        "order in the list.",
    ),
    "stop-prefix-of-another": Rule(
        "One stop sequence may begin another",
        "A stop sequence that is the beginning of a longer one ends the text also where the longer "
        "one does not follow.",
    ),
    "stop-incomplete": Rule(
        "What was held back is given out",
        "Text that only looked like the beginning of a stop sequence is part of the answer.",
    ),
    "stop-in-the-prompt": Rule(
        "The prompt does not stop",
        "A stop sequence is looked for in the generated text; one in the prompt does not count.",
    ),
    "stop-at-the-first-token": Rule(
        "The first token may stop",
        "A stop sequence at the very beginning of the text leaves an empty text.",
    ),
}

_PARAMETERS: Final = {
    "token-counts": Rule(
        "Tokens are counted right",
        "prompt_tokens and count_tokens agree, but for what the model adds to every prompt.",
    ),
    "max-new-tokens": Rule(
        "max_new_tokens is exact",
        "No more tokens are generated than max_new_tokens says, and reaching it is the finish "
        "reason length.",
    ),
    "max-new-tokens-none": Rule(
        "Without max_new_tokens the context is the limit",
        "max_new_tokens=None goes on until the model ends the text or the context is full, not to "
        "a default of the runtime.",
    ),
    "none-is-neutral": Rule(
        "None is the neutral value",
        "None means the same as a field's neutral value (temperature 1, no truncation, no "
        "penalty), never a default of the runtime or of the model's files.",
    ),
    "unclaimed-parameters": Rule(
        "What is not claimed is refused or ignored",
        "A field that capabilities() does not claim is refused by name, or, with "
        'on_unsupported="warn", ignored: the answer is as without it.',
    ),
    "unknown-adapter": Rule(
        "An adapter that is not there is refused by name",
        "A request that names an adapter which was not loaded with the model is a "
        "ConfigurationError that names it, and the next request is answered; a handler that does "
        "not claim adapters leaves this to the service.",
    ),
    "temperature-zero": Rule(
        "temperature=0 is greedy",
        "temperature=0 takes the likeliest token always, whatever do_sample and seed say.",
    ),
    "temperature": Rule(
        "temperature has its effect",
        "A temperature near 0 comes to the greedy text, and a high one varies it.",
    ),
    "do-sample": Rule(
        "do_sample=False is greedy",
        "do_sample=False takes the likeliest token always, whatever the temperature.",
    ),
    "seed": Rule(
        "A seed makes a text again",
        "The same request with the same seed has the same text, and other seeds have others.",
    ),
    "seed-beside-neighbours": Rule(
        "A seed is the request's own",
        "A seeded request has the same text beside other, unseeded requests as alone.",
    ),
    "top-k": Rule(
        "top_k is honoured",
        "top_k=1 is greedy, whatever the temperature.",
    ),
    "top-p": Rule(
        "top_p is honoured",
        "A top_p near 0 keeps only the likeliest token, whatever the temperature.",
    ),
    "min-p": Rule(
        "min_p is honoured",
        "min_p=1 keeps only the likeliest token, whatever the temperature.",
    ),
    "repetition-penalty": Rule(
        "repetition_penalty is honoured",
        "A high repetition_penalty changes a text that repeats tokens of the prompt or its own.",
    ),
    "presence-penalty": Rule(
        "presence_penalty is honoured",
        "presence_penalty changes the text, but never its first token: only generated tokens "
        "count.",
    ),
    "frequency-penalty": Rule(
        "frequency_penalty is honoured",
        "frequency_penalty changes the text, but never its first token: only generated tokens "
        "count.",
    ),
    "logit-bias": Rule(
        "logit_bias is honoured",
        "A bias of -100 keeps a token out of the text, and one of 100 brings it in.",
    ),
    "logprobs": Rule(
        "logprobs are complete",
        "There is an entry for each generated token, with as many alternatives as were asked for, "
        "likeliest first, as the model gave them before bias, penalties and temperature.",
    ),
    "num-beams": Rule(
        "num_beams is honoured",
        "Beam search gives the same text each time, and finds others than the greedy one.",
    ),
    "early-stopping": Rule(
        "early_stopping is honoured",
        "early_stopping is claimed only together with num_beams, and makes a text no longer.",
    ),
    "structured-output": Rule(
        "structured_output is honoured",
        "The text matches the regular expression, the JSON schema or the grammar that was given, "
        "for each kind that capabilities() claims.",
    ),
}

_CONCURRENCY: Final = {
    "requests-do-not-mix": Rule(
        "Requests do not mix",
        "Eight requests with different prompts and parameters at once have the texts that each has "
        "alone.",
    ),
    "short-overtakes-long": Rule(
        "A short request does not wait for a long one",
        "A short request that arrives while a long one is answered ends first, as long as a slot "
        "is free.",
    ),
    "queue-bound": Rule(
        "The queue is bounded",
        "A request beyond the bound of the queue is refused at once with QueueFullError, and those "
        "within it are answered.",
    ),
}

_CANCELLATION: Final = {
    "cancel-by-task": Rule(
        "A cancelled task ends",
        "Cancelling the task that runs a request ends it within a decoding step, and "
        "CancelledError passes through.",
    ),
    "cancel-by-aclose": Rule(
        "A closed stream ends",
        "aclose() of the generator ends the work within a decoding step, raises nothing, and "
        "nothing is yielded any more.",
    ),
    "cancel-by-deadline": Rule(
        "A deadline ends the work",
        "A request whose timeout_s has run out ends with the finish reason timeout, whether it is "
        "read or not.",
    ),
    "cancel-in-prefill": Rule(
        "A long prompt can be cancelled",
        "A request that is cancelled while its prompt is read ends at once, and CancelledError "
        "passes through.",
    ),
    "cancel-while-queued": Rule(
        "A queued request can be cancelled",
        "A request that is cancelled while it waits leaves the queue, and the one that runs goes "
        "on.",
    ),
    "slots-return": Rule(
        "Slots come back",
        "After requests were cancelled in whatever way, health counts none of them any more, and "
        "the next request is answered.",
    ),
    "neighbours-go-on": Rule(
        "Neighbours of a cancelled request go on",
        "A request beside which others are cancelled has the text that it has alone.",
    ),
}

_FAULTS: Final = {
    "prompt-too-long": Rule(
        "A prompt that is too long is refused",
        "A prompt that does not fit the context is a ConfigurationError, before anything is "
        "generated.",
    ),
    "failing-request": Rule(
        "A failing request harms nobody",
        "While and after requests fail, the others' answers are what they are without them.",
    ),
    "unload-in-use": Rule(
        "A model in use is not pulled away in silence",
        "A request whose model is unloaded under it ends, with its answer or with a typed error, "
        "and unload_model ends too.",
    ),
    "load-cycles": Rule(
        "Unloading gives everything back",
        "Loading and unloading over and over leaves no models, memory, threads or files behind, "
        "and the model answers the same each time.",
    ),
}

_CHAT: Final = {
    "chat-template": Rule(
        "Messages are rendered with the model's template",
        "Messages, and the same text rendered by hand and sent as prompt, have the same answer.",
    ),
    "chat-roles": Rule(
        "Roles in an unusual order are answered or refused",
        "Messages whose roles the model does not know, or not in that order, are answered or are a "
        "ConfigurationError that says what is wrong with them.",
    ),
}

_TOKEN_IDS: Final = {
    "prompt-token-ids": Rule(
        "Token ids are a prompt as they are",
        "prompt_token_ids have the answer that the text has whose tokens they are, and nothing is "
        "added to them.",
    ),
    "prompt-token-ids-refused": Rule(
        "Token ids that cannot be read are refused",
        "Ids that the model has not, and more of them than the context has room for, are a "
        "ConfigurationError, and the next request is answered.",
    ),
}

_EMBEDDINGS: Final = {
    "embeddings-fit": Rule(
        "Each text has a vector",
        "embed returns one vector for each text, in their order, all of one length and of finite "
        "numbers, and how many tokens the texts have together.",
    ),
    "embeddings-alone": Rule(
        "A vector depends on its text alone",
        "A text has the same vector each time, whatever texts or requests are beside it, and "
        "another text has another.",
    ),
    "embeddings-cancelled": Rule(
        "Embedding can be cancelled",
        "Cancelling embed passes CancelledError through, and the next call is answered.",
    ),
    "embeddings-refused": Rule(
        "Embedding is refused in words",
        "A handler that does not claim embeddings, and a text that is longer than the model reads, "
        "are refused with a ConfigurationError.",
    ),
}

_HYGIENE: Final = {
    "overrides": Rule(
        "A replaced check says why",
        'A check of the kit that a suite replaces is marked with @overrides("the reason").',
    ),
    "loop-is-free": Rule(
        "The event loop is not blocked",
        "Loading, reading a long prompt and generating leave the event loop free for others.",
    ),
    "no-leaked-tasks": Rule(
        "No task is left behind",
        "A request that has ended, in whatever way, has no task on the event loop any more.",
    ),
}

RULES: Final[Mapping[str, Rule]] = {
    **_DISCOVERY,
    **_TEXT,
    **_PARAMETERS,
    **_CONCURRENCY,
    **_CANCELLATION,
    **_FAULTS,
    **_CHAT,
    **_TOKEN_IDS,
    **_EMBEDDINGS,
    **_HYGIENE,
}
"""Every rule, by its id."""
