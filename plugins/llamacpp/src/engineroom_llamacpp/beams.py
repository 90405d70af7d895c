"""Beam search in the cache: a sequence a beam, which has what its parent had."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

from engineroom import EngineRoomError, GenerationParams, TokenStep
from engineroom.engine import BatchSlice, BeamSearch, NoNumbersError, StepBatch, largest
from engineroom_llamacpp.context import LlamaContext
from engineroom_llamacpp.model import LlamaModel
from engineroom_llamacpp.outcomes import not_chosen
from engineroom_llamacpp.sequences import Sequences
from engineroom_llamacpp.tasks import Task

__all__ = ["Beams"]


class Beams:
    """Lets beams go on by a token, and follow each other in ``sequences``.

    :param ends: whether a token ends the generation.
    """

    def __init__(
        self,
        model: LlamaModel,
        context: LlamaContext,
        sequences: Sequences,
        ends: Callable[[int], bool],
    ) -> None:
        self._model = model
        self._context = context
        self._sequences = sequences
        self._ends = ends

    def search(self, params: GenerationParams, limit: int) -> BeamSearch | None:
        """The search that a request asks for; ``None``: none.

        :param limit: tokens that it may generate.
        """
        if (beams := params.num_beams or 1) <= 1:
            return None
        early = bool(params.early_stopping)
        return BeamSearch(beams, limit, self._ends, len(self._model.ends), early_stopping=early)

    def go_on(self, part: BatchSlice[Task], results: StepBatch[Task]) -> None:
        """Let a request's beams go on, and give it what came of that."""
        task = part.task
        task.cached += part.count
        if not part.outputs or task.cancelled:
            return
        try:
            step = self._advance(part)
        except NoNumbersError:
            results.without_numbers.append(task)
        except EngineRoomError as error:
            task.cache_invalid = True
            results.add(task, error)
        except Exception as error:
            task.log.exception("a token could not be chosen")
            task.cache_invalid = True
            results.add(task, not_chosen(error))
        else:
            if step is not None:
                results.add(task, step)

    def _advance(self, part: BatchSlice[Task]) -> TokenStep | None:
        """Let a request's beams go on; the best one, when the search has ended.

        :raises NoNumbersError: its logits have no finite maximum.
        """
        task, search = part.task, part.task.beams
        assert search is not None
        likeliest = []
        for place, beam in enumerate(search.running):
            logits = self._context.logits(part.first + place)
            logprobs = task.sampler.log_probabilities(logits, beam.tokens)
            count = min(search.candidates, logprobs.size)
            choices = [(int(i), float(logprobs[i])) for i in largest(logprobs, count)]
            likeliest.append([choice for choice in choices if choice[1] > -math.inf])
        if search.advance(likeliest):
            self._follow(task, [beam.parent for beam in search.running])
            return None
        best = search.best.tokens
        ended = self._ends(best[-1])
        tokens = best[:-1] if ended else best
        pieces = [self._model.piece(token) or b"" for token in tokens]
        # Of what the first beam has, only the prompt is known to be in ``tokens``.
        task.cached = len(task.tokens)
        self._sequences.cut(task.sequences[0], task.cached)
        return TokenStep(
            tokens,
            b"".join(pieces),
            finish="eos_token" if ended else "length",
            text_ends=tuple(accumulate(map(len, pieces))),
        )

    def _follow(self, task: Task, parents: Sequence[int]) -> None:
        """Give each beam a sequence with what its parent has."""
        heirs: dict[int, int] = {}
        for place, parent in enumerate(parents):
            heirs.setdefault(parent, place)
        for parent, sequence in enumerate(task.sequences):
            if parent not in heirs:
                self._sequences.give_back(sequence)
        task.sequences = [
            task.sequences[parent]
            if heirs[parent] == place
            else self._sequences.fork(task.sequences[parent])
            for place, parent in enumerate(parents)
        ]
