"""Text to tokens and back, with the model's own tokeniser and chat template."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from typing import Any, Final

from engineroom import ChatMessage, ConfigurationError
from engineroom_vllm.sampling import stops_alone

__all__ = ["TextCodec", "byte_alphabet"]

_BYTE: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TextCodec:
    """The vocabulary of one model: encodes prompts and says which bytes a token stands for.

    Bytes, not text: a token may end inside a character, and putting characters together is done
    by engineroom, alike for all runtimes. Where a tokeniser does not tell bytes (few that
    generate text do not), ``knows_bytes`` is false, and vLLM's own text is used.

    :param tokenizer: as transformers has it.
    :param template: a chat template to use instead of the model's own.
    :raises ConfigurationError: the tokeniser is of a kind that cannot be used.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        from tokenizers import Tokenizer

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ConfigurationError(
                f"the model's tokeniser ({type(tokenizer).__name__}) is of a kind that is not "
                "known here; a folder with a tokenizer.json is needed, which transformers writes "
                "with tokenizer.save_pretrained"
            )
        source = backend.to_str()
        self._hf = tokenizer
        self._template = template
        self._tokenizer = _plainly(Tokenizer.from_str(source))
        self._plain = _plainly(Tokenizer.from_str(source))
        self._plain.encode_special_tokens = True  # it reads them as the text that they are
        added = self._tokenizer.get_added_tokens_decoder()
        self._pieces: dict[int, bytes] = {
            number: b"" if token.special else token.content.encode()
            for number, token in added.items()
        }
        self._kind = _decoder(json.loads(source).get("decoder"))
        self._begin, self._end = self._marks()
        texts = sorted((t.content for t in added.values() if t.special), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, texts))) if texts else None
        end = getattr(tokenizer, "eos_token_id", None)
        self.end_token: int | None = end if isinstance(end, int) else None

    @property
    def knows_bytes(self) -> bool:
        """Whether :meth:`piece` can be asked."""
        return self._kind is not None

    # ── text to tokens ───────────────────────────────────────────────────────────────────────

    def count(self, text: str) -> int:
        """Tokens of ``text`` as plain text."""
        return len(self._plain.encode(text, add_special_tokens=False).ids)

    def prompt(self, prompt: str | None, messages: Sequence[ChatMessage] | None) -> list[int]:
        """Token ids of a request's input; what the model wants at the beginning is added.

        A ``prompt`` is taken as it is, special tokens included. What stands in ``messages`` is
        text: nobody ends a message, or begins another, by writing a special token into one.

        :raises ConfigurationError: there is no chat template, or it refuses the messages.
        """
        if prompt is not None:
            return self._from_beginning(prompt)
        special = self._special
        messages = messages or ()
        if special is None or not any(special.search(m.content or "") for m in messages):
            return self._from_beginning(self.render(messages))
        # The template works on stand-ins, which are encoded as plain text afterwards.
        literals: list[str] = []
        nonce = secrets.token_hex(8)

        def stand_in(match: re.Match[str]) -> str:
            literals.append(match[0])
            return f"\ue000{nonce}.{len(literals) - 1}\ue001"

        shielded = [
            m
            if m.content is None
            else m.model_copy(update={"content": special.sub(stand_in, m.content)})
            for m in messages
        ]
        first, *rest = re.split(f"\ue000{nonce}\\.(\\d+)\ue001", self.render(shielded))
        ids = self._from_beginning(first)
        for number, text in zip(rest[::2], rest[1::2], strict=True):
            ids += self._plain.encode(literals[int(number)], add_special_tokens=False).ids
            ids += self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def whole(self, text: str) -> list[int]:
        """Token ids of a text with all that the model wants around it, for embeddings."""
        ids = self._from_beginning(text)
        ended = not self._end or ids[-len(self._end) :] == self._end
        return ids if ended else [*ids, *self._end]

    def _from_beginning(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        begins = ids[: len(self._begin)] == self._begin  # chat templates often write it as well
        return ids if begins else [*self._begin, *ids]

    def _marks(self) -> tuple[list[int], list[int]]:
        """What the tokeniser writes before a text, and after it."""
        found = self._tokenizer.encode("x")
        special = [bool(each) for each in found.special_tokens_mask]
        if all(special):
            return found.ids, []
        first, last = special.index(False), len(special) - special[::-1].index(False)
        return found.ids[:first], found.ids[last:]

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """The messages as the model wants to read them.

        transformers runs the template, in Jinja's sandbox: it comes with the model, so from
        anyone.

        :raises ConfigurationError: there is no chat template, or it refuses the messages.
        """
        template = self._template or self._hf.chat_template
        if not template:
            raise ConfigurationError(
                "the model has no chat template; send prompt= instead of messages=, or set the "
                "option chat_template"
            )
        from jinja2 import TemplateError

        roles = " → ".join(message.role for message in messages)
        try:
            rendered = self._hf.apply_chat_template(
                [m.model_dump(exclude_none=True) for m in messages],
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=True,
            )
            text = str(rendered)
            text.encode()  # a template may write what UTF-8 has no bytes for
        except TemplateError as error:
            raise ConfigurationError(
                f"the model's chat template refuses these messages: {error} (roles: {roles}); "
                "change their roles or their order"
            ) from error
        except Exception as error:  # a template is foreign code, and may fail in any way
            raise ConfigurationError(
                f"the model's chat template fails on these messages (roles: {roles}): "
                f"{type(error).__name__}: {error}; send prompt= instead, or set the option "
                "chat_template"
            ) from error
        return text

    def stop_tokens(self, stops: Sequence[str]) -> list[int]:
        """Tokens that are one of the stop sequences in whole, so that the engine may end there."""
        if not self.knows_bytes:
            return []
        found = []
        for stop in stops_alone(stops):
            ids = self._plain.encode(stop, add_special_tokens=False).ids
            if len(ids) == 1 and self.piece(ids[0]) == stop.encode():
                found.append(ids[0])
        return found

    # ── tokens to text ───────────────────────────────────────────────────────────────────────

    def piece(self, token: int) -> bytes:
        """The bytes that a token adds to the text; special tokens add none.

        Looked up once a token, then remembered.
        """
        try:
            return self._pieces[token]
        except KeyError:
            text = self._tokenizer.id_to_token(token)
            piece = self._pieces[token] = b"" if text is None else _bytes(text, self._kind)
            return piece

    def token_text(self, token: int) -> str:
        """A token's own text, special ones included, for log probabilities."""
        if self.knows_bytes and (piece := self.piece(token)):
            return piece.decode("utf-8", "replace")
        return self._tokenizer.id_to_token(token) or ""


def _plainly(tokenizer: Any) -> Any:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _decoder(content: Any) -> str | None:
    """How the vocabulary writes bytes: ``ByteLevel``, ``ByteFallback``, or not at all."""
    content = content or {}
    steps = [step.get("type") for step in (content, *content.get("decoders", ()))]
    return next((kind for kind in ("ByteLevel", "ByteFallback") if kind in steps), None)


def _bytes(token: str, kind: str | None) -> bytes:
    if kind == "ByteLevel":
        try:
            return bytes(_ALPHABET[character] for character in token)
        except KeyError:
            return token.encode()
    if match := _BYTE.fullmatch(token):
        return bytes((int(match[1], 16),))
    return token.replace("▁", " ").encode()


def byte_alphabet() -> dict[int, str]:
    """The character that stands for each byte in byte-level vocabularies (as of GPT-2).

    Printable characters of Latin-1 stand for themselves; the other bytes, in order, for the
    characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    alphabet = {byte: chr(0x100 + place) for place, byte in enumerate(others)}
    return alphabet | {byte: chr(byte) for byte in printable}


_ALPHABET: Final = {character: byte for byte, character in byte_alphabet().items()}
