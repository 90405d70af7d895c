"""Beam search, and models whose cache is not driven: ``generate()``, a token at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_benches import END, NO_END, TEXT, Rig, Tiny, ask, generate_threads, until

from engineroom import EngineDeadError, InferenceError


@pytest.fixture(scope="module")
def models(tiny: Callable[[str], Path]) -> Tiny:
    return Tiny(tiny)


KINDS = ("llama", "gemma2", "mamba", "t5")
PROMPTS = ("hello", TEXT[:60])


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("kind", KINDS)
async def test_beam_search_is_that_of_generate(models: Tiny, kind: str, early: bool) -> None:
    reference = models.reference(kind)
    with Rig(models.parts(kind)) as rig:
        for prompt in PROMPTS:
            tokens = rig.tokens(prompt)
            for beams, new in ((2, 6), (4, 12)):
                expected = reference.generate(tokens, new, num_beams=beams, early_stopping=early)
                answer = await rig.answer(
                    tokens, num_beams=beams, early_stopping=early, max_new_tokens=new
                )
                assert answer.tokens == expected
                assert answer.finish == ("length" if len(expected) == new else "eos_token")
                assert answer.cached == 0
        await rig.idle()


async def test_beams_heed_bias_and_penalties(models: Tiny) -> None:
    reference = models.reference("llama")
    with Rig(models.parts("llama")) as rig:
        tokens = rig.tokens(TEXT[:60])
        plain = await rig.answer(tokens, num_beams=3, max_new_tokens=10)
        forced = await rig.answer(tokens, num_beams=3, max_new_tokens=10, logit_bias={77: 100.0})
        assert forced.tokens == [77] * 10
        repeated = await rig.answer(tokens, num_beams=3, max_new_tokens=10, repetition_penalty=1.8)
        assert repeated.tokens == reference.generate(
            tokens, 10, num_beams=3, repetition_penalty=1.8
        )
        never = dict.fromkeys(plain.tokens, -100.0)
        other = await rig.answer(tokens, num_beams=3, max_new_tokens=10, logit_bias=never)
        assert not set(other.tokens) & set(plain.tokens)
        once = await rig.answer(
            tokens,
            num_beams=3,
            max_new_tokens=10,
            presence_penalty=2.0,
            frequency_penalty=2.0,
            logit_bias={77: 50.0, END: -100.0},
        )
        # 50 for the first, and 2 less each time: it stays the likeliest.
        assert once.tokens == [77] * 10


async def test_beam_sampling_with_a_seed_is_reproducible_whatever_happens_beside(
    models: Tiny,
) -> None:
    with Rig(models.parts("llama")) as rig:
        tokens = rig.tokens("hello")
        how: dict[str, Any] = {"num_beams": 3, "temperature": 1.2, "max_new_tokens": 12}
        first = await rig.answer(tokens, seed=5, **how)
        other = await rig.answer(tokens, seed=6, **how)
        assert first.tokens != other.tokens
        tasks = [
            rig.send(tokens, ask(seed=5, **(how | {"logit_bias": None}))),
            rig.send(tokens, ask(seed=6, **(how | {"logit_bias": None}))),
            rig.send(tokens, ask(seed=None, **(how | {"logit_bias": None}))),
            rig.send(tokens, ask(temperature=1.0, logit_bias=None)),
        ]
        found = await asyncio.gather(*map(rig.read, tasks))
        assert found[0].tokens == first.tokens
        assert found[1].tokens == other.tokens
        await rig.idle()


async def test_a_seed_leaves_the_process_its_own_random_numbers(models: Tiny) -> None:
    with Rig(models.parts("llama")) as rig:
        torch.manual_seed(3)
        expected = torch.rand(4)
        torch.manual_seed(3)
        await rig.answer("hello", num_beams=2, temperature=1.0, seed=9, max_new_tokens=6)
        assert torch.equal(torch.rand(4), expected)


async def test_neighbours_go_on_meanwhile(models: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = models.reference("llama")
    with Rig(models.parts("llama")) as rig:
        left: list[Any] = []
        leave = rig.engine.leave

        def noted(task: Any) -> None:
            left.append(task)
            leave(task)

        monkeypatch.setattr(rig.engine, "leave", noted)
        neighbour = rig.tokens("hello")
        with rig.engine._loop.condition:  # both begin in the same step
            long = ask(num_beams=3, max_new_tokens=60, logit_bias=NO_END)
            beams = rig.send(rig.tokens(TEXT[:80]), long)
            beside = rig.send(neighbour)
        found = await asyncio.gather(rig.read(beams), rig.read(beside))
        assert len(found[0].tokens) == 60
        assert found[1].tokens == reference.greedy(neighbour, 24)
        assert left == [beside, beams]  # each has a token a step, and 60 are more than 24
        await rig.idle()


@pytest.mark.parametrize(
    ("kind", "beams"), [("llama", 3), ("mamba", 1), ("mamba", 3), ("t5", 1), ("t5", 3)]
)
async def test_a_cancelled_one_ends_and_its_thread_with_it(
    models: Tiny, kind: str, beams: int
) -> None:
    with Rig(models.parts(kind)) as rig:
        task = rig.send(rig.tokens("hello"), ask(num_beams=beams, max_new_tokens=None))
        await until(generate_threads)
        rig.engine.cancel(task)
        await rig.idle()
        answer = await rig.answer("hello", max_new_tokens=3, logit_bias=NO_END)
        assert len(answer.tokens) == 3


async def test_one_that_ends_before_its_first_token_leaves_no_thread(models: Tiny) -> None:
    with Rig(models.parts("mamba")) as rig:
        held = rig.send(rig.tokens("a"), ask(max_new_tokens=None))
        await held.mailbox.get()
        queued = rig.send(rig.tokens("b"), ask())
        rig.engine.cancel(queued)
        rig.engine.cancel(held)
        await rig.idle()


async def test_logprobs_by_generate_are_those_of_the_model(models: Tiny) -> None:
    with Rig(models.parts("mamba")) as rig:
        tokens = rig.tokens("hello")
        task = rig.send(tokens, ask(logprobs=3, prompt_logprobs=3, max_new_tokens=4))
        entries, of_prompt = [], []
        while True:
            step = await task.mailbox.get()
            entries += step.logprobs or ()
            of_prompt += step.prompt_logprobs or ()
            if step.finish:
                break
        ids = [entry.token_id for entry in entries]
        with torch.inference_mode():
            logits = models.reference("mamba").model(torch.tensor([tokens + ids])).logits[0]
        assert [entry.token_id for entry in of_prompt] == tokens
        assert of_prompt[0].logprob is None
        told = [*of_prompt[1:], *entries]
        for entry, row in zip(told, logits.log_softmax(-1), strict=False):
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-3)
            assert [i for i, *_ in entry.top] == row.topk(3).indices.tolist()


async def test_sampling_by_generate_is_the_same_as_in_a_batch(models: Tiny) -> None:
    """The same choice from the same logits, whichever way they come."""
    from engineroom_hf_transformers import engine as module

    how = {"temperature": 1.1, "seed": 3, "top_p": 0.9, "presence_penalty": 0.5}
    with Rig(models.parts("llama")) as rig:
        batched = await rig.answer("hello", **how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "why_not_driven", lambda *_: "the test says so")
        with Rig(models.parts("llama")) as rig:
            assert rig.engine.why_one_by_one
            alone = await rig.answer("hello", **how)
    assert alone.tokens == batched.tokens


MODELS_WISHES = {
    "repetition_penalty": 1.9,
    "no_repeat_ngram_size": 2,
    "suppress_tokens": list(range(10, 200)),
    "min_new_tokens": 30,
    "length_penalty": 5.0,
    "num_beams": 2,
    "top_k": 3,
    "temperature": 0.3,
    "do_sample": True,
    "forced_eos_token_id": 1,
    "max_length": 5,
}


@pytest.mark.parametrize("kind", ["mamba", "llama", "t5"])
async def test_what_the_models_files_say_of_sampling_changes_nothing(
    models: Tiny,
    write_checkpoint: Callable[..., Path],
    change_json: Callable[..., Path],
    tmp_path: Path,
    kind: str,
) -> None:
    from hf_benches import load

    folder = write_checkpoint(kind, tmp_path / kind)
    change_json(folder / "generation_config.json", **MODELS_WISHES)
    reference = models.reference(kind)
    with Rig(load(folder)) as rig:
        tokens = rig.tokens(TEXT[:60])
        assert (await rig.answer(tokens)).tokens == reference.generate(tokens, 24)
        found = await rig.answer(tokens, num_beams=3, max_new_tokens=8)
        assert found.tokens == reference.generate(tokens, 8, num_beams=3)


async def test_beams_over_nonsense_fail_and_name_the_remedy(
    models: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = models.parts("mamba")
    forward = type(parts.model).forward

    def nonsense(*args: Any, **kw: Any) -> Any:
        found = forward(*args, **kw)
        found.logits = torch.full_like(found.logits, float("nan"))
        return found

    monkeypatch.setattr(type(parts.model), "forward", nonsense)
    with Rig(parts) as rig:
        answer = await rig.answer("hello", num_beams=2)
        assert type(answer.error) is InferenceError
        assert "dtype: float32 or bfloat16" in str(answer.error)


class PanicException(BaseException):
    """Stands for pyo3's: a panic in Rust."""


@pytest.mark.parametrize(
    "raised", [PanicException("a Rust panic"), SystemExit(3), KeyboardInterrupt(), GeneratorExit()]
)
async def test_what_is_no_exception_ends_the_engine_and_holds_up_nobody(
    models: Tiny, monkeypatch: pytest.MonkeyPatch, raised: BaseException
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise raised

    with Rig(models.parts("mamba")) as bad, Rig(models.parts("llama")) as neighbour:
        beside = neighbour.send(neighbour.tokens("hello"))
        monkeypatch.setattr(bad.engine.parts.model, "generate", fail)
        answer = await bad.answer("hello")
        assert isinstance(answer.error, EngineDeadError)
        assert type(raised).__name__ in answer.error.message
        assert not bad.engine.health().ok and not generate_threads()
        expected = models.reference("llama").greedy(neighbour.tokens("hello"), 24)
        assert (await neighbour.read(beside)).tokens == expected
