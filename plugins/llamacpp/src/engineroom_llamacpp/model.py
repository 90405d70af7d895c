"""Weights and vocabulary of one GGUF model: loading, tokenising, pieces of tokens."""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from engineroom import ConfigurationError, ResourceNotAvailableError
from engineroom.prompts import (
    ControlTokens,
    LeastTokens,
    ModelTemplates,
    ModelTokens,
    PromptCodec,
    expect_tokens,
)
from engineroom_llamacpp.adapters import load_adapters
from engineroom_llamacpp.least_tokens import least_tokens_of
from engineroom_llamacpp.library import last_error, load
from engineroom_llamacpp.long_runs import with_stack_for
from engineroom_llamacpp.options import LlamaCppOptions

__all__ = ["END", "LlamaModel"]

logger = logging.getLogger("engineroom.llamacpp")

_LONG: Final = 2**16
"""Characters for which it is worth to look first whether they can fit."""
_INTEGERS: Final = ctypes.POINTER(ctypes.c_int32)
END: Final = None
"""What :meth:`LlamaModel.piece` gives for a token that ends the generation."""


class LlamaModel(PromptCodec):
    """The weights in memory, and the vocabulary. Its methods may be called from any thread.

    :param path: a GGUF file whose header has been checked.
    :param weights: read them; without, nothing can be computed.
    :raises ConfigurationError: llama.cpp refuses the file, or it is no text generator.
    """

    def __init__(self, path: Path, options: LlamaCppOptions, *, weights: bool = True) -> None:
        self.library = library = load()
        self.path = path
        params = library.llama_model_default_params()
        params.n_gpu_layers = options.n_gpu_layers
        if options.main_gpu is not None:
            params.main_gpu = options.main_gpu
            params.split_mode = library.LLAMA_SPLIT_MODE_NONE
        params.load_mode = (1 if options.use_mmap else 0) + (2 if options.use_mlock else 0)
        if not weights:
            params.no_alloc, params.load_mode = True, 0
        split = options.tensor_split
        if split:
            devices = int(library.llama_max_devices())
            if len(split) > devices:
                raise ConfigurationError(
                    f"tensor_split has {len(split)} shares; this build of llama.cpp knows "
                    f"{devices} devices"
                )
            self._split = (ctypes.c_float * devices)(*split)
            params.tensor_split = self._split
        self.handle: Any = library.llama_model_load_from_file(os.fsencode(path), params)
        if not self.handle:
            raise ConfigurationError(
                f"llama.cpp cannot load {str(path)!r}: {last_error('it does not say why')}; "
                "a newer llama-cpp-python may know the model's architecture"
            )
        try:
            self._vocab = library.llama_model_get_vocab(self.handle)
            self._check()
            self.n_vocab = int(library.llama_vocab_n_tokens(self._vocab))
            self.n_ctx_train = int(library.llama_model_n_ctx_train(self.handle))
            self.memory_bytes = int(library.llama_model_size(self.handle))
            self.has_states = bool(
                library.llama_model_is_recurrent(self.handle)
                or library.llama_model_is_hybrid(self.handle)
            )
            """It keeps a state a sequence, which cannot be set back to an earlier token."""
            self.n_window = int(library.llama_model_n_swa(self.handle))
            """Tokens that the layers with a sliding window look back on; 0: there are none."""
            is_end = library.llama_vocab_is_eog
            ends = {token for token in range(self.n_vocab) if is_end(self._vocab, token)}
            self.ends = frozenset(ends)
            """Tokens that end the generation."""
            kind = library.llama_vocab_type(self._vocab)
            self._has_expressions = kind == library.LLAMA_VOCAB_TYPE_BPE
            bos = int(library.llama_vocab_bos(self._vocab))
            begin = [bos] if library.llama_vocab_get_add_bos(self._vocab) else []
            self._pieces: dict[int, bytes | None] = {}
            self._buffer_size = 64
            loaded = load_adapters(library, self.handle, options)
            self.adapters = [adapter for adapter in loaded if adapter.name is None]
            """Those that apply to every request."""
            self.adapters_by_name = {a.name: a for a in loaded if a.name is not None}
            """Those that requests choose."""
            super().__init__(self._chat_templates(options), self._control_tokens(ends), begin=begin)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Free the weights. Called once, after everything else that uses them has ended; prompts
        that are read are waited for.
        """
        if (lane := getattr(self, "lane", None)) is not None:  # it was made to its end
            lane.close()
        handle, self.handle = self.handle, None
        if handle:
            self.library.llama_model_free(handle)  # its adapters go with it

    def _check(self) -> None:
        library = self.library
        if not self._vocab or library.llama_vocab_n_tokens(self._vocab) <= 0:
            raise ConfigurationError(f"{str(self.path)!r} has no vocabulary; it generates no text")
        if library.llama_vocab_type(self._vocab) == library.LLAMA_VOCAB_TYPE_NONE:
            raise ConfigurationError(
                f"{str(self.path)!r} has no tokenizer; this runtime needs the one of the model's "
                "own file"
            )
        if library.llama_model_has_encoder(self.handle):
            raise ConfigurationError(
                f"{str(self.path)!r} is an encoder-decoder model or a half of one; this runtime "
                "runs decoder-only models, and encoders that make embeddings"
            )

        if library.llama_model_is_diffusion(self.handle):
            raise ConfigurationError(
                f"{str(self.path)!r} is a diffusion model; this runtime runs models that write "
                "one token after another"
            )
        count = library.llama_vocab_n_tokens(self._vocab)
        for kind in ("bos", "eos", "sep"):
            # llama.cpp ends the process where it is to add a token that there is none of.
            added = getattr(library, f"llama_vocab_get_add_{kind}")(self._vocab)
            token = getattr(library, f"llama_vocab_{kind}")(self._vocab)
            if (added and token < 0) or token >= count:
                raise ConfigurationError(
                    f"{str(self.path)!r} wants a token {kind} that its vocabulary does not have"
                )

    # ── text to tokens ───────────────────────────────────────────────────────────────────────

    def tokenize(self, text: str, *, special: bool = True, begin: bool = True) -> list[int]:
        """Token ids of ``text``.

        :param special: read special tokens in the text as such.
        :param begin: the text begins a prompt: add what the model wants there, unless the text
            begins with it already. Only together with ``special``.
        :raises ConfigurationError: the text has a run of characters that is too long.
        """
        tokens = self._tokens(text, special=special)
        return self.begun(tokens) if begin and special else tokens

    def read(self, text: str) -> list[int]:
        """Token ids of a text, special tokens read as such, and nothing added."""
        return self._tokens(text)

    def read_located(self, text: str) -> tuple[list[int], list[tuple[int, int]]] | None:
        """The same, and from where to where in the text each token stands; ``None`` where the
        tokens' own texts, but for a space that llama.cpp puts before, are not the text.
        """
        tokens, data, at = self._tokens(text), text.encode(), 0
        # The character that each byte belongs to.
        characters = np.cumsum(np.frombuffer(data, np.uint8) & 0xC0 != 0x80) - 1
        places = []
        for token in tokens:
            piece = self._render(token, special=True)
            if not data.startswith(piece, at):
                piece = piece.removeprefix(b" ")
                if not data.startswith(piece, at):
                    return None
            first = int(characters[at]) if at < len(data) else len(text)
            last = int(characters[at + len(piece) - 1]) + 1 if piece else first
            places.append((first, last))
            at += len(piece)
        return (tokens, places) if at == len(data) else None

    def read_literal(self, text: str) -> list[int]:
        """Token ids of a special token's text, read as the characters that it consists of."""
        tokens = self._tokens(text, special=False)
        return super().read_literal(text) if self._control.occur(tokens) else tokens

    def whole(self, text: str) -> list[int]:
        """Token ids of a text that is not to be continued, with all that the model wants around it:
        an end token, too, where its file says so.
        """
        tokens = self._tokens(text, add=True)
        if self._begin and tokens[:2] == self._begin * 2:
            del tokens[0]  # the text has it as well
        return tokens

    def _tokens(self, text: str, *, special: bool = True, add: bool = False) -> list[int]:
        # What is expected is known to this thread alone, not to one with a larger stack.
        if len(text) > _LONG and (least := self._least_tokens) is not None:
            expect_tokens(least(text), unread=True)
        if self._has_expressions:
            tokens = with_stack_for(text, lambda: self._array(text, special, add))
        else:
            tokens = self._array(text, special, add)
        expect_tokens(len(tokens))
        ids: list[int] = tokens.tolist()
        return ids

    @cached_property
    def _least_tokens(self) -> LeastTokens | None:
        return least_tokens_of(self.library, self._vocab)

    def _array(self, text: str, special: bool, add: bool) -> NDArray[np.int32]:
        data = text.encode()
        room = len(data) + 8
        while True:
            # No array of ctypes' own, all of which is written before it is used.
            tokens = np.empty(room, np.int32)
            place = tokens.ctypes.data_as(_INTEGERS)
            count = self.library.llama_tokenize(
                self._vocab, data, len(data), place, room, add, special
            )
            if count >= 0:
                return tokens[:count]
            if -count <= room:
                raise ResourceNotAvailableError("the text is too long to be tokenised")
            room = -count

    def _control_tokens(self, ends: set[int]) -> ControlTokens:
        library = self.library
        special: dict[int, str] = {}
        added: dict[int, str] = {}
        control, defined = library.LLAMA_TOKEN_ATTR_CONTROL, library.LLAMA_TOKEN_ATTR_USER_DEFINED
        for token in range(self.n_vocab):
            attributes = library.llama_vocab_get_attr(self._vocab, token)
            if attributes & (control | defined):  # what is read in whole
                texts = special if attributes & control or token in ends else added
                texts[token] = self._token_text(token)
        return ControlTokens(special, added)

    def _chat_templates(self, options: LlamaCppOptions) -> ModelTemplates:
        library = self.library
        own = library.llama_model_chat_template(self.handle, None)
        tokens = {
            name: self._token_text(getattr(library, f"llama_vocab_{kind}")(self._vocab))
            for name, kind in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "pad"))
        }

        def warn(error: ConfigurationError) -> None:
            logger.warning("%s: %s; only prompt= can be used", self.path.name, error)

        source = own.decode("utf-8", "replace") if own else None
        return ModelTemplates(options, source, tokens, warn)

    def _token_text(self, token: int) -> str:
        if token < 0:
            return ""
        return (self.library.llama_vocab_get_text(self._vocab, token) or b"").decode(
            "utf-8", "replace"
        )

    def same_vocabulary(self, other: LlamaModel) -> bool:
        """Whether each token means the same to another model."""
        if self.n_vocab != other.n_vocab:
            return False
        text = self.library.llama_vocab_get_text
        return all(text(self._vocab, t) == text(other._vocab, t) for t in range(self.n_vocab))

    # ── tokens to text ───────────────────────────────────────────────────────────────────────

    def piece(self, token: int) -> bytes | None:
        """The bytes that a token stands for; :data:`END` for one that ends the generation.

        Control tokens stand for nothing, but for those that are ``shown``. Looked up once a token,
        then remembered.
        """
        try:
            return self._pieces[token]
        except KeyError:
            ends = self.library.llama_vocab_is_eog(self._vocab, token)
            piece = END if ends else self._render(token, special=token in self.shown)
            self._pieces[token] = piece
            return piece

    def model_tokens(self) -> ModelTokens:
        """See :meth:`~engineroom.prompts.PromptCodec.model_tokens`."""
        pieces = [self._render(token, special=True) for token in range(self.n_vocab)]
        special = frozenset(t for t in range(self.n_vocab) if t in self._control) - self.shown
        return ModelTokens(pieces, special | frozenset(self.ends), sorted(self.ends), self.plain)

    def width_and_ends(self) -> tuple[int, frozenset[int]]:
        """See :meth:`~engineroom.prompts.PromptCodec.width_and_ends`."""
        return self.n_vocab, self.ends

    def token_bytes(self, token: int) -> bytes:
        """A token's own bytes, the text of special ones, for log probabilities."""
        return self._render(token, special=True)

    def _render(self, token: int, *, special: bool) -> bytes:
        size = self._buffer_size
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = self.library.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if length >= 0:
                return buffer.raw[:length]
            size = -length
