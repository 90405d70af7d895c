"""Rules of a handler and its model before and beside requests."""

from __future__ import annotations

from typing import Final

from engineroom.testing.conformance.rules.rule import Rule

__all__ = ["DISCOVERY", "EMBEDDINGS", "HYGIENE"]

DISCOVERY: Final = {
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

EMBEDDINGS: Final = {
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
    "embeddings-token-ids": Rule(
        "Token ids have a vector as texts have",
        "Where prompt_token_ids is claimed, embed takes a text's token ids in its place: nothing "
        "is added to them, and an id that the model does not have is a ConfigurationError.",
    ),
}

RANKING: Final = {
    "rerank": Rule(
        "Each document has a score",
        "rerank returns a finite score for each pair, in their order, which depends on that pair "
        "alone; where it is not claimed, and for a pair that is too long, it raises a "
        "ConfigurationError.",
    ),
}

HYGIENE: Final = {
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
