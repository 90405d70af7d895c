"""A model's tokenizer: prompts and conversations to tokens, and what each token stands for."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from engineroom import ChatMessage
from engineroom.prompts import (
    ChatOptions,
    ControlTokens,
    ModelTemplates,
    ModelTokens,
    PromptCodec,
    TokenizerReader,
    pair_frame,
    surroundings,
)
from engineroom_hf_transformers.decoding import (
    WINDOW,
    Decoder,
    PieceDecoder,
    Pieces,
    WindowDecoder,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Vocabulary"]

logger = logging.getLogger("engineroom.hf_transformers")


class Vocabulary(PromptCodec):
    """A tokenizer and what the model wants of it. Its methods may be called from any thread.

    The tokenizer is the vocabulary's own from here on: truncation and padding are switched off,
    and nobody may change its settings.

    :param end_ids: tokens that end a generation.
    :param n_vocab: width of a row of logits; it may exceed the tokenizer's count.
    :param options: the model's, or Jinja to use instead of the tokenizer's own.
    :param encoder: the input goes through an encoder, so that what the tokenizer appends to it
        (an end token) is kept. A text to be continued must not end so.
    :raises ConfigurationError: the chat template is not valid.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: Collection[int],
        n_vocab: int,
        options: ChatOptions | str | None,
        *,
        encoder: bool = False,
    ) -> None:
        self.n_vocab = n_vocab
        self.end_ids = frozenset(end_ids)
        self._tokenizer: Any = tokenizer
        self._backend: Any = (
            self._tokenizer.backend_tokenizer if getattr(tokenizer, "is_fast", False) else None
        )
        self._reader = None if self._backend is None else TokenizerReader(self._backend)
        if self._backend is not None:
            if self._backend.truncation is not None:
                self._backend.no_truncation()
            if self._backend.padding is not None:
                self._backend.no_padding()
        added = self._tokenizer.added_tokens_decoder
        self._added = {int(token): str(entry.content) for token, entry in added.items()}
        self._special = {int(token) for token, entry in added.items() if entry.special}
        if self._backend is None:
            self._special |= set(self._tokenizer.all_special_ids)
        special = {t: text for t, text in self._added.items() if t in self._special | self.end_ids}
        begin, end = self._surroundings()
        super().__init__(
            ModelTemplates(
                options,
                self._tokenizer.chat_template,
                self._tokenizer.special_tokens_map,
                lambda error: logger.warning("%s; only prompt= can be used", error),
            ),
            ControlTokens(special, self._added),
            begin=begin,
            end=end,
            unknown=self._tokenizer.unk_token_id,
        )
        self.frame = None if self._backend is None else pair_frame(self._backend)
        self._bos: int | None = self._tokenizer.bos_token_id
        self._encoder = encoder
        self._own: dict[int, bytes] = {}
        shown = {t: self._added[t].encode() for t in self.shown & self._added.keys()}
        self._pieces = Pieces.of(self._backend, self._special, shown)

    def model_tokens(self) -> ModelTokens:
        """See :meth:`~engineroom.prompts.PromptCodec.model_tokens`."""
        if self._pieces is None:
            return super().model_tokens()
        special = self._special - self.shown
        texts = {t: self._added.get(t, "").encode() for t in special}
        pieces = [texts.get(t) or self._pieces[t] for t in range(self.n_vocab)]
        return ModelTokens(pieces, frozenset(special), sorted(self.end_ids), self.plain)

    def width_and_ends(self) -> tuple[int, frozenset[int]]:
        """See :meth:`~engineroom.prompts.PromptCodec.width_and_ends`."""
        return self.n_vocab, frozenset(self.end_ids)

    def ends(self, token_id: int) -> bool:
        """Whether this token ends a generation."""
        return token_id in self.end_ids

    # ── text to tokens ───────────────────────────────────────────────────────────────────────

    def prompt(
        self,
        prompt: str | None,
        messages: Sequence[ChatMessage] | None,
        tools: list[dict[str, Any]] | None = None,
        **template_args: Any,
    ) -> list[int]:
        """Token ids of a request's input: a text between what the tokenizer adds, a conversation
        as the template writes it.

        :raises ConfigurationError: there is no chat template, or it refuses the messages.
        """
        if prompt is not None and self._encoder:
            return self.whole(prompt)
        return super().prompt(prompt, messages, tools, **template_args)

    def begun_chat(self, tokens: list[int]) -> list[int]:
        """What the template wrote, with one token of the beginning where it has several."""
        if self._bos is None or tokens[:1] != [self._bos]:
            return tokens
        same = sum(1 for _ in takewhile(lambda token: token == self._bos, tokens))
        return tokens[same - 1 :]

    def read(self, text: str) -> list[int]:
        """Token ids of a text, special tokens read as such, and nothing added."""
        if self._reader is None:
            return list(self._tokenizer.encode(text, add_special_tokens=False))
        return self._reader.read(text)

    def read_without(self, text: str, places: Sequence[int]) -> list[int] | None:
        """Token ids of a text but for those of single characters; ``None``: that is not told."""
        return None if self._reader is None else self._reader.read_without(text, places)

    def count_read(self, text: str) -> int:
        """How many tokens a text has, special tokens read as such."""
        return len(self.read(text)) if self._reader is None else self._reader.count(text)

    def _surroundings(self) -> tuple[list[int], list[int]]:
        if self._backend is not None:
            return surroundings(self._backend)
        bare, whole = self.read("a"), list(self._tokenizer.encode("a"))
        for at in range(len(whole) - len(bare) + 1):
            if whole[at : at + len(bare)] == bare:
                return whole[:at], whole[at + len(bare) :]
        return [], []

    # ── tokens to text ───────────────────────────────────────────────────────────────────────

    def decoder(self, prompt_ids: Sequence[int]) -> Decoder:
        """A decoder of what is generated after this prompt. To be used by one thread at a time.

        What it gives, joined, is the text of the whole without that of the prompt: special
        tokens are left out, and the spaces that the model wrote stay as they are.
        """
        # A prompt may be as many special tokens as fit the context: each is looked at once.
        if self._pieces is not None:
            shown = any(map(self._shows, prompt_ids[:WINDOW]))
            shown = shown or any(map(self._shows, set(prompt_ids)))
            return PieceDecoder(self._pieces, first=not shown)
        seed: list[int] = []
        silent: set[int] = set()
        for token in reversed(prompt_ids):
            if token in silent:
                continue
            if not self._shows(token):
                silent.add(token)
            else:
                seed.insert(0, token)
                if len(seed) == WINDOW:
                    break
        return WindowDecoder(self._decode, seed, self._shows)

    def token_bytes(self, token: int) -> bytes:
        """A token's own bytes, the text of special ones; none for ids beyond the tokenizer's."""
        own = self._own.get(token)
        if own is None:
            own = self._own[token] = self._bytes_of(token)
        return own

    def _bytes_of(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        if not 0 <= token < len(self._tokenizer):
            return b""
        if self._pieces is not None:
            return self._pieces[token]
        return self._decode([token]).encode()

    def _shows(self, token_id: int) -> bool:
        return token_id not in self._special and bool(self.token_bytes(token_id))

    def _decode(self, ids: Sequence[int]) -> str:
        size = len(self._tokenizer)
        known = [token for token in ids if 0 <= token < size]
        if self._backend is not None:
            text: str = self._backend.decode(known, skip_special_tokens=True)
        else:
            text = self._tokenizer.decode(
                known, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        return text
