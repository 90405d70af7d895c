"""LoRA adapters: applied to every request, by their scale, or chosen by name."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from llama_benches import together

from engineroom import ConfigurationError, GenerationParams, InferenceRequest

Make = Callable[..., Awaitable[Any]]


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write an adapter that changes the queries of both layers of the tiny model."""

    def adapter(seed: int = 3, width: int = 64, kind: Any = np.float32, alpha: Any = 4.0) -> Path:
        path, rank = tmp_path / f"adapter-{seed}-{width}.gguf", 4
        random = np.random.default_rng(seed)
        writer = gguf.GGUFWriter(str(path), "llama")
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        if isinstance(alpha, float):
            writer.add_float32("adapter.lora.alpha", alpha)
        else:
            writer.add_uint32("adapter.lora.alpha", alpha)
        for layer in range(2):
            name = f"blk.{layer}.attn_q.weight"
            for part, shape in (("lora_a", (rank, width)), ("lora_b", (width, rank))):
                writer.add_tensor(f"{name}.{part}", random.normal(0, 1, shape).astype(kind))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return adapter


@pytest.fixture
def adapter(write: Write) -> Path:
    return write()


def ask(adapter: str | None = None, prompt: str = "hello", new: int = 24) -> InferenceRequest:
    params = GenerationParams(temperature=0, max_new_tokens=new, logit_bias={2: -100.0})
    return InferenceRequest(model_id="m", prompt=prompt, params=params, adapter=adapter)


async def answer(make: Make, **options: Any) -> str:
    bench = await make(**options)
    response = await bench.service.infer(ask())
    response.raise_for_error()
    text: str = response.generated_text
    return text


async def test_an_adapter_changes_the_answers_by_its_scale(make: Make, adapter: Path) -> None:
    plain = await answer(make)
    applied = await answer(make, lora=[str(adapter)])
    halved = await answer(make, lora=[{"path": str(adapter), "scale": 0.5}])
    off = await answer(make, lora=[{"path": str(adapter), "scale": 0.0}])
    assert off == plain
    assert len({plain, applied, halved}) == 3


async def test_requests_choose_adapters_by_name(make: Make, write: Write) -> None:
    first, second = str(write(3)), str(write(4))
    bench = await make(lora=[{"path": first, "name": "one"}, {"path": second, "name": "two"}])
    alone = {
        None: await answer(make),
        "one": await answer(make, lora=[first]),
        "two": await answer(make, lora=[second]),
    }
    assert len(set(alone.values())) == 3
    for name in ("one", None, "two", "one"):
        response = await bench.service.infer(ask(name))
        assert response.generated_text == alone[name], name


async def test_requests_of_several_adapters_run_beside_each_other(make: Make, write: Write) -> None:
    bench = await make(
        n_parallel=6,
        prefill_chunk=8,
        lora=[{"path": str(write(s)), "name": f"a{s}"} for s in (3, 4)],
    )
    names = (None, "a3", "a4")
    prompts = ("hello", "z" * 40, "the lo he")
    wanted = {
        (name, prompt): (await bench.service.infer(ask(name, prompt))).generated_text
        for name in names
        for prompt in prompts
    }
    assert len(set(wanted.values())) == 9
    found = await asyncio.gather(*(bench.service.infer(ask(*each)) for each in wanted))
    assert [each.generated_text for each in found] == list(wanted.values())
    await bench.idle()


async def test_what_one_adapter_computed_is_nothing_to_another(make: Make, write: Write) -> None:
    adapters = [{"path": str(write(s)), "name": f"a{s}"} for s in (3, 4)]
    bench = await make(lora=adapters)
    prompt = "hello the lo " * 4
    wanted = {}
    for name in ("a3", None, "a4"):
        alone = await make(lora=adapters, prefix_cache=False)
        wanted[name] = (await alone.service.infer(ask(name, prompt))).generated_text
        response = await bench.service.infer(ask(name, prompt))
        assert response.cached_prompt_tokens == 0, name
        assert response.generated_text == wanted[name]
    assert len(set(wanted.values())) == 3
    for name in ("a4", None, "a3"):
        response = await bench.service.infer(ask(name, prompt))
        assert response.cached_prompt_tokens > 30, name
        assert response.generated_text == wanted[name]
    # Nor while it is still at work.
    long, other = ask("a3", prompt, 60), ask("a4", prompt, 60)
    both = await asyncio.gather(bench.service.infer(long), bench.service.infer(other))
    assert both[0].generated_text.startswith(wanted["a3"])
    assert both[1].generated_text.startswith(wanted["a4"])
    await bench.idle()


async def test_adapters_take_turns_under_preemption(make: Make, write: Write) -> None:
    adapters = [{"path": str(write(s)), "name": f"a{s}"} for s in (3, 4)]
    bench = await make(n_ctx=128, n_parallel=4, lora=adapters)
    requests = [ask(name, "z" * 20, 60) for name in ("a3", "a4", None, "a3", "a4", None)]
    wanted = [(await bench.service.infer(each)).generated_text for each in requests[:3]] * 2
    again = [each.model_copy(update={"request_id": f"r{i}"}) for i, each in enumerate(requests)]
    found = await together(bench, again)
    assert [each.generated_text for each in found] == wanted
    assert bench.engine.preemptions > 0
    await bench.idle()


async def test_adapters_with_and_without_names_go_together(make: Make, write: Write) -> None:
    first, second = str(write(3)), str(write(4))
    both = await answer(make, lora=[first, second])
    bench = await make(lora=[first, {"path": second, "name": "two"}])
    assert (await bench.service.infer(ask("two"))).generated_text == both
    assert (await bench.service.infer(ask())).generated_text == await answer(make, lora=[first])


async def test_an_unknown_name_is_refused_with_those_that_are_known(
    make: Make, write: Write
) -> None:
    bench = await make(lora=[{"path": str(write(s)), "name": f"a{s}"} for s in (4, 3)])
    response = await bench.service.infer(ask("b"))
    assert response.error_type == "ConfigurationError"
    assert "adapter 'b' is not loaded with this model; it has a3, a4" in response.error_message
    plain = await make()
    response = await plain.service.infer(ask("b"))
    assert "it has none (see the option lora)" in response.error_message


async def test_an_adapter_of_another_model_or_damaged_is_refused(make: Make, write: Write) -> None:
    other = write(5, width=32)
    with pytest.raises(ConfigurationError, match="lora: llama.cpp cannot apply"):
        await make(lora=[str(other)])
    cut = write(6)
    cut.write_bytes(cut.read_bytes()[:-4000])
    with pytest.raises(ConfigurationError, match="cut short"):
        await make(lora=[str(cut)])


async def test_an_adapter_that_would_end_the_process_is_refused(make: Make, write: Write) -> None:
    with pytest.raises(ConfigurationError, match=r"adapter-7.*that no weights are of"):
        await make(lora=[str(write(7, kind=np.int32))])
    with pytest.raises(ConfigurationError, match=r"adapter-8.*adapter\.lora\.alpha of a type"):
        await make(lora=[str(write(8, alpha=4))])
