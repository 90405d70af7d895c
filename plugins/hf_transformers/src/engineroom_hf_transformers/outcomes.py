"""The tokens of a step, chosen from its logits, and their text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from engineroom import EngineRoomError, TokenLogprob
from engineroom.engine import BatchSlice, Choice, Chosen, MakeLogprob, PromptScores
from engineroom_hf_transformers.sampling import choose, logprobs_of, logprobs_of_rows
from engineroom_hf_transformers.step_errors import nonsense
from engineroom_hf_transformers.tasks import Task

if TYPE_CHECKING:
    import torch

    from engineroom_hf_transformers.tokens import Vocabulary

__all__ = ["Outcomes"]


class Outcomes:
    """What :class:`~engineroom.engine.Scheduler` is told of a step.

    :param logits: rows × vocabulary, float32.
    """

    def __init__(
        self, logits: torch.Tensor, vocabulary: Vocabulary, make_logprob: MakeLogprob
    ) -> None:
        self._logits = logits
        self._vocabulary = vocabulary
        self.make_logprob = make_logprob

    def choose(self, places: Sequence[tuple[BatchSlice[Task], int]]) -> list[Chosen]:
        """See :class:`~engineroom.engine.StepOutputs`: for all places at once."""
        rows = [part.first + depth for part, depth in places]
        logits = self._logits if len(rows) == self._logits.shape[0] else self._logits[rows]
        tasks = [part.task for part, _ in places]
        tokens = choose(logits, [task.sampling for task in tasks])
        logprobs = self._logprobs(logits, tasks, tokens)
        return [
            nonsense()
            if token is None
            else Choice(token, logprobs.get(place))
            if isinstance(token, int)
            else token
            for place, token in enumerate(tokens)
        ]

    def _logprobs(
        self,
        logits: torch.Tensor,
        tasks: Sequence[Task],
        tokens: Sequence[int | EngineRoomError | None],
    ) -> dict[int, TokenLogprob]:
        """Place → log probability, where a request asks for it and has a token."""
        chosen = {
            place: (token, task.logprobs)
            for place, (task, token) in enumerate(zip(tasks, tokens, strict=True))
            if task.logprobs is not None and isinstance(token, int)
        }
        if not chosen:
            return {}
        ids, counts = zip(*chosen.values(), strict=True)
        computed = logprobs_of(logits[list(chosen)], ids, counts)
        return {
            place: self.make_logprob(token, own, best)
            for place, token, (own, best) in zip(chosen, ids, computed, strict=True)
        }

    def prompt_scores(
        self, part: BatchSlice[Task], tokens: Sequence[int]
    ) -> PromptScores | EngineRoomError:
        """See :class:`~engineroom.engine.StepOutputs`."""
        rows = self._logits[part.first - part.prompt_rows : part.first]
        scores = logprobs_of_rows(rows, tokens, part.task.prompt_logprobs or 0)
        return nonsense() if scores is None else scores

    def text(self, task: Task, token: int) -> str | None:
        """See :class:`~engineroom.engine.StepOutputs`."""
        return None if self._vocabulary.ends(token) else task.decoder.feed(token)

    def rest(self, task: Task) -> str:
        """What the request's decoder held back."""
        return task.decoder.finish()
