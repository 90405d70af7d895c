"""Proposals change no answer; they only save steps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hf_benches import NO_END, TEXT, Rig, Tiny, ask, load

from engineroom import ConfigurationError, InferenceError
from engineroom_hf_transformers.drafting import DraftModel
from engineroom_hf_transformers.engine import HfEngine


@pytest.fixture(scope="module")
def models(tiny: Callable[[str], Path]) -> Tiny:
    return Tiny(tiny)


# ── in the engine ────────────────────────────────────────────────────────────────────────────


PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.9, "seed": 4},
    {"temperature": 1.2, "seed": 5, "top_k": 8, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 0.3, "seed": 6, "presence_penalty": 0.7, "frequency_penalty": 0.3},
    {"temperature": 0.0, "repetition_penalty": 1.3, "logprobs": 2},
]


def drafted(models: Tiny, how: str) -> tuple[Any, dict[str, Any]]:
    parts = models.parts("llama")
    if how == "same":
        parts.draft = models.parts("llama")
    elif how == "other":
        parts.draft = models.parts("qwen2")
    elif how == "short":
        parts.draft = models.parts("llama", n_context=60)
    return parts, {"prompt_lookup": how == "lookup"}


@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize("how", ["lookup", "same", "other", "short"])
async def test_answers_are_those_without_proposals(models: Tiny, how: str, tokens: int) -> None:
    prompts = [TEXT[:120], "abc" * 20, "hello", TEXT[5:90], "the the the the"]
    requests = [ask(**(params | {"max_new_tokens": 40, "logit_bias": NO_END})) for params in PARAMS]
    with Rig(models.parts("llama"), max_batch_size=5) as rig:
        expected = [
            await rig.read(rig.send(rig.tokens(p), r))
            for p, r in zip(prompts, requests, strict=True)
        ]
    parts, changes = drafted(models, how)
    with Rig(parts, max_batch_size=5, draft_tokens=tokens, **changes) as rig:
        tasks = [rig.send(rig.tokens(p), r) for p, r in zip(prompts, requests, strict=True)]
        found = await asyncio.gather(*map(rig.read, tasks))
        for a, b in zip(found, expected, strict=True):
            assert (a.tokens, a.text, a.finish) == (b.tokens, b.text, b.finish)
        assert 0 <= rig.engine.scheduler.accepted <= rig.engine.scheduler.proposed
        assert (rig.engine.scheduler.proposed > 0) or how == "lookup"
        await rig.idle()


async def test_a_text_that_repeats_itself_takes_fewer_steps(models: Tiny) -> None:
    with Rig(models.parts("llama"), prompt_lookup=True, draft_tokens=4) as rig:
        answer = await rig.answer("hello", max_new_tokens=40, logit_bias={66: 100.0})
        assert answer.tokens == [66] * 40
        # Four until three of them stand there with something after them; then five a step.
        assert answer.steps <= 13
        assert rig.engine.scheduler.accepted == 40 - answer.steps


async def test_a_draft_that_is_always_right_saves_steps(models: Tiny) -> None:
    parts, _ = drafted(models, "same")
    with Rig(parts, draft_tokens=4) as rig:
        answer = await rig.answer("hello", max_new_tokens=40, logit_bias=NO_END)
        # The first token comes of the prompt; then five a step.
        assert len(answer.tokens) == 40
        assert answer.steps <= 10
        assert rig.engine.scheduler.accepted == rig.engine.scheduler.proposed >= 30


async def test_a_draft_that_is_wrong_costs_nothing_but_work(models: Tiny) -> None:
    reference = models.reference("llama")
    with Rig(models.parts("llama"), prompt_lookup=True) as rig:

        class Wrong:
            """A fake drafter that proposes what is never right."""

            def propose(self, wishes: Sequence[Any]) -> dict[int, list[int]]:
                return {slot: [3] * count for slot, _, count, _ in wishes}

            def forget(self, slot: int) -> None: ...

            def close(self) -> None: ...

        rig.engine.scheduler.drafter = Wrong()
        tokens = rig.tokens(TEXT)[:30]
        for _ in range(2):  # the second time from the cache
            answer = await rig.answer(tokens, max_new_tokens=40)
            assert answer.tokens == reference.greedy(tokens, 40)
            assert answer.steps == len(answer.tokens) + (answer.finish == "eos_token")
        assert rig.engine.scheduler.proposed > 0
        assert rig.engine.scheduler.accepted == 0


async def test_a_stop_in_the_middle_of_right_proposals(models: Tiny) -> None:
    """What ends the text ends it, whatever would have been right after it."""
    parts, _ = drafted(models, "same")
    with Rig(parts, draft_tokens=8) as rig:
        whole = await rig.answer("hello", max_new_tokens=20, logit_bias=NO_END)
        for count in range(1, 12):
            answer = await rig.answer("hello", max_new_tokens=count, logit_bias=NO_END)
            assert (answer.tokens, answer.finish) == (whole.tokens[:count], "length")
            parts.draft = None


async def test_a_long_prompt_is_read_by_the_draft_over_several_steps(models: Tiny) -> None:
    parts, _ = drafted(models, "same")
    with Rig(parts, max_batch_tokens=16) as rig:
        tokens = rig.tokens(TEXT)[:150]
        answer = await rig.answer(tokens, max_new_tokens=60)
        assert answer.tokens == models.reference("llama").greedy(tokens, 60)
        assert rig.engine.scheduler.accepted > 0
        drafter = rig.engine.scheduler.drafter
        assert isinstance(drafter, DraftModel)
        (content,) = drafter._content.values()
        assert content[:150] == tokens


async def test_the_next_request_of_a_slot_reuses_what_the_draft_has_read(models: Tiny) -> None:
    parts, _ = drafted(models, "same")
    with Rig(parts, max_batch_size=1) as rig:
        tokens = rig.tokens(TEXT)[:100]
        await rig.answer(tokens, max_new_tokens=20)
        drafter = rig.engine.scheduler.drafter
        assert isinstance(drafter, DraftModel)
        read: list[int] = []
        forward = drafter._forward

        class Noted:
            cache, close = forward.cache, forward.close

            def __call__(self, packed: Any, *rest: Any) -> Any:
                read.append(len(packed))
                return forward(packed, *rest)

        drafter._forward = Noted()  # type: ignore[assignment]
        other = tokens[:90] + rig.tokens("and so on")[1:]
        answer = await rig.answer(other, max_new_tokens=20)
        assert answer.tokens == models.reference("llama").greedy(other, 20)
        assert max(read) < 20
        read.clear()
        await rig.answer(other, max_new_tokens=20, cache_salt="another's")
        assert max(read) > len(other), "what another cache scope has is of no use"


async def test_a_draft_that_fails_is_not_believed_to_have_read_anything(models: Tiny) -> None:
    parts, _ = drafted(models, "same")
    with Rig(parts, max_batch_size=1) as rig:
        drafter = rig.engine.scheduler.drafter
        assert isinstance(drafter, DraftModel)
        forward = drafter._forward

        class Fails:
            """A fake forward pass that fails once."""

            cache, close = forward.cache, forward.close

            def __call__(self, *_: Any) -> Any:
                drafter._forward = forward
                raise RuntimeError("made up")

        drafter._forward = Fails()  # type: ignore[assignment]
        tokens = rig.tokens(TEXT)[:50]
        answer = await rig.answer(tokens)
        assert isinstance(answer.error, InferenceError)
        again = await rig.answer(tokens, max_new_tokens=20, logit_bias=NO_END)
        assert len(again.tokens) == 20
        assert (
            rig.engine.scheduler.accepted == rig.engine.scheduler.proposed > 0
        )  # it has read all that it must
        await rig.idle()


async def test_closing_gives_the_drafts_cache_back_too(models: Tiny) -> None:
    parts, _ = drafted(models, "same")
    with Rig(models.parts("llama")) as rig:
        alone = rig.engine.memory_bytes
    with Rig(parts) as rig:
        drafter = rig.engine.scheduler.drafter
        assert isinstance(drafter, DraftModel)
        assert rig.engine.memory_bytes == 2 * alone
    assert drafter._forward.cache.nbytes == 0


def test_a_draft_without_a_cache_to_drive_is_refused(models: Tiny) -> None:
    from hf_benches import options

    parts = models.parts("llama", draft=models.parts("mamba"))
    with pytest.raises(ConfigurationError, match="draft_model: this model cannot propose"):
        HfEngine(parts, options(), "m")


def test_a_draft_is_loaded_with_its_model(tiny: Callable[[str], Path]) -> None:
    parts = load(tiny("llama"), draft_model=str(tiny("qwen3")))
    assert parts.draft is not None
