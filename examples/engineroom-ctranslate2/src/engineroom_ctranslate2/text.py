"""Text to tokens and back, with the folder's ``tokenizer.json`` and chat template."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn

from engineroom import ChatMessage, ConfigurationError
from engineroom_ctranslate2.folder import ModelFiles

if TYPE_CHECKING:
    from jinja2 import Template
    from tokenizers import Tokenizer

__all__ = ["TextCodec", "byte_alphabet"]

_BYTE: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TextCodec:
    """The vocabulary of one model: encodes prompts and says which bytes a token stands for.

    Bytes, not text: a token may end inside a character, and putting characters together is done
    by engineroom, alike for all runtimes.

    :param template: a chat template to use instead of the folder's own.
    :raises ConfigurationError: ``tokenizer.json`` is missing or damaged, belongs to another
        model, or is of a kind that is not known here; or the template is not valid.
    """

    def __init__(self, files: ModelFiles, template: str | None = None) -> None:
        from tokenizers import Tokenizer

        path = files.path / "tokenizer.json"
        try:
            source = path.read_text(encoding="utf-8")
            content = json.loads(source)
            self._tokenizer: Tokenizer = Tokenizer.from_str(source)
            self._plain: Tokenizer = Tokenizer.from_str(source)
        except FileNotFoundError as error:
            raise ConfigurationError(
                f"{str(files.path)!r} has no tokenizer.json; copy it from the model that was "
                "converted"
            ) from error
        except Exception as error:  # the tokenizers library raises plain Exceptions
            raise ConfigurationError(f"{str(path)!r} is damaged: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._plain.no_truncation()
        self._plain.no_padding()
        self._plain.encode_special_tokens = True  # it reads them as the text that they are
        self.vocabulary: Final = files.vocabulary
        self._check(path.name)
        self._pieces = self._make_pieces(content, str(path))
        begin = self._tokenizer.encode("x")
        self._begin = [
            token
            for token, special in zip(begin.ids, begin.special_tokens_mask, strict=True)
            if special
        ]
        added = self._tokenizer.get_added_tokens_decoder().values()
        texts = sorted((t.content for t in added if t.special), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, texts))) if texts else None
        self._template = self._compile(template or files.chat_template, files)

    def _check(self, name: str) -> None:
        for token, number in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if number >= len(self.vocabulary) or self.vocabulary[number] != token:
                raise ConfigurationError(
                    f"{name} and vocabulary.json are of different models: token {number} is "
                    f"{token!r} in the one and not in the other; convert the model again"
                )

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
            m.model_copy(update={"content": special.sub(stand_in, m.content or "")})
            for m in messages
        ]
        first, *rest = re.split(f"\ue000{nonce}\\.(\\d+)\ue001", self.render(shielded))
        ids = self._from_beginning(first)
        for number, text in zip(rest[::2], rest[1::2], strict=True):
            ids += self._plain.encode(literals[int(number)], add_special_tokens=False).ids
            ids += self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _from_beginning(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        begins = ids[: len(self._begin)] == self._begin  # chat templates often write it as well
        return ids if begins else [*self._begin, *ids]

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """The messages as the model wants to read them."""
        if self._template is None:
            raise ConfigurationError(
                "the model has no chat template; send prompt= instead of messages=, or set the "
                "option chat_template"
            )
        try:
            return self._template.render(
                messages=[m.model_dump(exclude_none=True) for m in messages],
                add_generation_prompt=True,
            )
        except _RefusedError as error:
            roles = " → ".join(m.role for m in messages)
            raise ConfigurationError(
                f"the model's chat template refuses these messages: {error} (roles: {roles}); "
                "change their roles or their order"
            ) from error
        except Exception as error:  # a template is foreign code, and may fail in any way
            raise ConfigurationError(
                f"the model's chat template fails on these messages: {type(error).__name__}: "
                f"{error}; send prompt= instead, or set the option chat_template"
            ) from error

    def _compile(self, source: str | None, files: ModelFiles) -> Template | None:
        if source is None:
            return None
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        # A template comes with a model, so from anyone.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = json.dumps  # Jinja's own escapes for HTML
        environment.globals["raise_exception"] = _refuse
        environment.globals["eos_token"] = files.end_token
        environment.globals["bos_token"] = "".join(self.vocabulary[i] for i in self._begin)
        try:
            return environment.from_string(source)
        except TemplateError as error:
            raise ConfigurationError(f"the chat template is not valid: {error}") from error

    # ── tokens to text ───────────────────────────────────────────────────────────────────────

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The tokens as CTranslate2 wants them: by their text."""
        return [self.vocabulary[i] for i in ids]

    def piece(self, token: int) -> bytes:
        """The bytes that a token adds to the text; special tokens add none."""
        return self._pieces[token]

    def token_text(self, token: int) -> str:
        """A token's own text, for log probabilities."""
        return self._pieces[token].decode("utf-8", "replace") or self.vocabulary[token]

    def _make_pieces(self, content: dict[str, Any], path: str) -> list[bytes]:
        decoder = content.get("decoder") or {}
        steps = [step.get("type") for step in (decoder, *decoder.get("decoders", ()))]
        if "ByteLevel" in steps:
            alphabet = {character: byte for byte, character in byte_alphabet().items()}

            def decode(token: str) -> bytes:
                try:
                    return bytes(alphabet[character] for character in token)
                except KeyError:
                    return token.encode()
        elif "ByteFallback" in steps:

            def decode(token: str) -> bytes:
                if match := _BYTE.fullmatch(token):
                    return bytes((int(match[1], 16),))
                return token.replace("▁", " ").encode()
        else:
            raise ConfigurationError(
                f"{path!r} has a decoder of a kind that is not known here "
                f"({', '.join(filter(None, steps)) or 'none'}); those with ByteLevel or "
                "ByteFallback are, which nearly all models that generate text have"
            )
        pieces = [decode(token) for token in self.vocabulary]
        for number, token in self._tokenizer.get_added_tokens_decoder().items():
            pieces[number] = b"" if token.special else token.content.encode()
        return pieces


class _RefusedError(Exception):
    """What ``raise_exception`` in a template raises."""


def _refuse(message: str) -> NoReturn:
    raise _RefusedError(message)


def byte_alphabet() -> dict[int, str]:
    """The character that stands for each byte in byte-level vocabularies (as of GPT-2).

    Printable characters of Latin-1 stand for themselves; the other bytes, in order, for the
    characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    alphabet = {byte: chr(0x100 + place) for place, byte in enumerate(others)}
    return alphabet | {byte: chr(byte) for byte in printable}
