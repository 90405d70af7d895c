"""What a decoding step of one request gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from engineroom.schemas import FinishReason, PromptLogprob, TokenLogprob

__all__ = ["LAST_STEP", "TokenStep"]


@dataclass(slots=True)
class TokenStep:
    """What one decoding step of one request gave: usually one token.

    :param token_ids: the tokens, without the end-of-sequence token.
    :param text: their text, or their bytes where a token may end inside a character.
    :param text_ends: of several tokens, how long ``text`` is behind each of them. Without it,
        a step that goes beyond ``min_tokens`` is searched for stop sequences as a whole.
    :param logprobs: one entry a token, where the request asked for them.
    :param finish: why the generation ends with this step; ``None``: it goes on.
    :param prompt_tokens: tokens of the prompt; said once, in any step.
    :param cached_prompt_tokens: those whose work was reused; said once, in any step.
    :param prompt_tail: the last characters of a prompt that a chat template wrote, 64 or fewer;
        said once, before any text.
    :param prompt_logprobs: entries of the prompt's next tokens, where the request asked for them:
        in their order, in one step or in several, and all before the first generated token.
    """

    token_ids: Sequence[int] = ()
    text: str | bytes = b""
    logprobs: Sequence[TokenLogprob] | None = None
    finish: FinishReason | None = None
    prompt_tokens: int | None = None
    cached_prompt_tokens: int | None = None
    prompt_tail: str | None = None
    prompt_logprobs: Sequence[PromptLogprob] | None = None
    text_ends: Sequence[int] = ()


LAST_STEP: Final = TokenStep(finish="eos_token")
"""What a generator of steps that ends without having said why is taken to have yielded."""
