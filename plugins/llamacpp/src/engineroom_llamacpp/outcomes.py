"""What requests get of a step: tokens, text, log probabilities and the end."""

from __future__ import annotations

from collections.abc import Sequence

from engineroom import TokenLogprob, TokenStep
from engineroom.engine import NoNumbersError, largest, logprob_maker, top_logprobs
from engineroom_llamacpp.context import LlamaContext
from engineroom_llamacpp.model import END, LlamaModel
from engineroom_llamacpp.sequences import Sequences
from engineroom_llamacpp.tasks import Row, Task

__all__ = ["Outcomes"]


class Outcomes:
    """Turns the logits of a step into what its requests get.

    What was proposed and turns out wrong is taken out of ``sequences``, and beams follow each
    other there.
    """

    def __init__(self, model: LlamaModel, context: LlamaContext, sequences: Sequences) -> None:
        self._model = model
        self._logprob = logprob_maker(model.token_text)
        self._context = context
        self._sequences = sequences
        self.proposed = self.accepted = 0
        """Tokens that were proposed, and those of them that were right."""

    def ends(self, token: int) -> bool:
        """Whether a token ends the generation."""
        return self._model.piece(token) is END

    def of(self, task: Task, row: Row) -> TokenStep | None:
        """What a request gets of its row; ``None``: nothing that can be shown yet.

        :raises NoNumbersError: its logits have no finite maximum.
        """
        return self._search(task, row) if task.beams else self._next_tokens(task, row)

    def _next_tokens(self, task: Task, row: Row) -> TokenStep:
        """Its next token, and those after it as long as what was proposed is right."""
        step = TokenStep()
        tokens: list[int] = []
        text = b""
        odds: list[TokenLogprob] = []
        proposed, task.proposed = task.proposed, []
        for depth in range(row.outputs):
            logits = self._context.logits(row.first + depth)
            try:
                token = task.sampler.sample(logits)
            except NoNumbersError:
                if not depth:
                    raise
                task.cached -= 1  # what was right before is computed again, alone
                break
            piece = self._model.piece(token)
            if piece is END:
                step.finish = "eos_token"
            else:
                task.tokens.append(token)
                tokens.append(token)
                text += piece or b""
                if task.logprobs is not None:
                    odds.append(self._logprob(token, *top_logprobs(logits, token, task.logprobs)))
                if len(task.tokens) >= task.limit:
                    step.finish = "length"
            if depth < len(proposed):
                self.proposed += 1
                if step.finish is None and proposed[depth] == token:
                    self.accepted += 1
                    task.cached += 1
                    continue
            break
        self._sequences.cut(task.sequences[0], task.cached)
        step.token_ids, step.text = tokens, text
        if odds:
            step.logprobs = odds
        return _announced(task, step)

    def _search(self, task: Task, row: Row) -> TokenStep | None:
        """Let the beams go on; the best one, when the search has ended."""
        search = task.beams
        assert search is not None
        found = []
        for place, beam in enumerate(search.running):
            logits = self._context.logits(row.first + place)
            odds = task.sampler.log_probabilities(logits, beam.tokens)
            count = min(search.candidates, odds.size)
            found.append([(int(i), float(odds[i])) for i in largest(odds, count)])
        if search.advance(found):
            self._follow(task, [beam.parent for beam in search.running])
            return None
        best = search.best.tokens
        ended = self.ends(best[-1])
        tokens = best[:-1] if ended else best
        text = b"".join(self._model.piece(token) or b"" for token in tokens)
        step = TokenStep(tokens, text, finish="eos_token" if ended else "length")
        # Of what the first beam has, only the prompt is known to be in ``tokens``.
        task.cached = len(task.tokens)
        self._sequences.cut(task.sequences[0], task.cached)
        return _announced(task, step)

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


def _announced(task: Task, step: TokenStep) -> TokenStep:
    """The first time with the counts of its prompt."""
    if not task.announced:
        task.announced = True
        step.prompt_tokens = task.prompt_tokens
        step.cached_prompt_tokens = min(task.reused or 0, task.prompt_tokens)
    return step
