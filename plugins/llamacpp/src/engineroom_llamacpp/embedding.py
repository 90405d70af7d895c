"""Texts as vectors, with models that are made for it.

Those are encoders (BERT and its kin), and any model whose file says how its outputs become one
vector (``<architecture>.pooling_type``). They get a context of their own, and take their turns on
the same thread as everything else that decodes: a batch of texts a step.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from engineroom import (
    CPU_LOOP,
    BatchingEngine,
    ConfigurationError,
    DecodeLoop,
    EngineTask,
    InferenceError,
    ResourceNotAvailableError,
    TokenStep,
    default_threads,
    work_logger,
    work_priority,
)
from engineroom.sources import vector_sizes
from engineroom_llamacpp.adapters import set_adapters
from engineroom_llamacpp.context import context_params
from engineroom_llamacpp.library import AbortFlag, last_error

if TYPE_CHECKING:
    from engineroom_llamacpp.model import LlamaModel
    from engineroom_llamacpp.options import LlamaCppOptions

__all__ = ["EmbeddingContext", "EmbeddingEngine", "EmbeddingTask"]

logger = logging.getLogger("engineroom.llamacpp")

_DEFAULT_TOKENS: Final = 8192
_MAX_TEXTS: Final = 64
"""Texts of a step; each is a sequence."""
_ABORTED: Final = 2

Numbers = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(eq=False, slots=True, kw_only=True)
class EmbeddingTask(EngineTask):
    """One call of ``embed`` on its way through the engine.

    :param texts: token ids of each text.
    :param todo: which of them are still to be done, the next one last.
    """

    texts: Sequence[Sequence[int]]
    vectors: list[list[float]]
    todo: list[int] = field(default_factory=list)


class EmbeddingEngine(BatchingEngine[EmbeddingTask]):
    """Owns a context that computes embeddings. Run the constructor outside of the event loop.

    :param pooling: llama.cpp's number for how to pool.
    :raises ResourceNotAvailableError: there is no memory for the context.
    """

    def __init__(
        self, model: LlamaModel, options: LlamaCppOptions, pooling: int, name: str
    ) -> None:
        self.codec = self.model = model
        self.options = options
        self.n_vocab = model.n_vocab
        self.threads = options.n_threads or default_threads()
        self._context = EmbeddingContext(model, options, pooling, self.threads)
        self.on_gpu = self._context.on_gpu
        self.vector_sizes = vector_sizes(self._context.size, options)
        self.n_ctx = self._context.n_tokens
        """Most tokens of a text."""
        super().__init__(
            name,
            DecodeLoop(f"llamacpp-{name}") if self._context.on_gpu else CPU_LOOP,
            max_running=options.n_parallel,
            max_queue=options.max_queue,
        )
        self.open()

    async def embed(self, texts: Sequence[Sequence[int]]) -> list[list[float]]:
        """Vectors of texts, each as token ids; see :meth:`~engineroom.BatchingEngine.run`."""
        task = EmbeddingTask(
            texts=texts,
            vectors=[[] for _ in texts],
            todo=list(range(len(texts) - 1, -1, -1)),
            log=work_logger(logger, self.name),
            priority=work_priority(),
        )
        await self.run(task)
        return task.vectors

    def interrupt(self, on: bool) -> None:
        """Abort the computation."""
        self._context.abort.set(on)

    def shut(self) -> None:
        """Free the context."""
        self._context.close()

    def step(self) -> None:
        """Vectors of one batch of texts."""
        batch = list(self._compose())
        status = self._context.decode([task.texts[index] for task, index in batch])
        if status == _ABORTED:
            for task, index in reversed(batch):
                task.todo.append(index)
            return  # whose it was has been cancelled; the next turn sees to that
        tasks = list(dict.fromkeys(task for task, _ in batch))
        if status:
            why = last_error("it does not say why")
            for task in tasks:
                task.log.error("llama_decode returned %d: %s", status, why)
            self.fail(
                tasks, InferenceError(f"llama.cpp could not compute the step ({status}): {why}")
            )
            return
        broken = []
        for sequence, (task, index) in enumerate(batch):
            vector = self._context.vector(sequence)
            if vector is None:
                broken.append(task)
                continue
            task.vectors[index] = self._finished(vector)
        self.fail(
            dict.fromkeys(broken),
            InferenceError("the model computed no numbers for a text; its file may be damaged"),
        )
        ended = [task for task in tasks if not task.todo and not task.done]
        for task in ended:
            self.leave(task)
        self.hand_over([(task.mailbox, TokenStep(finish="eos_token")) for task in ended])

    def _compose(self) -> Iterator[tuple[EmbeddingTask, int]]:
        """The next batch: the requests take turns, a text each, while there is room."""
        room = min(self.options.n_batch, self.n_ctx)
        count = 0
        while waiting := [task for task in self.running if task.todo]:
            for task in waiting:
                size = len(task.texts[task.todo[-1]])
                if count and (size > room or count == self._context.n_texts):
                    return
                yield task, task.todo.pop()
                room -= size
                count += 1

    def _finished(self, vector: Numbers) -> list[float]:
        if self.options.normalize:
            length = float(np.linalg.norm(vector.astype(np.float64)))
            vector = vector / np.float32(length or 1.0)
        numbers: list[float] = vector.tolist()
        return numbers


class EmbeddingContext:
    """A llama.cpp context that pools its outputs. Used by the engine's thread alone."""

    def __init__(
        self, model: LlamaModel, options: LlamaCppOptions, pooling: int, threads: int
    ) -> None:
        self._library = library = model.library
        self.abort = AbortFlag(library)
        trained = model.n_ctx_train or _DEFAULT_TOKENS
        self.n_tokens = min(options.n_ctx or _DEFAULT_TOKENS, trained)
        self.n_texts = min(_MAX_TEXTS, self.n_tokens)
        params = context_params(library, options, threads, self.abort)
        # A text is computed at once, and so are the texts of a batch.
        params.n_ctx = params.n_batch = params.n_ubatch = self.n_tokens
        params.n_seq_max = self.n_texts
        params.embeddings = True
        params.pooling_type = pooling
        self._handle: Any = library.llama_init_from_model(model.handle, params)
        if not self._handle:
            raise ResourceNotAvailableError(
                f"llama.cpp cannot make a context of {self.n_tokens} tokens for embeddings: "
                f"{last_error('it does not say why')}; set n_ctx lower"
            )
        try:
            set_adapters(library, self._handle, model.adapters)
        except ConfigurationError:
            self.close()
            raise
        self._memory = library.llama_get_memory(self._handle)
        self.size = int(library.llama_model_n_embd_out(model.handle))
        self.on_gpu = options.n_gpu_layers != 0 and bool(library.llama_supports_gpu_offload())
        self._batch = library.llama_batch_init(self.n_tokens, 0, 1)

    def close(self) -> None:
        """Free the context. Called once, by the thread that used it."""
        handle, self._handle = self._handle, None
        if handle:
            self._library.llama_free(handle)
            batch, self._batch = getattr(self, "_batch", None), None
            if batch is not None:
                self._library.llama_batch_free(batch)

    def decode(self, texts: Sequence[Sequence[int]]) -> int:
        """Compute texts, each as a sequence by its place; returns llama.cpp's status."""
        batch = self._batch
        place = 0
        for sequence, tokens in enumerate(texts):
            for position, token in enumerate(tokens):
                batch.token[place] = token
                batch.pos[place] = position
                batch.n_seq_id[place] = 1
                batch.seq_id[place][0] = sequence
                batch.logits[place] = 1
                place += 1
        batch.n_tokens = place
        if self._memory:  # encoders have none
            self._library.llama_memory_clear(self._memory, False)
        return self.abort.compute(self._library.llama_decode, self._handle, batch)

    def vector(self, sequence: int) -> Numbers | None:
        """The vector of a text of the last batch; ``None``: it is not made of numbers."""
        pointer = self._library.llama_get_embeddings_seq(self._handle, sequence)
        if not pointer:
            return None
        address = ctypes.cast(pointer, ctypes.c_void_p).value or 0
        memory = (ctypes.c_float * self.size).from_address(address)
        vector: Numbers = np.ctypeslib.as_array(memory).copy()
        return vector if bool(np.isfinite(vector).all()) else None
