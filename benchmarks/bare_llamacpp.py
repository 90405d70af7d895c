"""The bare side of the llama.cpp bars: a decoding loop over llama_cpp's low-level API.

What somebody would write who needs nothing but speed: one batch a step over arrays that are
filled in place, greedy, no text, no stop, no queue, no other thread. It is not slowed down on
purpose: sampling is whichever of numpy's ``argmax`` and llama.cpp's own greedy sampler is
faster here (:attr:`BareLoop.sampling`), and the prompts of all sequences are read in one step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from engineroom import default_threads
from engineroom_llamacpp.options import LlamaCppOptions

__all__ = ["BareLoop", "Sampling"]

Sampling: TypeAlias = Literal["numpy argmax", "llama_sampler greedy"]

_FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}
_F16 = 1


class BareLoop:
    """One model, one context, used by the thread that made it.

    :param path: a GGUF file.
    :param options: what the service's side runs with; the context gets the same.
    """

    def __init__(self, path: Path, options: LlamaCppOptions) -> None:
        import llama_cpp

        self._library: Any = llama_cpp
        self._silence = llama_cpp.llama_log_callback(_ignore)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path.name}")
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._n_vocab = int(llama_cpp.llama_vocab_n_tokens(vocab))
        threads = options.n_threads or default_threads()
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = options.n_ctx
        params.n_batch = options.n_batch
        params.n_ubatch = options.n_ubatch
        params.n_seq_max = options.n_parallel
        params.n_outputs_max = options.n_parallel
        params.n_threads = threads
        params.n_threads_batch = options.n_threads_batch or threads
        params.flash_attn_type = _FLASH_ATTENTION[options.flash_attn]
        params.type_k = params.type_v = _F16
        params.kv_unified = True
        params.no_perf = True
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context of {options.n_ctx} tokens")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._greedy = llama_cpp.llama_sampler_init_greedy()
        self.sampling: Sampling = "numpy argmax"
        self._allocate(options.n_batch)

    def _allocate(self, size: int) -> None:
        self._tokens = np.zeros(size, np.int32)
        self._positions = np.zeros(size, np.int32)
        self._sequences = np.zeros(size, np.int32)
        self._wanted = np.zeros(size, np.int8)
        self._one = np.ones(size, np.int32)
        self._pointers = self._sequences.ctypes.data + 4 * np.arange(size, dtype=np.uintp)
        integers = ctypes.POINTER(ctypes.c_int32)
        self._batch = self._library.llama_batch(
            n_tokens=0,
            token=self._tokens.ctypes.data_as(integers),
            embd=None,
            pos=self._positions.ctypes.data_as(integers),
            n_seq_id=self._one.ctypes.data_as(integers),
            seq_id=self._pointers.ctypes.data_as(ctypes.POINTER(integers)),
            logits=self._wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def generate(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """``count`` tokens for each prompt, all prompts in one batch; ends of text are ignored."""
        self._library.llama_memory_clear(self._memory, True)
        rows = self._read(prompts)
        choose = self._chooser()
        now = [choose(row) for row in rows]
        generated = [[token] for token in now]
        size = len(prompts)
        batch, tokens, positions = self._batch, self._tokens, self._positions
        positions[:size] = [len(prompt) for prompt in prompts]
        self._sequences[:size] = range(size)
        self._wanted[:size] = 1
        batch.n_tokens = size
        for _ in range(count - 1):
            tokens[:size] = now
            self._decode()
            positions[:size] += 1
            now = [choose(row) for row in range(size)]
            for sequence, token in zip(generated, now, strict=True):
                sequence.append(token)
        return generated

    def _read(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Compute all prompts in one step; the rows of their last tokens."""
        rows = []
        end = 0
        for sequence, prompt in enumerate(prompts):
            start, end = end, end + len(prompt)
            self._tokens[start:end] = prompt
            self._positions[start:end] = range(len(prompt))
            self._sequences[start:end] = sequence
            self._wanted[start:end] = 0
            self._wanted[end - 1] = 1
            rows.append(end - 1)
        self._batch.n_tokens = end
        self._decode()
        return rows

    def _decode(self) -> None:
        if status := self._library.llama_decode(self._context, self._batch):
            raise RuntimeError(f"llama_decode returned {status}")

    def _chooser(self) -> Callable[[int], int]:
        library, context, greedy = self._library, self._context, self._greedy
        if self.sampling == "llama_sampler greedy":
            return lambda row: int(library.llama_sampler_sample(greedy, context, row))
        views: dict[int, NDArray[np.float32]] = {}
        kind = ctypes.c_float * self._n_vocab

        def largest(row: int) -> int:
            address = ctypes.addressof(library.llama_get_logits_ith(context, row).contents)
            if (view := views.get(address)) is None:
                view = views[address] = np.ctypeslib.as_array(kind.from_address(address))
            return int(view.argmax())

        return largest

    def close(self) -> None:
        """Free the context and the weights."""
        self._library.llama_sampler_free(self._greedy)
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)


def _ignore(*_: object) -> None:
    pass
