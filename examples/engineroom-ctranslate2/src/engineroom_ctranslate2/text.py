"""Text to tokens and back, with the folder's ``tokenizer.json`` and chat template."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Final

from engineroom import ConfigurationError
from engineroom.prompts import ModelTemplates, TokenizerCodec, surroundings
from engineroom_ctranslate2.folder import ModelFiles

__all__ = ["TextCodec"]

logger = logging.getLogger("engineroom.ctranslate2")


class TextCodec(TokenizerCodec):
    """The vocabulary of one model: encodes prompts and says which bytes a token stands for.

    :param template: a chat template to use instead of the folder's own.
    :raises ConfigurationError: ``tokenizer.json`` is missing or damaged, belongs to another
        model, or is of a kind that is not known here; or the template is not valid.
    """

    def __init__(self, files: ModelFiles, template: str | None = None) -> None:
        from tokenizers import Tokenizer

        path = files.path / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ConfigurationError(
                f"{str(files.path)!r} has no tokenizer.json; copy it from the model that was "
                "converted"
            ) from error
        except Exception as error:  # the tokenizers library raises plain Exceptions
            raise ConfigurationError(f"{str(path)!r} is damaged: {error}") from error
        self.vocabulary: Final = files.vocabulary
        self._check(tokenizer.get_vocab(with_added_tokens=True), path.name)
        tokenizer.no_padding()
        begin = "".join(self.vocabulary[token] for token in surroundings(tokenizer)[0])
        templates = ModelTemplates(
            template,
            files.chat_template,
            {"bos_token": begin, "eos_token": files.end_token},
            lambda error: logger.warning("%s; only prompt= can be used", error),
        )
        ends = [i for i, token in enumerate(files.vocabulary) if token == files.end_token]
        super().__init__(tokenizer, templates, ends)
        if not self.knows_bytes:
            raise ConfigurationError(
                f"{str(path)!r} has a decoder of a kind that is not known here "
                f"({', '.join(sorted(self.kinds)) or 'none'}); those with ByteLevel or "
                "ByteFallback are, which nearly all models that generate text have"
            )

    def _check(self, tokens: Mapping[str, int], name: str) -> None:
        for token, number in tokens.items():
            if number >= len(self.vocabulary) or self.vocabulary[number] != token:
                raise ConfigurationError(
                    f"{name} and vocabulary.json are of different models: token {number} is "
                    f"{token!r} in the one and not in the other; convert the model again"
                )

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The tokens as CTranslate2 wants them: by their text."""
        return [self.vocabulary[i] for i in ids]
