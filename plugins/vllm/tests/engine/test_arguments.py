"""What is asked of vLLM's engine, by the vLLM that is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from engineroom_vllm.arguments import engine_arguments
from engineroom_vllm.folder import read_folder
from engineroom_vllm.library import load
from engineroom_vllm.memory import plan
from engineroom_vllm.options import OWN_ARGUMENTS, VLLMOptions

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}


def arguments(model: Path, **given: Any) -> dict[str, Any]:
    folder, options = read_folder(model), VLLMOptions(**given)
    wanted = plan(folder, options, cpu=True)
    return engine_arguments(folder, options, wanted, eager=True, cpu=True)


def test_every_argument_is_one_of_this_vllm(tiny_model: Path, encoder: Path) -> None:
    library = load()
    for model in (tiny_model, encoder):
        library.check_arguments(arguments(model))
    library.check_arguments(dict.fromkeys(OWN_ARGUMENTS))
    library.check_arguments(dict.fromkeys(("max_loras", "enable_lora", "max_lora_rank")))


def test_what_was_asked_for_is_in_the_configuration(tiny_model: Path) -> None:
    given = arguments(
        tiny_model,
        n_ctx=256,
        n_parallel=3,
        kv_cache_memory="8MiB",
        enable_prefix_caching=False,
        speculative_config=NGRAM,
        engine_args={"seed": 7},
    )
    found = load().configure(given)
    assert found.model_config.max_model_len == 256
    assert found.model_config.enforce_eager is True
    assert found.model_config.seed == 7
    assert found.scheduler_config.max_num_seqs == 3
    assert found.cache_config.kv_cache_memory_bytes == 8 << 20
    assert found.cache_config.enable_prefix_caching is False
    assert found.speculative_config.method == "ngram"
    assert found.speculative_config.num_speculative_tokens == 3


def test_proposals_do_not_change_the_text(make: Callable[..., Any]) -> None:
    plain = make()
    expected = [plain.answer(p, max_new_tokens=48) for p in ("abc abc abc", "x")]
    bench = make(speculative_config=NGRAM)
    found = [bench.answer(r, max_new_tokens=48) for r in ("abc abc abc", "x")]
    for answer, other in zip(found, expected, strict=True):
        assert answer.error_message is None, answer
        assert answer.generated_text == other.generated_text
        assert (answer.finish_reason, answer.generated_tokens) == ("length", 48)
