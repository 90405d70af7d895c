"""The tokens of a step, chosen from its logits, and their text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from engineroom import EngineRoomError, InferenceError
from engineroom.engine import (
    BatchSlice,
    Choice,
    Chosen,
    Logits,
    NoNumbersError,
    PromptScores,
    logprob_maker,
    top_logprobs,
)
from engineroom_llamacpp.context import LlamaContext
from engineroom_llamacpp.model import END, LlamaModel
from engineroom_llamacpp.tasks import Task

__all__ = ["Outcomes", "nonsense", "not_chosen"]


class Outcomes:
    """What :class:`~engineroom.engine.Scheduler` is told of the context's last step."""

    def __init__(self, model: LlamaModel, context: LlamaContext) -> None:
        self._piece = model.piece
        self.make_logprob = logprob_maker(model.token_bytes)
        self._context = context

    def ends(self, token: int) -> bool:
        """Whether a token ends the generation."""
        return self._piece(token) is END

    def choose(self, places: Sequence[tuple[BatchSlice[Task], int]]) -> list[Chosen]:
        """See :class:`~engineroom.engine.StepOutputs`. What fails fails its request alone."""
        return [self._choose(part.task, part.first + depth) for part, depth in places]

    def _choose(self, task: Task, row: int) -> Chosen:
        try:
            logits = self._context.logits(row)
            token = task.sampler.sample(logits)
            if task.logprobs is None:
                return Choice(token)
            own, best = top_logprobs(logits, token, task.logprobs)
            return Choice(token, self.make_logprob(token, own, best))
        except NoNumbersError:
            return None
        except EngineRoomError as error:
            return error
        except Exception as error:
            task.log.exception("a token could not be chosen")
            return not_chosen(error)

    def prompt_scores(self, part: BatchSlice[Task], tokens: Sequence[int]) -> PromptScores | None:
        """See :class:`~engineroom.engine.StepOutputs`."""
        first, count = part.first - part.prompt_rows, part.task.prompt_logprobs or 0
        try:
            return [
                top_logprobs(_finite(self._context.logits(first + row)), token, count)
                for row, token in enumerate(tokens)
            ]
        except NoNumbersError:
            return None

    def text(self, task: Task, token: int) -> bytes | None:
        """See :class:`~engineroom.engine.StepOutputs`."""
        piece = self._piece(token)
        return None if piece is END else piece or b""

    def rest(self, task: Task) -> bytes:
        """Nothing: bytes are handed over as they come."""
        return b""


def _finite(logits: Logits) -> Logits:
    """A row that has a largest number. :raises NoNumbersError: it has none."""
    if not math.isfinite(logits.max()):
        raise NoNumbersError
    return logits


def not_chosen(error: Exception) -> InferenceError:
    """What a request hears for which choosing a token failed."""
    return InferenceError(f"a token could not be chosen: {type(error).__name__}: {error}")


def nonsense() -> InferenceError:
    """What a request hears whose next token cannot be chosen."""
    return InferenceError(
        "the model computed no numbers for the next token (NaN or infinity); its weights are "
        "damaged, or the type of its cache is too narrow: load it with cache_type_k and "
        "cache_type_v f32 or bf16, or another quantisation of it"
    )
