"""Beam search: against one written plainly over the model's full logits, and transformers'."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_benches import EOS, EXACT, NO_END, ask, together

from engineroom_llamacpp.context import LlamaContext
from engineroom_llamacpp.model import LlamaModel
from engineroom_llamacpp.options import LlamaCppOptions

Make = Callable[..., Awaitable[Any]]
Odds = Callable[[tuple[int, ...]], Sequence[float]]


def plain_search(
    odds: Odds, beams: int, limit: int, ends: set[int], *, early: bool
) -> tuple[int, ...]:
    """Beam search as transformers documents it, with everything looked at and nothing clever."""
    running: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    complete: list[tuple[tuple[int, ...], float]] = []
    for length in range(1, limit + 1):
        grown = [
            ((*tokens, token), score + value)
            for tokens, score in running
            for token, value in enumerate(odds(tokens))
        ]
        grown.sort(key=lambda each: -each[1])
        for place, (tokens, score) in enumerate(grown):
            if place < beams and (tokens[-1] in ends or length == limit):
                complete.append((tokens, score / length))
        complete.sort(key=lambda each: -each[1])
        del complete[beams:]
        running = [each for each in grown if each[0][-1] not in ends][:beams]
        if len(complete) == beams and (early or running[0][1] / length <= complete[-1][1]):
            break
    return complete[0][0]


class Reference:
    """The tiny model, computed anew from the beginning for every question."""

    def __init__(self, path: Path) -> None:
        options = LlamaCppOptions.model_validate({**EXACT, "n_ctx": 256, "n_parallel": 1})
        self.model = LlamaModel(path, options)
        self._context = LlamaContext(self.model, options)
        self._known: dict[tuple[int, ...], Sequence[float]] = {}

    def odds(self, tokens: tuple[int, ...], bias: dict[int, float]) -> Sequence[float]:
        """Log probabilities of what comes next."""
        if tokens not in self._known:
            self._context.forget(0)
            self._context.begin()
            row = self._context.add(0, 0, tokens, 1)
            assert self._context.decode() == 0
            logits = self._context.logits(row).astype(np.float64)
            scaled = logits - logits.max()
            self._known[tokens] = list(scaled - math.log(np.exp(scaled).sum()))
        found = list(self._known[tokens])
        for token, value in bias.items():
            found[token] += value
        return found

    def search(
        self, prompt: str, beams: int, limit: int, *, early: bool, bias: dict[int, float]
    ) -> str:
        tokens = tuple(self.model.tokenize(prompt))
        best = plain_search(
            lambda generated: self.odds(tokens + generated, bias), beams, limit, {EOS}, early=early
        )
        text = b"".join(self.model.piece(token) or b"" for token in best)
        return text.decode(errors="replace")

    def close(self) -> None:
        self._context.close()
        self.model.close()


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Any:
    found = Reference(tiny_model)
    yield found
    found.close()


# ── in the engine ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(("beams", "end"), [(2, 0.0), (3, 4.0), (4, 6.0), (5, -100.0)])
async def test_it_agrees_with_a_plain_search_over_all_logits(
    make: Make, reference: Reference, beams: int, end: float, early: bool
) -> None:
    bench = await make(n_parallel=8, n_ctx=512)
    bias = {EOS: end}
    prompts = ["hello", "the lake", "a"]
    requests = [
        ask(p, num_beams=beams, early_stopping=early, max_new_tokens=12, logit_bias=bias)
        for p in prompts
    ]
    found = await asyncio.gather(*map(bench.service.infer, requests))
    for prompt, response in zip(prompts, found, strict=True):
        assert response.error_message is None
        expected = reference.search(prompt, beams, 12, early=early, bias=bias)
        assert response.generated_text == expected
    assert end < 4 or "eos_token" in {r.finish_reason for r in found}
    await bench.idle()


async def test_penalties_weigh_on_each_beam(make: Make) -> None:
    bench = await make()
    texts = set()
    for params in ({}, {"repetition_penalty": 1.8}, {"presence_penalty": 1.5}):
        response = await bench.service.infer(ask(num_beams=3, max_new_tokens=30, **params))
        again = await bench.service.infer(ask(num_beams=3, max_new_tokens=30, **params))
        assert response.generated_text == again.generated_text
        texts.add(response.generated_text)
    assert len(texts) == 3


async def test_beams_and_others_go_on_beside_each_other(make: Make) -> None:
    bench = await make(n_parallel=4)
    requests = [ask("one", num_beams=3, max_new_tokens=20), ask("two"), ask("three", num_beams=2)]
    alone = [(await bench.service.infer(r)).generated_text for r in requests]
    found = await asyncio.gather(*(bench.service.infer(r) for r in requests * 2))
    assert [r.generated_text for r in found] == alone * 2
    await bench.idle()


async def test_more_beams_than_places_search_alone(make: Make) -> None:
    bench = await make(n_parallel=1)
    roomy = await make(n_parallel=8)
    request = ask(num_beams=4, max_new_tokens=10)
    found = await asyncio.gather(*(bench.service.infer(request) for _ in range(2)))
    expected = (await roomy.service.infer(request)).generated_text
    assert [r.generated_text for r in found] == [expected] * 2


async def test_a_search_that_had_to_wait_finds_the_same(make: Make) -> None:
    tight = await make(n_ctx=256, n_parallel=6)
    roomy = await make(n_ctx=512, n_parallel=1)
    requests = [ask(f"{i} is long", max_new_tokens=80) for i in range(3)]
    requests.append(ask("beams", num_beams=3, max_new_tokens=60))
    expected = [(await roomy.service.infer(r)).generated_text for r in requests]
    answers = await together(tight, requests)
    assert [r.generated_text for r in answers] == expected
    assert tight.engine.preemptions > 0
    await tight.idle()


async def test_a_cancelled_search_frees_its_sequences(make: Make) -> None:
    bench = await make(n_parallel=4, n_ctx=512)
    task = asyncio.create_task(
        bench.service.infer(ask(num_beams=4, max_new_tokens=100, logit_bias=NO_END))
    )
    await bench.until(lambda: bench.engine.sequences.unused < bench.engine.sequences.count - 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await bench.idle()


async def test_a_search_that_fills_the_context_ends(make: Make) -> None:
    bench = await make(n_ctx=256)
    response = await bench.service.infer(ask(num_beams=3, max_new_tokens=None))
    assert response.finish_reason == "length"
    assert response.generated_tokens == (256 - response.prompt_tokens) // 3
    await bench.idle()


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"num_beams": 2, "temperature": 0.7}, "num_beams with sampling"),
        ({"num_beams": 2, "logprobs": 1}, "logprobs cannot be told with num_beams"),
        ({"num_beams": 17}, "num_beams=17: at most 16"),
    ],
)
async def test_what_cannot_be_searched_with_is_refused_by_name(
    make: Make, params: dict[str, Any], said: str
) -> None:
    response = await (await make()).service.infer(ask(**params))
    assert response.error_type == "ConfigurationError"
    assert said in response.error_message


async def test_a_prompt_that_leaves_no_token_for_each_beam_is_refused(make: Make) -> None:
    response = await (await make(n_ctx=256)).service.infer(ask("x" * 252, num_beams=4))
    assert response.error_type == "ContextLengthExceededError"
    assert "253 tokens" in response.error_message
    assert "num_beams=4" in response.error_message


# ── transformers ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("early", [False, True])
async def test_it_agrees_with_transformers(make: Make, tiny_model: Path, early: bool) -> None:
    torch = pytest.importorskip("torch", reason="torch and transformers are not installed")
    pytest.importorskip("transformers", reason="torch and transformers are not installed")
    model = as_transformers(tiny_model)
    bench = await make(n_parallel=4)
    for prompt in ("hello", "the lake", "a house"):
        ids = torch.tensor([bench.engine.model.tokenize(prompt)])
        for beams, count in ((2, 12), (4, 20)):
            wanted = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                num_beams=beams,
                max_new_tokens=count,
                do_sample=False,
                early_stopping=early,
                eos_token_id=EOS,
                pad_token_id=0,
            )[0].tolist()[ids.shape[1] :]
            response = await bench.service.infer(
                ask(
                    prompt,
                    num_beams=beams,
                    max_new_tokens=count,
                    early_stopping=early,
                    logit_bias=None,
                )
            )
            pieces = (bench.engine.model.piece(token) or b"" for token in wanted)
            assert response.generated_text == b"".join(pieces).decode(errors="replace")


def as_transformers(path: Path) -> Any:
    """The tiny llama in transformers, with the same weights."""
    import gguf
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tensors = {t.name: np.array(t.data) for t in gguf.GGUFReader(path).tensors}
    config = LlamaConfig(
        vocab_size=len(tensors["token_embd.weight"]),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        max_position_embeddings=512,
        rope_theta=10000.0,
        tie_word_embeddings=False,
    )
    names = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    state = {
        "model.embed_tokens.weight": tensors["token_embd.weight"],
        "model.norm.weight": tensors["output_norm.weight"],
        "lm_head.weight": tensors["output.weight"],
    }
    for layer in range(2):
        for short, long in names.items():
            values = tensors[f"blk.{layer}.{short}.weight"]
            if short in ("attn_q", "attn_k"):  # llama.cpp's rotary pairs lie side by side
                heads = len(values) // 16
                values = values.reshape(heads, 8, 2, 64).swapaxes(1, 2).reshape(values.shape)
            state[f"model.layers.{layer}.{long}.weight"] = values
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict({name: torch.tensor(values) for name, values in state.items()})
    return model
