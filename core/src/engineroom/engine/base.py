"""What an engine is: a loaded model that runs, whatever computes it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from engineroom.handlers.base import HandlerHealth

if TYPE_CHECKING:
    from engineroom.engine.constraints import GrammarCompiler
    from engineroom.sources.vectors import VectorSizes

__all__ = ["Engine"]


class Engine(ABC):
    """A loaded model that runs, as :class:`EngineHandler` sees it; the engine sets its fields.

    One that generates text has ``request(request, tokens)``, which queues a request and returns
    its :class:`~engineroom.EngineTask`. Where the handler says that it honours structured output,
    it takes a third argument, the request's :class:`~engineroom.engine.Constraint`, for its
    sampler. One that makes embeddings has ``embed(texts)``, an
    ``async def`` from the token ids of texts to their vectors; one that scores documents has
    ``rank(pairs)``, from :class:`~engineroom.prompts.PairTokens` to their scores.
    """

    codec: Any
    """Reads text: a :class:`~engineroom.prompts.PromptCodec`, or what has its methods ``prompt``,
    ``chat``, ``whole`` and ``count``. May be called from any thread."""
    n_ctx: int
    """Most tokens of a prompt and its answer, or of a text."""
    n_vocab: int
    """Tokens that the model has."""
    memory_bytes: int
    """What the model takes, on all devices together."""
    vector_sizes: VectorSizes | None = None
    """How long its vectors are; ``None``: it makes none, or does not know."""
    grammars: GrammarCompiler | None = None
    """Compiles what answers must match, once a request asks for it."""
    longer_context: str = "load the model with a longer context"
    """How to get one: advice, read after "shorten the prompt, or"."""

    @abstractmethod
    def health(self) -> HandlerHealth:
        """How it is doing. Must not block."""

    @abstractmethod
    def close(self) -> None:
        """End it and free what it has. Blocks."""
