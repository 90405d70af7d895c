"""Rules of requests side by side, and of their ends."""

from __future__ import annotations

from typing import Final

from engineroom.testing.conformance.rules.rule import Rule

__all__ = ["CANCELLATION", "CONCURRENCY", "FAULTS"]

CONCURRENCY: Final = {
    "requests-do-not-mix": Rule(
        "Requests do not mix",
        "Eight requests with different prompts and parameters at once have the texts that each has "
        "alone; where company changes the last digits of log probabilities, they part at a near "
        "tie at most.",
    ),
    "cache-scopes-apart": Rule(
        "What is computed in one cache scope is of no use in another",
        "A prompt that an earlier or a running request had with another cache_salt, or with none, "
        "is computed anew: the response tells of no cached prompt tokens.",
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

CANCELLATION: Final = {
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

FAULTS: Final = {
    "prompt-too-long": Rule(
        "A prompt that is too long is refused",
        "A prompt that does not fit the context is a ContextLengthExceededError, by which clients "
        "and routers know what to do, before anything is generated.",
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
