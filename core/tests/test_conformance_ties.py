"""Near ties pass the kit, and what really takes from a neighbour does not, however noisy it is."""

from __future__ import annotations

import math
import random

import pytest
from broken_handlers import BROKEN
from hypothesis import given, strategies as st
from toy_runtime import FLOOR, ToyHandler

from engineroom import GenerationParams, InferenceResponse, ModelConfig, TokenLogprob
from engineroom.testing.conformance.runner import Job, run_suite
from engineroom.testing.conformance.ties import (
    LEAST_BOUND,
    MOST_BOUND,
    bound_of,
    differences,
    parting,
)

TOY = ModelConfig(model_id="toy", source="toy:")
BESIDE = {"requests-do-not-mix", "neighbours-go-on", "failing-request", "cancel-while-queued"}
NOISE = 0.1


class Noisy:
    """Beside others, logits differ by as much as quantised weights make them."""

    def logits(self, model, tail):
        exact = super().logits(model, tail)
        if model.running < 2:
            return exact
        dice = random.Random(f"{tail} {model.running}")
        return [v if v <= FLOOR else v + dice.uniform(-NOISE, NOISE) for v in exact]


class NoisyToy(Noisy, ToyHandler):
    pass


class TakesAnothersText(NoisyToy):
    """A batch of more than five goes on from what another request has written."""

    def logits(self, model, tail):
        last = model.notes.get("tail", tail)
        model.notes["tail"] = tail
        return super().logits(model, last if model.running > 5 else tail)


class TakesAnothersPenalties(Noisy, BROKEN["requests-do-not-mix"]):
    pass


def broken_rules(handler, *rules: str, **settings) -> set[str]:
    select = " or ".join(f"test_{rule.replace('-', '_')}" for rule in rules)
    job = Job(handler, TOY, {"load_cycles": 0, "timeout_s": 10.0, **settings})
    results = run_suite(job, select)
    return {result.check for result in results if result.outcome == "failed"}


def test_noise_is_no_mistake_where_the_suite_says_that_there_is_some():
    assert broken_rules(NoisyToy, *BESIDE, batch_invariant=False) == set()
    assert "requests-do-not-mix" in broken_rules(NoisyToy, *BESIDE)


@pytest.mark.parametrize("handler", [TakesAnothersText, TakesAnothersPenalties])
def test_noise_hides_no_mistake(handler):
    assert "requests-do-not-mix" in broken_rules(handler, *BESIDE, batch_invariant=False)


def test_exact_runtimes_may_say_less_than_they_can():
    rule = "requests-do-not-mix"
    assert broken_rules(ToyHandler, rule, batch_invariant=False) == set()
    assert broken_rules(BROKEN[rule], rule, batch_invariant=False) == {rule}


# ── the rule ─────────────────────────────────────────────────────────────────────────────────────


def entry(logits: list[float], token: int) -> TokenLogprob:
    norm = math.log(sum(map(math.exp, logits)))
    order = sorted(range(len(logits)), key=lambda t: -logits[t])
    top = [(t, str(t), logits[t] - norm) for t in order]
    return TokenLogprob(token_id=token, token=str(token), logprob=logits[token] - norm, top=top)


def penalised(params: GenerationParams, logits: list[float], before: list[int]) -> list[float]:
    """As GenerationParams describes it, over logits."""
    bias = params.logit_bias or {}
    changed = [value + bias.get(token, 0.0) for token, value in enumerate(logits)]
    for token in set(before):
        factor = params.repetition_penalty or 1.0
        changed[token] = changed[token] / factor if changed[token] > 0 else changed[token] * factor
        changed[token] -= params.presence_penalty or 0.0
        changed[token] -= (params.frequency_penalty or 0.0) * before.count(token)
    return changed


def written(params: GenerationParams, steps: list[list[float]]) -> InferenceResponse:
    """A greedy answer by these logits."""
    tokens: list[int] = []
    entries = []
    for logits in steps:
        changed = penalised(params, logits, tokens)
        tokens.append(max(range(len(changed)), key=changed.__getitem__))
        entries.append(entry(logits, tokens[-1]))
    return answer(entries, "length")


def answer(entries: list[TokenLogprob], finish: str) -> InferenceResponse:
    text = " ".join(e.token for e in entries)
    return InferenceResponse(
        request_id="r", model_id="m", generated_text=text, logprobs=entries, finish_reason=finish
    )


numbers = st.floats(-6, 6)
params = st.builds(
    GenerationParams,
    temperature=st.just(0.0),
    presence_penalty=st.sampled_from([None, 0.5, 1.5]),
    frequency_penalty=st.sampled_from([None, 1.0]),
    logit_bias=st.sampled_from([None, {0: 1.5, 3: -2.0}]),
    repetition_penalty=st.sampled_from([None, 1.3]),
)
steps = st.lists(st.lists(numbers, min_size=5, max_size=5), min_size=1, max_size=6)


@given(params, steps, st.data())
def test_what_noise_alone_parts_is_a_near_tie(params, steps, data):
    shaken = [[v + data.draw(st.floats(-0.02, 0.02)) for v in logits] for logits in steps]
    alone, beside = written(params, steps), written(params, shaken)
    # A repetition penalty is told by its effect on the sum alone; it makes noise larger.
    bound = 0.1 * (params.repetition_penalty or 1.0)
    if alone.generated_text != beside.generated_text:
        assert parting(params, alone, beside, bound) is None
    assert all(gap <= 0.081 for gap in differences(alone, beside))


@given(params, steps, st.floats(2.5, 9))
def test_what_changes_a_choice_by_more_is_none(params, steps, much):
    alone = written(params, steps)
    last = alone.logprobs[-1].token_id
    other = (last + 1) % 5
    changed = [*steps[:-1], list(steps[-1])]
    changed[-1][other] = max(steps[-1]) + much
    changed[-1][last] -= much
    beside = written(params, changed)
    if beside.logprobs[-1].token_id == other:
        assert parting(params, alone, beside, 0.5)


def test_a_token_that_is_not_the_likeliest_by_its_own_numbers_is_none():
    logits = [2.0, 1.0, 0.0]
    alone, beside = answer([entry(logits, 0)], "length"), answer([entry(logits, 1)], "length")
    reason = parting(GenerationParams(temperature=0.0), alone, beside, 0.5)
    assert reason is not None
    assert "'0' alone and '1' beside others" in reason
    # Not even where it is nearly: numbers alone do not decide then.
    logits = [1.1, 1.0, 0.0]
    beside = answer([entry(logits, 1)], "length")
    assert parting(GenerationParams(temperature=0.0), alone, beside, 0.5)


def test_where_one_ends_the_end_was_nearly_as_likely():
    greedy = GenerationParams(temperature=0.0)
    close, sure = entry([1.0, 1.1, 0.0], 1), entry([0.0, 4.0, 0.0], 1)
    first = entry([3.0, 0.0, 0.0], 0)
    ended = answer([first], "eos_token")
    assert parting(greedy, ended, answer([first, close], "length"), 0.2) is None
    assert parting(greedy, ended, answer([first, sure], "length"), 0.2)
    cut = answer([first], "length")
    assert parting(greedy, cut, answer([first, close], "length"), 0.2)
    assert parting(greedy, ended, ended, 0.2)


def test_the_bound_follows_the_noise_and_has_two_ends():
    assert bound_of([]) == bound_of([0.0] * 9) == LEAST_BOUND
    assert bound_of([0.05] * 99 + [9.0]) == pytest.approx(0.15)
    assert bound_of([9.0] * 9) == MOST_BOUND
