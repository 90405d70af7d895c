"""Proposals change no answer; they only save steps."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from llama_benches import EOS, ask, together

from engineroom import ConfigurationError
from engineroom_llamacpp import LlamaCppHandler
from engineroom_llamacpp.context import LlamaContext
from engineroom_llamacpp.drafting import DraftModel

Make = Callable[..., Awaitable[Any]]
TEXT = "all of this is written by someone who knows how long a prompt can become, and why. "


# ── in the engine ────────────────────────────────────────────────────────────────────────────

PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.9, "seed": 4},
    {"temperature": 1.2, "seed": 5, "top_k": 8, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 0.3, "seed": 6, "presence_penalty": 0.7, "frequency_penalty": 0.3},
    {"temperature": 0.0, "repetition_penalty": 1.3, "logprobs": 2},
    # Of three tokens: what it has said before is often right, and often wrong.
    {"temperature": 0.8, "seed": 7, "logit_bias": {100: 90.0, 101: 90.0, 102: 90.0}},
]


@pytest.fixture(scope="module")
def other(write_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A draft that is wrong."""
    return write_model(tmp_path_factory.mktemp("draft") / "other.gguf", seed=2)


def how_to_draft(how: str, tiny_model: Path, other: Path) -> dict[str, Any]:
    if how == "lookup":
        return {"prompt_lookup": True}
    return {"draft_model": str(tiny_model if how == "same" else other)}


@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize("how", ["lookup", "same", "other"])
async def test_answers_are_those_without_proposals(
    make: Make, tiny_model: Path, other: Path, how: str, tokens: int
) -> None:
    prompts = [TEXT, "abc" * 20, "hello", TEXT[5:70], "the the the the", "x"]
    requests = [
        ask(p, max_new_tokens=40, **params) for p, params in zip(prompts, PARAMS, strict=True)
    ]
    plain = await make()
    expected = [await plain.service.infer(r) for r in requests]
    bench = await make(draft_tokens=tokens, n_parallel=6, **how_to_draft(how, tiny_model, other))
    found = await asyncio.gather(*map(bench.service.infer, requests))
    for a, b in zip(found, expected, strict=True):
        for name in ("generated_text", "generated_tokens", "finish_reason"):
            assert getattr(a, name) == getattr(b, name)
        assert [e.token_id for e in a.logprobs or ()] == [e.token_id for e in b.logprobs or ()]
    engine = bench.engine
    assert 0 <= engine.scheduler.accepted < engine.scheduler.proposed
    assert engine.scheduler.accepted > 0 or how == "other"
    await bench.idle()


def steps_of(monkeypatch: pytest.MonkeyPatch, bench: Any) -> list[int]:
    """Notes the steps of the model itself, not those of its draft."""
    steps: list[int] = []
    decode = LlamaContext.decode

    def noted(context: LlamaContext) -> int:
        if context is bench.engine._context:
            steps.append(int(context._batch.n_tokens))
        return decode(context)

    monkeypatch.setattr(LlamaContext, "decode", noted)
    return steps


async def test_a_text_that_repeats_itself_takes_fewer_steps(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = await make(prompt_lookup=True, draft_tokens=4)
    steps = steps_of(monkeypatch, bench)
    response = await bench.service.infer(ask(max_new_tokens=40, logit_bias={66: 100.0}))
    assert response.generated_tokens == 40
    # Four until three of them stand there with something after them; then five a step.
    assert len(steps) <= 13
    assert bench.engine.scheduler.accepted == 40 - len(steps)
    detail = bench.engine.health().detail
    assert detail.startswith(
        f"{bench.engine.scheduler.accepted} of {bench.engine.scheduler.proposed} proposed tokens"
    )


async def test_a_draft_that_is_always_right_saves_steps(
    make: Make, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = await make(draft_model=str(tiny_model), draft_tokens=4)
    steps = steps_of(monkeypatch, bench)
    response = await bench.service.infer(ask(max_new_tokens=40))
    # The first token comes of the prompt; then five a step.
    assert response.generated_tokens == 40
    assert len(steps) <= 10
    assert bench.engine.scheduler.accepted == bench.engine.scheduler.proposed >= 30


async def test_a_stop_in_the_middle_of_right_proposals(make: Make, tiny_model: Path) -> None:
    """What ends the text ends it, whatever would have been right after it."""
    bench = await make(draft_model=str(tiny_model), draft_tokens=8)
    whole = await bench.service.infer(ask(max_new_tokens=20))
    for count in range(1, 12):
        response = await bench.service.infer(ask(max_new_tokens=count))
        assert (response.generated_tokens, response.finish_reason) == (count, "length")
        assert whole.generated_text.startswith(response.generated_text.rstrip("\ufffd"))
    ends = await bench.service.infer(ask(max_new_tokens=200, logit_bias={EOS: 5.0}))
    plain = await (await make()).service.infer(ask(max_new_tokens=200, logit_bias={EOS: 5.0}))
    assert (ends.generated_text, ends.finish_reason) == (plain.generated_text, plain.finish_reason)
    await bench.idle()


async def test_with_little_room_answers_are_the_same(make: Make, tiny_model: Path) -> None:
    """Proposals take what room there is, and never anybody's place."""
    plain = await make(n_ctx=1024)
    bench = await make(n_ctx=256, n_parallel=4, n_batch=16, draft_model=str(tiny_model))
    requests = [ask(f"request number {i}", max_new_tokens=150) for i in range(4)]
    expected = [(await plain.service.infer(r)).generated_text for r in requests]
    found = await together(bench, requests)
    assert [r.generated_text for r in found] == expected
    assert bench.engine.preemptions > 0
    assert bench.engine.scheduler.accepted > 0
    await bench.idle()


async def test_a_draft_that_fails_is_not_believed_to_have_read_anything(
    make: Make, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = await make(draft_model=str(tiny_model), n_parallel=1)
    expected = (await bench.service.infer(ask(TEXT, max_new_tokens=40))).generated_text
    drafter = bench.engine.scheduler.drafter
    assert isinstance(drafter, DraftModel)
    decode = LlamaContext.decode
    calls: list[int] = []

    def fails_often(context: LlamaContext) -> int:
        calls.append(1)
        status = decode(context)
        return -3 if context is drafter._context and len(calls) % 3 else status

    monkeypatch.setattr(LlamaContext, "decode", fails_often)
    again = await bench.service.infer(ask(TEXT, max_new_tokens=40))
    assert again.generated_text == expected
    await bench.idle()


async def test_a_request_that_ends_leaves_nothing_in_the_draft(
    make: Make, tiny_model: Path
) -> None:
    bench = await make(draft_model=str(tiny_model))
    await asyncio.gather(*(bench.service.infer(ask(f"{i} {TEXT}")) for i in range(6)))
    await bench.idle()
    drafter = bench.engine.scheduler.drafter
    assert isinstance(drafter, DraftModel)
    assert drafter._content == {}
    assert [drafter._context.length(i) for i in range(drafter._context.sequences)] == [0] * 16


# ── loading ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"words": ("▁other",)}, "its vocabulary is another one"),
        ({"kind": "state"}, "it keeps states"),
    ],
)
async def test_a_draft_that_cannot_propose_is_refused(
    make: Make,
    write_model: Callable[..., Path],
    tmp_path: Path,
    changes: dict[str, Any],
    said: str,
) -> None:
    draft = write_model(tmp_path / "draft.gguf", **changes)
    with pytest.raises(ConfigurationError) as caught:
        await make(draft_model=str(draft))
    assert "draft_model: 'draft.gguf' cannot propose tokens" in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize("how", ["lookup", "same"])
async def test_a_model_with_states_takes_no_proposals(
    make: Make, write_model: Callable[..., Path], tmp_path: Path, tiny_model: Path, how: str
) -> None:
    path = write_model(tmp_path / "state.gguf", kind="state")
    with pytest.raises(ConfigurationError, match="this model keeps states"):
        await make(path, **how_to_draft(how, tiny_model, tiny_model))


async def test_memory_counts_the_draft_and_its_cache(make: Make, tiny_model: Path) -> None:
    alone = await make(prompt_cache_memory=0)
    both = await make(prompt_cache_memory=0, draft_model=str(tiny_model))
    taken = [bench.manager.get_loaded_model("m").memory_bytes for bench in (alone, both)]
    assert taken[1] == 2 * taken[0]
    handler = LlamaCppHandler()
    estimates: Sequence[int] = [
        (handler.estimate_memory(bench.manager.get_loaded_model("m").config) or {})["cpu"]
        for bench in (alone, both)
    ]
    assert estimates[1] == 2 * estimates[0]
