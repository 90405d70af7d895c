"""A model's tokenizer: prompts and conversations to tokens, and what each token stands for."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from engineroom import ChatMessage, ConfigurationError
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

_CONTROL_LIKE: Final = re.compile(r"<\|[^|<>]+\|>|<(?:start|end)_of_turn>|</?s>|\[/?INST\]")
"""Tokens that structure a conversation in known templates. Some conversions forget to mark them
as special, and a tokenizer reads them all the same."""
_BREAK: Final = "\ue000"
"""A private character, put into a special token's text so that it is not read as one."""


class Vocabulary:
    """A tokenizer and what the model wants of it. Its methods may be called from any thread.

    The tokenizer is the vocabulary's own from here on: truncation and padding are switched off,
    and nobody may change its settings.

    :param end_ids: tokens that end a generation.
    :param n_vocab: width of a row of logits; it may exceed the tokenizer's count.
    :param chat_template: Jinja to use instead of the tokenizer's own.
    :param encoder: the input goes through an encoder, so that what the tokenizer appends to it
        (an end token) is kept. A text to be continued must not end so.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: Collection[int],
        n_vocab: int,
        chat_template: str | None,
        *,
        encoder: bool = False,
    ) -> None:
        self.n_vocab = n_vocab
        self.end_ids = frozenset(end_ids)
        self._tokenizer: Any = tokenizer
        self._template = chat_template
        self._backend: Any = (
            self._tokenizer.backend_tokenizer if getattr(tokenizer, "is_fast", False) else None
        )
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
        self._control = {
            token: text
            for token, text in self._added.items()
            if token in self._special or token in self.end_ids or _CONTROL_LIKE.fullmatch(text)
        }
        longest_first = sorted({*self._control.values()} - {""}, key=len, reverse=True)
        self._control_texts = (
            re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        )
        self._bos: int | None = self._tokenizer.bos_token_id
        self._prefix, self._suffix = self._surroundings()
        self._encoder = encoder
        self._texts: dict[int, str] = {}
        self._pieces = Pieces.of(self._backend, self._special)

    def ends(self, token_id: int) -> bool:
        """Whether this token ends a generation."""
        return token_id in self.end_ids

    # ── text to tokens ───────────────────────────────────────────────────────────────────────

    def prompt(
        self,
        prompt: str | None,
        messages: Sequence[ChatMessage] | None,
        tools: list[dict[str, Any]] | None = None,
    ) -> list[int]:
        """Token ids of a request's input.

        A ``prompt`` is taken as it is, special tokens included. What stands in ``messages`` and
        ``tools`` is text: a special token that somebody writes into a message must not end it, or
        begin one of another role, so it is read as the characters that it consists of.

        :raises ConfigurationError: there is no chat template, or it refuses the messages.
        """
        if prompt is not None:
            return self._surrounded(prompt, ended=self._encoder)
        tokens = self._conversation(messages or (), tools)
        while self._bos is not None and tokens[:2] == [self._bos, self._bos]:
            del tokens[0]
        return tokens

    def whole(self, text: str) -> list[int]:
        """Token ids of a text that is not to be continued: with an end token, where the tokenizer
        appends one. Embedding models that pool the last token were trained to look at that.
        """
        return self._surrounded(text, ended=True)

    def _surrounded(self, text: str, *, ended: bool) -> list[int]:
        """The text's tokens between what the tokenizer adds, unless that is written there."""
        tokens = self._encode(text)
        if tokens[: len(self._prefix)] != self._prefix:
            tokens = self._prefix + tokens
        if ended and self._suffix and tokens[-len(self._suffix) :] != self._suffix:
            tokens += self._suffix
        return tokens

    def count(self, text: str) -> int:
        """Tokens of ``text``, read as plain text, without any that the model adds."""
        return len(self._plain(text))

    def render(
        self, messages: Sequence[ChatMessage], tools: list[dict[str, Any]] | None = None
    ) -> str:
        """The messages as the model wants to read them.

        :raises ConfigurationError: there is no chat template, or it refuses the messages.
        """
        return self._render([_plain_message(m) for m in messages], tools)

    def _conversation(
        self, messages: Sequence[ChatMessage], tools: list[dict[str, Any]] | None
    ) -> list[int]:
        plain = [_plain_message(m) for m in messages]
        control = self._control_texts
        if control is None or not any(control.search(s) for s in _strings([plain, tools])):
            return self._encode(self._render(plain, tools))
        literals: list[str] = []
        nonce = secrets.token_hex(8)  # letters and digits: filters of templates leave them alone

        def shield(match: re.Match[str]) -> str:
            literals.append(match[0])
            return f"x{nonce}x{len(literals) - 1}x"

        def shielded(text: str) -> str:
            return control.sub(shield, text)

        rendered = self._render(_mapped(plain, shielded), _mapped(tools, shielded))
        parts = re.split(f"x{nonce}x(\\d+)x", rendered)
        named = [literals[int(number)] for number in parts[1::2]]
        return self._broken(parts[::2], named)

    def _render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        from jinja2.exceptions import TemplateError

        if self._template is None and not self._tokenizer.chat_template:
            raise ConfigurationError(
                "the model's tokenizer has no chat template; send prompt= instead of messages=, "
                "or set the option chat_template"
            )
        roles = " → ".join(message["role"] for message in messages)
        try:
            # Jinja in the immutable sandbox.
            prompt: str = self._tokenizer.apply_chat_template(
                messages,
                tools=tools or None,
                chat_template=self._template,
                add_generation_prompt=True,
                tokenize=False,
            )
            prompt.encode()  # a template may write what UTF-8 has no bytes for
        except Exception as error:  # it is foreign code, and may fail in any way
            if type(error) is TemplateError:  # what raise_exception in a template raises
                raise ConfigurationError(
                    f"the model's chat template refuses these messages: {error} (roles: {roles}); "
                    "change their roles or their order"
                ) from error
            raise ConfigurationError(
                f"the model's chat template fails on these messages (roles: {roles}): "
                f"{type(error).__name__}: {error}; send prompt= instead, or set the option "
                "chat_template"
            ) from error
        return prompt

    def _encode(self, text: str, *, add: bool = False) -> list[int]:
        if self._backend is not None:
            tokens: list[int] = self._backend.encode(text, add_special_tokens=add).ids
        else:
            tokens = list(self._tokenizer.encode(text, add_special_tokens=add))
        return tokens

    def _surroundings(self) -> tuple[list[int], list[int]]:
        """What the tokenizer writes before and after a text."""
        bare, whole = self._encode("a"), self._encode("a", add=True)
        for at in range(len(whole) - len(bare) + 1):
            if whole[at : at + len(bare)] == bare:
                return whole[:at], whole[at + len(bare) :]
        return [], []

    def _plain(self, text: str) -> list[int]:
        """Tokens of a text in which there are no special ones."""
        control = self._control_texts
        if control is None or not control.search(text):
            return self._encode(text)
        parts = control.split(text)
        return self._broken(parts, control.findall(text))

    def _broken(self, parts: Sequence[str], literals: Sequence[str]) -> list[int]:
        """Tokens of ``parts`` with ``literals`` between them that are not read as special.

        Each literal gets a character into it that breaks it, whose tokens are taken out again:
        so that the text is read in one piece, as spaces at its joints depend on.
        """
        text = parts[0]
        places: set[tuple[int, int]] = set()
        for literal, part in zip(literals, parts[1:], strict=True):
            places.add((len(text) + 1, len(text) + 2))
            text += literal[:1] + _BREAK + literal[1:] + part
        if self._backend is not None:
            encoding = self._backend.encode(text, add_special_tokens=False)
            found = encoding.offsets
            breaks = {start for start, _ in places}
            clean = places.issubset(found) and not any(
                at in breaks for start, end in found if end - start > 1 for at in range(start, end)
            )
            if clean:
                tokens = zip(encoding.ids, found, strict=True)
                return [token for token, offsets in tokens if offsets not in places]
        # No offsets to go by, or the character has melted into its neighbours.
        joined = self._encode(parts[0])
        for literal, part in zip(literals, parts[1:], strict=True):
            joined += self._in_halves(literal) + self._encode(part)
        return joined

    def _in_halves(self, literal: str) -> list[int]:
        unknown = self._tokenizer.unk_token_id
        tokens = self._encode(literal[:1]) + self._encode(literal[1:])
        if any(token in self._control and token != unknown for token in tokens):
            tokens = [token for char in literal for token in self._encode(char)]
        return [t for t in tokens if t not in self._control or t == unknown]

    # ── tokens to text ───────────────────────────────────────────────────────────────────────

    def decoder(self, prompt_ids: Sequence[int]) -> Decoder:
        """A decoder of what is generated after this prompt. To be used by one thread at a time.

        What it gives, joined, is the text of the whole without that of the prompt: special
        tokens are left out, and the spaces that the model wrote stay as they are.
        """
        if self._pieces is not None:
            return PieceDecoder(self._pieces, first=not any(map(self._shows, prompt_ids)))
        seed: list[int] = []
        for token in reversed(prompt_ids):
            if self._shows(token):
                seed.insert(0, token)
                if len(seed) == WINDOW:
                    break
        return WindowDecoder(self._decode, seed, self._shows)

    def token_text(self, token_id: int) -> str:
        """A token's own text, special ones included; empty for ids beyond the tokenizer's."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._text_of(token_id)
        return text

    def _text_of(self, token_id: int) -> str:
        if token_id in self._added:
            return self._added[token_id]
        if not 0 <= token_id < len(self._tokenizer):
            return ""
        if self._pieces is not None:
            return self._pieces[token_id].decode("utf-8", "replace")
        return self._decode([token_id])

    def _shows(self, token_id: int) -> bool:
        return token_id not in self._special and bool(self.token_text(token_id))

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


# ── messages ─────────────────────────────────────────────────────────────────────────────────


def _plain_message(message: ChatMessage) -> dict[str, Any]:
    """As templates want it: the arguments of a call as a mapping, not as JSON in a string."""
    plain = message.model_dump(exclude_none=True)
    for call in plain.get("tool_calls", ()):
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                arguments = json.loads(function["arguments"])
            except (ValueError, RecursionError):
                continue
            if isinstance(arguments, dict):
                function["arguments"] = arguments
    return plain


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _strings(key)
            yield from _strings(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _strings(each)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """The same value with each of its strings changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_mapped(key, change): _mapped(each, change) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(each, change) for each in value]
    return value
