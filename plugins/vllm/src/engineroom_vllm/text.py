"""Text to tokens and back, with the model's own tokeniser and chat template."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Final

from engineroom import ConfigurationError
from engineroom.prompts import ChatOptions, ModelTemplates, TokenizerCodec
from engineroom_vllm.sampling import stops_alone

__all__ = ["TextCodec"]

_INLINE_CHARS: Final = 1000
"""Of stop sequences that are read at once, on the event loop."""
_CHARS_OF_STOP: Final = 50
"""What each counts beside its own."""

logger = logging.getLogger("engineroom.vllm")


class TextCodec(TokenizerCodec):
    """The vocabulary of one model, on a copy of its tokeniser that vLLM does not use.

    Where a tokeniser does not tell bytes (few that generate text do not), ``knows_bytes`` is
    false, and vLLM's own text is used.

    :param tokenizer: as transformers has it.
    :param options: the model's, or a chat template to use instead of its own.
    :raises ConfigurationError: the tokeniser is of a kind that cannot be used, or the template is
        not valid.
    """

    def __init__(self, tokenizer: Any, options: ChatOptions | str | None = None) -> None:
        from tokenizers import Tokenizer

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ConfigurationError(
                f"the model's tokeniser ({type(tokenizer).__name__}) is of a kind that is not "
                "known here; a folder with a tokenizer.json is needed, which transformers writes "
                "with tokenizer.save_pretrained"
            )
        end = getattr(tokenizer, "eos_token_id", None)
        self.end_token: int | None = end if isinstance(end, int) else None
        super().__init__(
            Tokenizer.from_str(backend.to_str()),
            ModelTemplates(
                options,
                tokenizer.chat_template,
                getattr(tokenizer, "special_tokens_map", {}),
                lambda error: logger.warning("%s; only prompt= can be used", error),
            ),
            () if self.end_token is None else (self.end_token,),
        )

    def stop_tokens(self, stops: Sequence[str]) -> list[int]:
        """Tokens that are one of the stop sequences in whole, so that the engine may end there."""
        if not self.knows_bytes:
            return []
        alone = [(stop, self.plain(stop)) for stop in stops_alone(stops)]
        return [i[0] for stop, i in alone if len(i) == 1 and self.piece(i[0]) == stop.encode()]

    async def find_stop_tokens(self, stops: Sequence[str]) -> list[int]:
        """The same on an event loop: many stop sequences are read where prompts are."""
        size = sum(map(len, stops)) + _CHARS_OF_STOP * len(stops)
        if size <= _INLINE_CHARS:
            return self.stop_tokens(stops)
        return await self.lane.run(lambda: self.stop_tokens(stops), size=size)
