"""What a step gives its requests: drafts are verified, prompts announced, and each leaves once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, strategies as st

from engineroom import (
    BatchingEngine,
    DecodeLoop,
    InferenceError,
    InferenceRequest,
    TokenLogprob,
    TokenStep,
    request_logger,
)
from engineroom.engine import (
    BatchSlice,
    Choice,
    Chosen,
    Drafter,
    DraftRequest,
    Scheduler,
    StepBatch,
    TextTask,
)

END = 9
logger = logging.getLogger("engineroom.tests")


class Task(TextTask):
    """Lies where its first token says."""

    @property
    def sequence(self) -> int:
        return self.tokens[0]


class FakeEngine(BatchingEngine[Task]):
    """Notes what it is asked; its requests have no mailboxes."""

    def __init__(self) -> None:
        super().__init__("m", DecodeLoop("unused"), max_running=8, max_queue=0)
        self.handed: dict[Any, Any] = {}

    def step(self) -> None:
        raise NotImplementedError

    def hand_over(self, items: Any) -> None:
        # Whoever reads the last step may unload the model: all must have left by then.
        for mailbox, item in items:
            assert mailbox not in self.handed
            self.handed[mailbox] = item

    def add(self, tokens: list[int], *, limit: int = 100, **kw: Any) -> Task:
        request = InferenceRequest(model_id="m", prompt="p")
        task = Task(
            tokens=tokens,
            prompt_tokens=len(tokens),
            limit=limit,
            log=request_logger(logger, request),
            mailbox=f"mailbox {tokens[0]}",  # type: ignore[arg-type]
            **kw,
        )
        self.running.append(task)
        return task


class Outputs:
    """A made-up model: row of logits → what is chosen there."""

    def __init__(self, rows: Sequence[Chosen | int], *, as_bytes: bool = False) -> None:
        self.rows = [Choice(row) if isinstance(row, int) else row for row in rows]
        self.asked: list[int] = []
        self.as_bytes = as_bytes

    def choose(self, places: Sequence[tuple[BatchSlice[Task], int]]) -> list[Chosen]:
        self.asked.append(len(places))
        return [self.rows[part.first + depth] for part, depth in places]

    @staticmethod
    def make_logprob(token: int, value: float, best: Sequence[tuple[int, float]]) -> TokenLogprob:
        return TokenLogprob(token_id=token, token=str(token), logprob=value)

    def prompt_scores(self, part: BatchSlice[Task], tokens: Sequence[int]) -> Any:
        """Minus the row, as the log probability."""
        rows = range(part.first - part.prompt_rows, part.first)
        wrong = [row for row in map(self.rows.__getitem__, rows) if not isinstance(row, Choice)]
        return wrong[0] if wrong else [(-float(row), ()) for row in rows]

    def text(self, task: Task, token: int) -> str | bytes | None:
        if token == END:
            return None
        return b"%d" % token if self.as_bytes else str(token)

    def rest(self, task: Task) -> str | bytes:
        return b"" if self.as_bytes else "."


class Says(Drafter):
    def __init__(self, proposals: dict[int, list[int]]) -> None:
        self.proposals = proposals
        self.requests: list[DraftRequest] = []
        self.forgotten: list[int] = []

    def propose(self, requests: Sequence[DraftRequest]) -> dict[int, list[int]]:
        self.requests += requests
        return {s: self.proposals[s][:most] for s, _, most, _ in requests if s in self.proposals}

    def forget(self, sequence: int) -> None:
        self.forgotten.append(sequence)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


def step(engine: FakeEngine, scheduler: Scheduler[Task], outputs: Outputs) -> StepBatch[Task]:
    """One step of all that run: those that decode with their drafts, the others' whole prompts."""
    slices = []
    first = 0
    for task in engine.running:
        if task.decodes:
            count = rows = 1 + len(task.draft)
        else:
            count, rows = len(task.tokens) - task.cached, 1
        slices.append(BatchSlice(task, count, first, rows))
        first += rows
    engine.handed.clear()
    return scheduler.postprocess(slices, outputs)


def test_a_prompt_is_announced_with_its_first_token_and_then_no_more(engine: FakeEngine) -> None:
    task = engine.add([1, 2, 3], cached=1, reused=1)
    scheduler: Scheduler[Task] = Scheduler(engine)
    step(engine, scheduler, Outputs([4])).send()
    assert engine.handed == {
        task.mailbox: TokenStep((4,), "4", prompt_tokens=3, cached_prompt_tokens=1)
    }
    assert (task.tokens, task.cached) == ([1, 2, 3, 4], 3)
    assert task.decodes
    step(engine, scheduler, Outputs([5])).send()
    assert engine.handed == {task.mailbox: TokenStep((5,), "5")}
    assert engine.running == [task]


def test_what_gave_way_never_tells_of_more_than_its_prompt(engine: FakeEngine) -> None:
    # It was read again with what it had generated, which another had computed, too.
    task = engine.add([1, 2, 3, 4, 5], reused=4)
    task.prompt_tokens = 3
    step(engine, Scheduler(engine), Outputs([6])).send()
    assert engine.handed[task.mailbox].cached_prompt_tokens == 3


@pytest.mark.parametrize("as_bytes", [False, True])
def test_an_end_and_a_limit_finish_and_leave_once(engine: FakeEngine, as_bytes: bool) -> None:
    ends, full = engine.add([1]), engine.add([2], limit=2)
    goes_on = engine.add([3])
    results = step(engine, Scheduler(engine), Outputs([END, 5, 6], as_bytes=as_bytes))
    assert engine.running == [ends, full, goes_on]  # nobody leaves before all is sent
    results.send()
    assert engine.running == [goes_on]
    found = {mailbox: (s.token_ids, s.text, s.finish) for mailbox, s in engine.handed.items()}
    texts = (b"", b"5", b"6") if as_bytes else (".", "5.", "6")
    assert found == {
        ends.mailbox: ((), texts[0], "eos_token"),
        full.mailbox: ((5,), texts[1], "length"),
        goes_on.mailbox: ((6,), texts[2], None),
    }


def test_a_chunk_of_a_prompt_and_a_cancelled_request_get_nothing(engine: FakeEngine) -> None:
    reading, cancelled = engine.add([1, 2, 3, 4]), engine.add([2])
    cancelled.cancelled = True
    slices = [BatchSlice(reading, 2, 0, 0), BatchSlice(cancelled, 1, 0, 1)]
    Scheduler[Task](engine).postprocess(slices, Outputs([5])).send()
    assert not engine.handed
    assert (reading.cached, cancelled.cached) == (2, 1)
    assert cancelled.tokens == [2]


# ── drafts ───────────────────────────────────────────────────────────────────────────────────


def test_proposals_are_asked_for_where_they_can_be_of_use(engine: FakeEngine) -> None:
    tasks = [engine.add([1], limit=3), engine.add([2], limit=2), engine.add([3]), engine.add([4])]
    drafter = Says({1: [7, 7, 7], 3: [7, 8, 9]})
    scheduler = Scheduler(engine, drafter, 4)
    tasks[3].draft = [5]
    tasks[2].cache_scope = "one"
    scheduler.propose(tasks, 2)
    assert [r.scope for r in drafter.requests] == ["", "one", ""]
    # Of a request that has room for one more token none after it is of use.
    assert [(r.sequence, r.most) for r in drafter.requests] == [(1, 1), (3, 2), (4, 2)]
    assert [task.draft for task in tasks] == [[7], [], [7, 8], []]
    scheduler.propose(tasks, 0)
    assert len(drafter.requests) == 3
    assert [task.draft for task in tasks] == [[], [], [], []]
    scheduler.forget(tasks[2])
    assert drafter.forgotten == [3]


def test_without_a_drafter_nothing_is_proposed(engine: FakeEngine) -> None:
    task = engine.add([1])
    scheduler: Scheduler[Task] = Scheduler(engine)
    scheduler.propose([task], 4)
    scheduler.forget(task)
    assert task.draft == []


@given(
    draft=st.lists(st.integers(4, 6), max_size=4),
    model=st.lists(st.sampled_from([4, 5, 6, END]), min_size=5, max_size=5),
    room=st.integers(1, 6),
)
def test_right_proposals_count_and_the_others_change_nothing(
    draft: list[int], model: list[int], room: int
) -> None:
    engine = FakeEngine()
    task = engine.add([1, 2], limit=2 + room, cached=1)
    scheduler: Scheduler[Task] = Scheduler(engine)
    task.draft = list(draft)
    outputs = Outputs(model)
    step(engine, scheduler, outputs).send()
    # What the model would have chosen by itself, as long as the draft agrees.
    expected: list[int] = []
    finish = None
    right = 0
    for depth, token in enumerate(model):
        if token == END:
            finish = "eos_token"
            break
        expected.append(token)
        if len(expected) == room:
            finish = "length"
            break
        if depth >= len(draft) or draft[depth] != token:
            break
        right += 1
    result = engine.handed[task.mailbox]
    assert (list(result.token_ids), result.finish) == (expected, finish)
    assert result.text.startswith("".join(map(str, expected)))
    assert list(result.text_ends) == [*range(1, len(expected) + 1)] * (len(expected) > 1)
    assert task.tokens == [1, 2, *expected]
    assert task.draft == []
    assert task.cached == 2 + right
    assert scheduler.accepted == right
    assert scheduler.proposed == min(len(outputs.asked), len(draft))
    assert engine.running == ([] if finish else [task])


def test_first_tokens_are_chosen_together_and_then_the_second_ones(engine: FakeEngine) -> None:
    one, two, three = (engine.add([i]) for i in (1, 2, 3))
    one.draft, three.draft = [4, 5], [6]
    outputs = Outputs([4, 5, 7, 4, 6, 8])
    step(engine, Scheduler(engine), outputs).send()
    assert outputs.asked == [3, 2, 1]
    assert [task.tokens for task in (one, two, three)] == [[1, 4, 5, 7], [2, 4], [3, 6, 8]]


def test_each_token_has_its_log_probability(engine: FakeEngine) -> None:
    def entry(token: int) -> TokenLogprob:
        return TokenLogprob(token_id=token, token=str(token), logprob=-1.0)

    task = engine.add([1])
    task.draft = [4, END]
    rows = [Choice(token, entry(token)) for token in (4, END, 5)]
    step(engine, Scheduler(engine), Outputs(rows)).send()
    assert engine.handed[task.mailbox].logprobs == (entry(4),)  # none of the end


def chunk(task: Task, count: int, first: int = 0) -> BatchSlice[Task]:
    """So many more tokens of a prompt, with what is wanted of them."""
    rows, last = task.prompt_rows(count), int(task.cached + count == len(task.tokens))
    return BatchSlice(task, count, first + rows, last, prompt_rows=rows)


def told(engine: FakeEngine, task: Task) -> list[tuple[int, float | None]]:
    step = engine.handed.get(task.mailbox)
    entries = [] if step is None else step.prompt_logprobs or []
    return [(entry.token_id, entry.logprob) for entry in entries]


def test_each_token_of_a_prompt_is_told_once_also_where_it_gave_way(engine: FakeEngine) -> None:
    task = engine.add([1, 2, 3, 4, 5], prompt_logprobs=0)
    scheduler: Scheduler[Task] = Scheduler(engine)
    outputs = Outputs([7] * 9)

    def read(count: int) -> list[tuple[int, float | None]]:
        engine.handed.clear()
        scheduler.postprocess([chunk(task, count)], outputs).send()
        return told(engine, task)

    assert task.reusable == 0  # what another has computed, has no logits any more
    assert read(2) == [(1, None), (2, 0.0), (3, -1.0)]
    assert task.reusable == 2
    task.cached = 1  # it gave way, and found something of it again
    assert (task.prompt_rows(1), task.prompt_rows(2)) == (0, 1)
    assert read(2) == [(4, 0.0)]
    assert read(2) == [(5, 0.0)]
    assert task.tokens == [1, 2, 3, 4, 5, 7]
    task.cached = 0
    assert (task.reusable, task.prompt_rows(6)) == (6, 0)
    assert read(6) == []


def test_a_prompt_of_one_token_has_its_entry(engine: FakeEngine) -> None:
    task = engine.add([1], prompt_logprobs=0)
    step(engine, Scheduler(engine), Outputs([7])).send()
    assert told(engine, task) == [(1, None)]
    assert engine.handed[task.mailbox].token_ids == (7,)


@pytest.mark.parametrize("wrong", [None, InferenceError("no")], ids=["no numbers", "an error"])
def test_a_prompt_that_cannot_be_told_of_has_no_next_token(
    engine: FakeEngine, wrong: InferenceError | None
) -> None:
    task, other = engine.add([1, 2, 3], prompt_logprobs=0), engine.add([4])
    scheduler: Scheduler[Task] = Scheduler(engine)
    slices = [chunk(task, 3), BatchSlice(other, 1, 3, 1)]
    batch = scheduler.postprocess(slices, Outputs([7, wrong, 7, 8]))
    batch.send()
    assert batch.without_numbers == ([task] if wrong is None else [])
    assert engine.handed.get(task.mailbox) is wrong
    assert engine.handed[other.mailbox].token_ids == (8,)
    assert task.tokens == [1, 2, 3]


# ── what fails ───────────────────────────────────────────────────────────────────────────────


def test_an_error_ends_its_request_and_what_it_wrote_is_not_believed(engine: FakeEngine) -> None:
    broken, late, sound = engine.add([1]), engine.add([2]), engine.add([3], cache_invalid=True)
    late.draft = [5]
    first, second = InferenceError("first"), InferenceError("second")
    results = step(engine, Scheduler(engine), Outputs([first, 5, second, 6]))
    results.send()
    assert engine.handed[broken.mailbox] is first
    assert engine.handed[late.mailbox] is second
    assert engine.handed[sound.mailbox].token_ids == (6,)
    assert engine.running == [sound]
    for task in (broken, late):
        assert (task.done, task.cached, task.cache_invalid) == (True, 0, True)
    assert not sound.cache_invalid
    assert late.draft == [5]  # the runtime knows how far it wrote


def test_without_numbers_the_runtime_thinks_what_to_do(engine: FakeEngine) -> None:
    broken, late = engine.add([1]), engine.add([2])
    late.draft = [5, 6]
    results = step(engine, Scheduler(engine), Outputs([None, 5, None, 6]))
    results.send()
    assert results.without_numbers == [broken]
    assert list(engine.handed) == [late.mailbox]
    # Its right proposal is computed again, by itself.
    assert (late.tokens, late.cached, late.draft) == ([2, 5], 1, [])
    assert late.decodes
    assert engine.running == [broken, late]
