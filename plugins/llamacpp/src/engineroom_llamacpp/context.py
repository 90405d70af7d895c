"""A llama.cpp context: its cache, its batch, its logits. Used by the engine's thread alone."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from engineroom import ConfigurationError, ResourceNotAvailableError, default_threads
from engineroom.engine import Logits
from engineroom_llamacpp.adapters import set_adapters
from engineroom_llamacpp.library import (
    CACHE_TYPES,
    FLASH_ATTENTION,
    AbortFlag,
    last_error,
)
from engineroom_llamacpp.model import LlamaModel
from engineroom_llamacpp.options import DEFAULT_CONTEXT, LlamaCppOptions
from engineroom_llamacpp.saved import SavedSequence

__all__ = ["LlamaContext", "context_params"]

_SPARE: Final = 8
"""At least so many sequences beyond ``n_parallel``: each costs a row of logits, 200 kB with a
vocabulary of 49,000."""
_TILE: Final = 64
"""``GGML_FA_TILE_Q``."""
_PROMPT_LOGITS: Final = 1 << 25
"""Bytes of logits in a step that tell of prompts; llama.cpp sets as much apart for them twice."""
_LEAST_PROMPT_ROWS: Final = 16
_MOST_PROMPT_ROWS: Final = 128
_MOST_SEQUENCES: Final = 256
"""llama.cpp's own bound."""
_ROUNDED: Final = 256
"""llama.cpp rounds a stream's cells up to a multiple of it."""
_LEAST_STREAM: Final = 1024
"""With fewer cells for each, what neighbours have costs little."""
_BYTES: Final = ctypes.POINTER(ctypes.c_uint8)


def context_params(library: Any, options: LlamaCppOptions, threads: int, abort: AbortFlag) -> Any:
    """llama.cpp's parameters of a context, as far as every context of a model has the same."""
    params = library.llama_context_default_params()
    params.n_threads = threads
    params.n_threads_batch = options.n_threads_batch or threads
    params.flash_attn_type = FLASH_ATTENTION[options.flash_attn]
    params.rope_freq_base = options.rope_freq_base or 0.0
    params.rope_freq_scale = options.rope_freq_scale or 0.0
    params.kv_unified = True
    params.no_perf = True
    params.abort_callback = abort.callback
    params.abort_callback_data = abort.data
    return params


class LlamaContext:
    """One context over a cache that is unified, or has a part for each sequence.

    Unified, it has ``n_parallel`` sequences and as many more, which keep what may be used again
    and which beams search in; none more where each would need a state of its own.

    :param outputs: most tokens of a sequence in a batch for which logits are computed.
    :raises ResourceNotAvailableError: there is no memory for it.

    ``n_ctx`` are the cells that one request can have, ``stream`` those of a sequence while each
    has its own, ``cells`` all that there are now.
    """

    def __init__(self, model: LlamaModel, options: LlamaCppOptions, *, outputs: int = 1) -> None:
        self._library = model.library
        self._model, self._options = model, options
        self.abort = AbortFlag(self._library)
        self.threads = options.n_threads or default_threads()
        self._n_ctx = options.n_ctx or min(model.n_ctx_train or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
        self._outputs_each = outputs
        parallel = options.n_parallel
        # A state is not one of cells alone, and a window has a cache of its own.
        self.keeps_all = not model.has_states and not model.n_window
        self.on_gpu = options.n_gpu_layers != 0 and bool(self._library.llama_supports_gpu_offload())
        self.stream = self._n_ctx // parallel // _ROUNDED * _ROUNDED
        self.changes = (
            options.kv_unified == "auto"
            and parallel > 1
            and self.stream >= _LEAST_STREAM
            and self.keeps_all
            and not self.on_gpu
        )
        """Whether the layout is chosen by what requests need."""
        # Its address as a number: llama_cpp's own declaration makes two objects of it each time.
        kind = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32)
        self._logits_at: Any = ctypes.cast(self._library.llama_get_logits_ith, kind)
        self._rows: dict[int, Logits] = {}
        rows = _PROMPT_LOGITS // (4 * model.n_vocab)
        self.prompt_rows = min(max(rows, _LEAST_PROMPT_ROWS), _MOST_PROMPT_ROWS)
        """Beside ``n_outputs``, most tokens in a batch whose logits tell of a prompt."""
        self._adapters, self._adapters_by_name = model.adapters, model.adapters_by_name
        self._spare = 0 if model.has_states else max(parallel, _SPARE)
        unified = bool(options.kv_unified)
        self.most_sequences = min(
            parallel + (self._spare if unified else 0),
            _MOST_SEQUENCES - 1 if unified and self._spare else _MOST_SEQUENCES,
        )
        """Of a unified cache, if it may be one."""
        self._open(unified=unified and not self.changes)
        self.n_ctx = self._n_ctx if self.changes else self.cells
        if not self.unified and not self.changes:
            self.n_ctx = self.stream = self.cells // self.sequences
        self.n_batch = int(self._library.llama_n_batch(self._handle))
        self.n_vocab = model.n_vocab
        fused = options.flash_attn != "off" and not self.on_gpu
        self.tile = _TILE if fused else 0
        """From so many tokens in a batch on attention computes blocks of them; 0: it never does."""
        self._new_batch(self._library)

    def lay_out(self, *, unified: bool) -> None:
        """Begin anew with an empty cache of this layout.

        :raises ResourceNotAvailableError: there is no memory for it; then it is as it was.
        """
        before = self.unified
        self.close()
        try:
            self._open(unified)
        except ResourceNotAvailableError:
            try:
                self._open(before)
            except ResourceNotAvailableError as error:  # nothing can be computed any more
                raise RuntimeError(error.message) from error
            raise

    def _open(self, unified: bool) -> None:
        """Make a context of this layout."""
        library, model, options = self._library, self._model, self._options
        params = context_params(library, options, self.threads, self.abort)
        parallel = options.n_parallel
        params.n_ctx = self.stream * parallel if self.changes and not unified else self._n_ctx
        params.n_batch = min(options.n_batch, self._n_ctx)
        params.n_ubatch = min(options.n_ubatch, params.n_batch)
        self.unified = params.kv_unified = unified
        spare = self._spare if unified else 0
        self.sequences = self.most_sequences if unified else parallel
        # One more, by way of which parts of others are copied out and in.
        self._part = self.sequences
        params.n_seq_max = self.sequences + (1 if spare else 0)
        # Rows of logits for sequences, not for each token of a batch. llama.cpp ends the process
        # where a batch asks for more.
        self.n_outputs = max(params.n_seq_max, parallel * self._outputs_each)
        params.n_outputs_max = self.n_outputs + self.prompt_rows
        params.type_k = CACHE_TYPES[options.cache_type_k]
        params.type_v = CACHE_TYPES[options.cache_type_v]
        self._handle: Any = library.llama_init_from_model(model.handle, params)
        if not self._handle:
            raise ResourceNotAvailableError(
                f"llama.cpp cannot make a context of {params.n_ctx} tokens: "
                f"{last_error('it does not say why')}; set n_ctx lower, or another cache type"
            )
        self._memory = library.llama_get_memory(self._handle)
        self._adapter: str | None = None
        try:
            if not self._memory:
                raise ConfigurationError(
                    f"{str(model.path)!r} is an encoder whose file does not say so "
                    "(attention.causal); it generates no text"
                )
            set_adapters(library, self._handle, self._adapters)
        except ConfigurationError:
            self.close()
            raise
        self.cells = int(library.llama_n_ctx(self._handle))

    def _new_batch(self, library: Any) -> None:
        """Arrays of our own behind llama.cpp's struct: filled by slices, not item by item."""
        size = self.n_batch
        self._tokens = np.zeros(size, np.int32)
        self._positions = np.zeros(size, np.int32)
        self._sequences = np.zeros(size, np.int32)
        self._outputs = np.zeros(size, np.int8)
        self._ones = np.ones(size, np.int32)
        self._pointers = self._sequences.ctypes.data + 4 * np.arange(size, dtype=np.uintp)
        integers = ctypes.POINTER(ctypes.c_int32)
        self._batch = library.llama_batch(
            n_tokens=0,
            token=self._tokens.ctypes.data_as(integers),
            embd=None,
            pos=self._positions.ctypes.data_as(integers),
            n_seq_id=self._ones.ctypes.data_as(integers),
            seq_id=self._pointers.ctypes.data_as(ctypes.POINTER(integers)),
            logits=self._outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def use_adapter(self, name: str | None) -> None:
        """Apply this one of the named adapters from the next batch on; ``None``: none of them."""
        if name != self._adapter:
            named = [] if name is None else [self._adapters_by_name[name]]
            set_adapters(self._library, self._handle, [*self._adapters, *named])
            self._adapter = name

    def close(self) -> None:
        """Free the context. Called once, by the thread that used it."""
        handle, self._handle = self._handle, None
        self._rows.clear()
        if handle:
            self._library.llama_free(handle)

    # ── one step ─────────────────────────────────────────────────────────────────────────────

    def begin(self) -> None:
        """Begin a new batch."""
        self._batch.n_tokens = 0

    def add(self, sequence: int, position: int, tokens: Sequence[int], outputs: int) -> int:
        """Add tokens of a sequence.

        :param position: of the first of them, in the sequence.
        :param outputs: compute logits for so many of the last of them.
        :returns: index of the first with logits in the batch, for :meth:`logits`.
        """
        start = int(self._batch.n_tokens)
        end = self._batch.n_tokens = start + len(tokens)
        if end - start == 1:  # slices would take several times as long
            self._tokens[start] = tokens[0]
            self._positions[start] = position
            self._sequences[start] = sequence
            self._outputs[start] = outputs
            return end - outputs
        self._tokens[start:end] = tokens
        self._positions[start:end] = np.arange(position, position + end - start)
        self._sequences[start:end] = sequence
        if outputs < end - start:
            self._outputs[start : end - outputs] = 0
        self._outputs[end - outputs : end] = 1
        return end - outputs

    def decode(self) -> int:
        """Compute the batch; other threads run meanwhile.

        :returns: llama.cpp's status: 0 done, 1 no room in the cache, 2 aborted, else failed.
        """
        return self.abort.compute(self._library.llama_decode, self._handle, self._batch)

    def logits(self, index: int) -> Logits:
        """The logits after the batch's token ``index``: a view, valid until the next batch."""
        address = self._logits_at(self._handle, index)
        row = self._rows.get(address)
        if row is None:
            memory = (ctypes.c_float * self.n_vocab).from_address(address)
            row = np.ctypeslib.as_array(memory)
            self._rows[address] = row
        return row

    def forget(self, sequence: int, position: int = 0) -> None:
        """Free the sequence's cells from ``position`` on."""
        self._library.llama_memory_seq_rm(self._memory, sequence, position, -1)

    def share(self, source: int, target: int, length: int) -> None:
        """Let ``target``, which is empty, have the first ``length`` cells of ``source``."""
        if self.unified:
            self._library.llama_memory_seq_cp(self._memory, source, target, 0, length)
            return
        # Not by llama.cpp's own copying of streams, which waits for the next batch: the state of a
        # sequence that is read before has not been copied then.
        whole = self._save_stream(source) if self.keeps_all else None
        if whole is None or not self.restore(target, whole.part(0, length)):
            self._library.llama_memory_seq_cp(self._memory, source, target, -1, -1)
            self.forget(target, length)

    def save(self, sequence: int, length: int, start: int = 0) -> SavedSequence | None:
        """Copy ``length`` cells of a sequence from ``start`` on; ``None``: llama.cpp cannot.

        Where each sequence has a stream, all of it is copied for that.
        """
        if not self.unified:
            whole = self._save_stream(sequence)
            if whole is None or len(whole) < start + length:
                return None
            return whole.part(start, start + length)
        library, part = self._library, self._part
        library.llama_memory_seq_cp(self._memory, sequence, part, start, start + length)
        try:
            data = self._state(part)
        finally:
            self.forget(part)
        return None if data is None else SavedSequence(data, length)

    def _save_stream(self, sequence: int) -> SavedSequence | None:
        data = self._state(sequence)
        if data is None:
            return None
        return SavedSequence.of_stream(data, sequence, self.sequences)

    def _state(self, sequence: int) -> NDArray[np.uint8] | None:
        library, handle = self._library, self._handle
        size = int(library.llama_state_seq_get_size(handle, sequence))
        data = np.empty(size, np.uint8)
        address = data.ctypes.data_as(_BYTES)
        if not size or library.llama_state_seq_get_data(handle, address, size, sequence) != size:
            return None
        return data

    def restore(
        self, sequence: int, saved: SavedSequence, start: int = 0, end: int | None = None
    ) -> bool:
        """Append what was saved to a sequence that has ``start`` cells; none, where each has a
        stream.

        :param end: leave it with so many cells; ``None``: with all that was saved.
        :returns: whether llama.cpp could; if not, the sequence is as it was.
        """
        if not self.unified:
            copied = self._set_state(sequence, saved.for_streams(self.sequences))
            if end is not None:
                self.forget(sequence, end)
            return copied
        part = self._part
        copied = self._set_state(part, saved.data)
        if copied:
            stop = -1 if end is None else end
            self._library.llama_memory_seq_cp(self._memory, part, sequence, start, stop)
        self.forget(part)
        return copied

    def _set_state(self, sequence: int, data: NDArray[np.uint8]) -> bool:
        address = data.ctypes.data_as(_BYTES)
        set_data = self._library.llama_state_seq_set_data
        return bool(set_data(self._handle, address, data.nbytes, sequence))

    def clear(self) -> None:
        """Free all cells, and write zeros where keys and values were."""
        self._library.llama_memory_clear(self._memory, True)

    def length(self, sequence: int) -> int:
        """Cells that the sequence has."""
        return int(self._library.llama_memory_seq_pos_max(self._memory, sequence)) + 1
