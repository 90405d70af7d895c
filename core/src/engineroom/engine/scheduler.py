"""What a step of text is on every runtime: proposing, verifying, announcing and leaving.

An engine's step is *schedule, run, postprocess*. A runtime writes how tokens lie in its batch and
computes it; what may come next, what of it was right, what each request gets and when it leaves
are the same for all, and stand here::

    def step(self) -> None:
        slices = self._schedule()  # scheduler.propose(...), then who has how many tokens
        outputs = self._run(slices)
        self.scheduler.postprocess(slices, outputs).send()
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeAlias, TypeVar

from engineroom.engine.batching import BatchingEngine, EngineTask
from engineroom.engine.logprobs import MakeLogprob, first_of_prompt
from engineroom.engine.prompt_lookup import Drafter, DraftRequest
from engineroom.errors import EngineRoomError
from engineroom.generation.steps import TokenStep
from engineroom.schemas import PromptLogprob, TokenLogprob

__all__ = [
    "BatchSlice",
    "Choice",
    "Chosen",
    "PromptScores",
    "Scheduler",
    "StepBatch",
    "StepOutputs",
    "TextTask",
]


@dataclass(eq=False, slots=True, kw_only=True)
class TextTask(EngineTask):
    """One request for text on its way through an engine. Runtimes add what they need.

    :param tokens: the prompt's tokens, then the generated ones.
    :param limit: length of ``tokens`` at which it ends with ``length``.
    :param logprobs: how many likeliest tokens to tell with each; ``None``: no log probabilities.
    :param prompt_logprobs: the same of the prompt's tokens.
    :param told: how many of the prompt's tokens its reader has the log probabilities of.
    :param cache_scope: the request's; what is computed in another one is of no use to it.
    :param cached: how many of ``tokens`` are in the cache; the rest is still to be computed.
    :param reused: how many of the prompt's another request had computed; ``None``: it has not
        begun.
    :param draft: tokens that may come next, to be verified in the step.
    :param cache_invalid: what it wrote to the cache may be no numbers.
    :param announced: its reader knows ``prompt_tokens`` and what was reused.
    """

    tokens: list[int]
    prompt_tokens: int
    limit: int
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    told: int = 0
    cache_scope: str = ""
    cached: int = 0
    reused: int | None = None
    draft: list[int] = field(default_factory=list)
    cache_invalid: bool = False
    announced: bool = False

    @property
    def sequence(self) -> int:
        """Where its tokens lie in the runtime's cache, by which a drafter knows it."""
        raise NotImplementedError

    @property
    def decodes(self) -> bool:
        """Whether all but its last token is computed."""
        return len(self.tokens) - self.cached <= 1

    @property
    def reusable(self) -> int:
        """How many of its tokens may be taken as others have computed them. Of those behind, the
        logits are wanted, which are in no cache.
        """
        if self.prompt_logprobs is None or self.told >= self.prompt_tokens:
            return len(self.tokens)
        return max(self.told - 1, 0)

    def prompt_rows(self, count: int) -> int:
        """How many of its next tokens have logits that tell of the prompt: how likely the token
        behind each of them is. They are the last ones, but for that which is to be sampled from.

        :param count: tokens that it has in the step.
        """
        if self.prompt_logprobs is None:
            return 0
        end = min(self.cached + count, self.prompt_tokens - 1)
        return max(0, end - max(self.told - 1, self.cached))


_T = TypeVar("_T", bound=TextTask)


@dataclass(slots=True)
class BatchSlice(Generic[_T]):
    """A request's part of a step: its last token and its draft, or a chunk of its prompt.

    :param count: tokens of each of its sequences.
    :param first: index of the first row of logits that is its own; the others follow.
    :param outputs: how many are.
    :param prompt_rows: how many rows right before ``first`` tell of the prompt.
    """

    task: _T
    count: int
    first: int
    outputs: int
    prompt_rows: int = field(default=0, kw_only=True)


class Choice(NamedTuple):
    """A token that was chosen, and its log probability where the request asks for it."""

    token: int
    logprob: TokenLogprob | None = None


Chosen: TypeAlias = Choice | EngineRoomError | None
"""What came of a row of logits: a token, an error that ends the request, or ``None``: no numbers,
of which the runtime thinks what to do."""


PromptScores: TypeAlias = Sequence[tuple[float, Sequence[tuple[int, float]]]]
"""For each token of a prompt its log probability, and the likeliest tokens with theirs."""


class StepOutputs(Protocol[_T]):
    """What a runtime computed in a step, and what it knows of tokens."""

    make_logprob: MakeLogprob

    def prompt_scores(
        self, part: BatchSlice[_T], tokens: Sequence[int]
    ) -> PromptScores | EngineRoomError | None:
        """What a slice's ``prompt_rows`` say of the tokens that come behind them; an error that
        ends the request; or ``None``: they are no numbers.
        """

    def choose(self, places: Sequence[tuple[BatchSlice[_T], int]]) -> Sequence[Chosen]:
        """The next token at each place: a slice, and which of its rows of logits it is."""

    def text(self, task: _T, token: int) -> str | bytes | None:
        """The text that a request's next token completes; ``None``: it ends the generation."""

    def rest(self, task: _T) -> str | bytes:
        """The text that was held back, when a request ends."""


@dataclass(slots=True, eq=False)
class StepBatch(Generic[_T]):
    """What a step gives its requests, all at once.

    Nobody leaves before :meth:`send`: a step that fails earlier can fail all of its requests.

    :param engine: whose requests they are.
    """

    engine: BatchingEngine[Any]
    without_numbers: list[_T] = field(default_factory=list)
    """Requests for which no token can be chosen."""
    _items: list[tuple[EngineTask, TokenStep | EngineRoomError]] = field(default_factory=list)

    def add(self, task: EngineTask, item: TokenStep | EngineRoomError) -> None:
        """Give a request its step, or the error that ends it; each request once."""
        self._items.append((task, item))

    def send(self) -> None:
        """Let those that have ended leave, and hand everything over."""
        for task, item in self._items:
            if isinstance(item, TokenStep):
                if isinstance(task, TextTask) and not task.announced:
                    task.announced = True
                    item.prompt_tokens = task.prompt_tokens
                    item.cached_prompt_tokens = min(task.reused or 0, task.prompt_tokens)
                if item.finish is None:
                    continue
            self.engine.leave(task)
        self.engine.hand_over((task.mailbox, item) for task, item in self._items)


@dataclass(slots=True, eq=False)
class Scheduler(Generic[_T]):
    """Proposes tokens before a step, and gives requests what came of it.

    :param engine: whose requests they are.
    :param drafter: proposes tokens; ``None``: nobody does.
    :param draft_tokens: most proposals of a request in a step.
    """

    engine: BatchingEngine[Any]
    drafter: Drafter | None = None
    draft_tokens: int = 0
    proposed: int = 0
    """Tokens that were proposed."""
    accepted: int = 0
    """Those of them that were right."""

    def propose(self, decoding: Iterable[_T], room: int) -> None:
        """Have tokens proposed that may come next, where they can be of use.

        :param decoding: requests that have a token in the step.
        :param room: most proposals of one of them.
        """
        if self.drafter is None:
            return
        tasks = list(decoding)
        requests = [
            DraftRequest(task.sequence, task.tokens, most, task.cache_scope)
            for task in tasks
            if (most := min(self.draft_tokens, room, task.limit - len(task.tokens) - 1)) > 0
        ]
        drafts = self.drafter.propose(requests) if requests else {}
        for task in tasks:
            task.draft = drafts.get(task.sequence, [])

    def forget(self, task: _T) -> None:
        """The request gives its place in the cache back."""
        if self.drafter is not None:
            self.drafter.forget(task.sequence)

    def postprocess(
        self, slices: Iterable[BatchSlice[_T]], outputs: StepOutputs[_T]
    ) -> StepBatch[_T]:
        """Each request's next token, and those after it as long as what was proposed is right.

        The first tokens of all requests are chosen together, then the second ones. What is
        proposed and turns out wrong does not count as cached.
        """
        batch: StepBatch[_T] = StepBatch(self.engine)
        items: dict[_T, TokenStep | EngineRoomError] = {}
        places: list[tuple[BatchSlice[_T], int]] = []
        for part in slices:
            task = part.task
            told: TokenStep | EngineRoomError | None = None
            tells = task.prompt_logprobs is not None and task.told < task.prompt_tokens
            if tells := tells and not task.cancelled:
                told = self._prompt_step(part, outputs)
            task.cached += part.count - len(task.draft)
            if tells and told is None:
                batch.without_numbers.append(task)
            elif isinstance(told, EngineRoomError):
                items[task] = told
                task.cached, task.cache_invalid = 0, True
            else:
                if told is not None and told.prompt_logprobs:
                    items[task] = told
                if part.outputs and not task.cancelled:
                    places.append((part, 0))
        while places:
            verified: list[tuple[BatchSlice[_T], int]] = []
            for (part, depth), chosen in zip(places, outputs.choose(places), strict=True):
                task = part.task
                if chosen is None and depth:
                    task.cached -= 1  # what is before it was right, and is computed again
                elif chosen is None:
                    batch.without_numbers.append(task)
                elif isinstance(chosen, EngineRoomError):
                    items[task] = chosen
                    task.cached, task.cache_invalid = 0, True
                else:
                    step = items.setdefault(task, TokenStep())
                    assert isinstance(step, TokenStep)  # whoever failed is in no place any more
                    _take(task, step, chosen, outputs)
                    if self._is_right(task, step, chosen.token, depth):
                        verified.append((part, depth + 1))
            places = verified
        for task, item in items.items():
            if isinstance(item, TokenStep):
                task.cache_invalid = False
                task.draft = []
            batch.add(task, item)
        return batch

    @staticmethod
    def _prompt_step(
        part: BatchSlice[_T], outputs: StepOutputs[_T]
    ) -> TokenStep | EngineRoomError | None:
        """What a slice tells of the prompt, of which something is still to be told; a step
        without anything: nothing now. Else as :meth:`StepOutputs.prompt_scores`.
        """
        task = part.task
        make, entries = outputs.make_logprob, list[PromptLogprob]()
        if not task.told:
            entries.append(first_of_prompt(make, task.tokens[0]))
        if part.prompt_rows:
            start = 1 + max(task.told - 1, task.cached)
            tokens = task.tokens[start : start + part.prompt_rows]
            scores = outputs.prompt_scores(part, tokens)
            if scores is None or isinstance(scores, EngineRoomError):
                return scores
            entries += [
                make(token, own, best) for token, (own, best) in zip(tokens, scores, strict=True)
            ]
        task.told += len(entries)
        return TokenStep(prompt_logprobs=entries)

    def _is_right(self, task: _T, step: TokenStep, token: int, depth: int) -> bool:
        """Whether the token is the one that was proposed, so that the next one is there, too."""
        if depth >= len(task.draft):
            return False
        self.proposed += 1
        if step.finish is not None or task.draft[depth] != token:
            return False
        self.accepted += 1
        task.cached += 1
        return True


def _take(task: _T, step: TokenStep, choice: Choice, outputs: StepOutputs[_T]) -> None:
    """Give a request its next token."""
    token = choice.token
    text = outputs.text(task, token)
    if text is None:
        step.finish = "eos_token"
    else:
        task.tokens.append(token)
        ends = step.text_ends or ((len(step.text),) if step.token_ids else ())
        step.token_ids = (*step.token_ids, token)
        step.text = _joined(step.text, text)
        if ends:
            step.text_ends = (*ends, len(step.text))
        if choice.logprob is not None:
            step.logprobs = (*(step.logprobs or ()), choice.logprob)
        if len(task.tokens) >= task.limit:
            step.finish = "length"
    if step.finish is not None:
        step.text = _joined(step.text, outputs.rest(task))


def _joined(before: Any, text: str | bytes) -> str | bytes:
    """Two texts, or bytes, of one request; an empty one may be of either kind."""
    joined: str | bytes = before + text if before else text
    return joined
