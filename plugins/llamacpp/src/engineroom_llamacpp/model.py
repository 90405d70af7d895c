"""Weights and vocabulary of one GGUF model: loading, tokenising, pieces of tokens."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from engineroom import ChatMessage, ConfigurationError, ResourceNotAvailableError
from engineroom_llamacpp.adapters import load_adapters
from engineroom_llamacpp.chat import ChatTemplate
from engineroom_llamacpp.library import last_error, load
from engineroom_llamacpp.long_runs import with_stack_for
from engineroom_llamacpp.options import LlamaCppOptions

__all__ = ["END", "LlamaModel"]

logger = logging.getLogger("engineroom.llamacpp")

END: Final = None
"""What :meth:`LlamaModel.piece` gives for a token that ends the generation."""


class LlamaModel:
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
            self.end_tokens = sum(
                bool(library.llama_vocab_is_eog(self._vocab, token))
                for token in range(self.n_vocab)
            )
            """How many tokens end the generation."""
            kind = library.llama_vocab_type(self._vocab)
            self._has_expressions = kind == library.LLAMA_VOCAB_TYPE_BPE
            self._adds_bos = bool(library.llama_vocab_get_add_bos(self._vocab))
            self._bos = int(library.llama_vocab_bos(self._vocab))
            self._pieces: dict[int, bytes | None] = {}
            self._buffer_size = 64
            loaded = load_adapters(library, self.handle, options)
            self.adapters = [adapter for adapter in loaded if adapter.name is None]
            """Those that apply to every request."""
            self.adapters_by_name = {a.name: a for a in loaded if a.name is not None}
            """Those that requests choose."""
            self._template = self._chat_template(options)
            self._special = self._special_texts() if self._template is not None else None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Free the weights. Called once, after everything that uses them has ended."""
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
        if self._has_expressions:
            return with_stack_for(text, lambda: self._tokenize(text, special, begin))
        return self._tokenize(text, special, begin)

    def _tokenize(self, text: str, special: bool, begin: bool) -> list[int]:
        data = text.encode()
        library = self.library
        begin = begin and special
        room = len(data) + 8
        while True:
            tokens = (ctypes.c_int32 * room)()
            count = library.llama_tokenize(
                self._vocab, data, len(data), tokens, room, begin, special
            )
            if count >= 0:
                break
            if -count <= room:
                raise ResourceNotAvailableError("the text is too long to be tokenised")
            room = -count
        found: list[int] = tokens[:count]
        if begin and self._adds_bos and found[:2] == [self._bos, self._bos]:
            del found[0]  # a chat template wrote it as well
        return found

    def prompt(self, prompt: str | None, messages: Sequence[ChatMessage] | None) -> list[int]:
        """Token ids of a request's input.

        A ``prompt`` is taken as it is, special tokens included. What stands in ``messages`` is
        text: a special token that somebody writes into a message must not end it, or begin one
        of another role, so it is read as the characters that it consists of.

        :raises ConfigurationError: there is no chat template, or it refuses the messages.
        """
        if prompt is not None:
            return self.tokenize(prompt)
        messages = messages or ()
        special = self._special
        if special is None or not any(special.search(m.content or "") for m in messages):
            return self.tokenize(self.render(messages))
        literals: list[str] = []
        nonce = secrets.token_hex(8)

        def shield(match: re.Match[str]) -> str:
            literals.append(match[0])
            return f"\ue000{nonce}{len(literals) - 1}\ue001"

        shielded = [
            m
            if m.content is None
            else m.model_copy(update={"content": special.sub(shield, m.content)})
            for m in messages
        ]
        parts = re.split(f"\ue000{nonce}(\\d+)\ue001", self.render(shielded))
        tokens = self.tokenize(parts[0])
        for number, text in zip(parts[1::2], parts[2::2], strict=True):
            tokens += self.tokenize(literals[int(number)], special=False)
            tokens += self.tokenize(text, begin=False)
        return tokens

    def _special_texts(self) -> re.Pattern[str] | None:
        """Matches the text of every special token; ``None``: there are none."""
        library = self.library
        texts = {
            self._token_text(token)
            for token in range(self.n_vocab)
            if library.llama_vocab_is_control(self._vocab, token)
        } - {""}
        longest_first = sorted(texts, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first))) if texts else None

    def render(self, messages: Sequence[ChatMessage] | None) -> str:
        """The messages as the model wants to read them."""
        if self._template is None:
            raise ConfigurationError(
                f"{self.path.name!r} has no chat template; send prompt= instead of messages=, or "
                "set the option chat_template"
            )
        return self._template.render(messages or ())

    def _chat_template(self, options: LlamaCppOptions) -> ChatTemplate | None:
        source = options.chat_template
        if source is None:
            found = self.library.llama_model_chat_template(self.handle, None)
            source = found.decode("utf-8", "replace") if found else None
        if source is None:
            return None
        library = self.library
        tokens = {
            name: self._token_text(getattr(library, f"llama_vocab_{kind}")(self._vocab))
            for name, kind in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "pad"))
        }
        try:
            return ChatTemplate(source, tokens)
        except ConfigurationError as error:
            if options.chat_template is not None:
                raise
            logger.warning("%s: %s; only prompt= can be used", self.path.name, error)
            return None

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

        Control tokens stand for nothing. Looked up once a token, then remembered.
        """
        try:
            return self._pieces[token]
        except KeyError:
            ends = self.library.llama_vocab_is_eog(self._vocab, token)
            piece = self._pieces[token] = END if ends else self._render(token, special=False)
            return piece

    def token_text(self, token: int) -> str:
        """A token's own text, special ones included, for log probabilities."""
        return self._render(token, special=True).decode("utf-8", "replace")

    def _render(self, token: int, *, special: bool) -> bytes:
        size = self._buffer_size
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = self.library.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if length >= 0:
                return buffer.raw[:length]
            size = -length
