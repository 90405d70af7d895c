"""The contract's parameters in vLLM's words, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, strategies as st

from engineroom import ConfigurationError, GenerationParams
from engineroom.generation.text import TextPipeline
from engineroom_vllm import VLLMHandler
from engineroom_vllm.sampling import check_params, sampling_arguments, stops_alone

VOCABULARY = 1000


def arguments(**params: Any) -> dict[str, Any]:
    return sampling_arguments(GenerationParams(**params), room=100, n_vocab=VOCABULARY)


def refusal(speculative: bool = False, **params: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        check_params(GenerationParams(**params), VOCABULARY, speculative=speculative)
    return str(caught.value)


NEUTRAL = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": None,
    "logprobs": None,
    "prompt_logprobs": None,
    "seed": None,
    "max_tokens": 100,
    "min_tokens": 0,
    "stop_token_ids": [],
}


def test_none_is_the_neutral_value_of_every_parameter() -> None:
    nothing = dict.fromkeys(GenerationParams.model_fields)
    assert arguments(**nothing) == NEUTRAL


def test_every_parameter_has_its_name_in_vllm() -> None:
    found = arguments(
        max_new_tokens=7,
        min_tokens=3,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        repetition_penalty=1.2,
        seed=2**63 - 1,
        presence_penalty=-1.0,
        frequency_penalty=2.0,
        logit_bias={5: -100.0},
        logprobs=0,
        prompt_logprobs=1,
    )
    assert found == {
        "max_tokens": 7,
        "min_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.0,
        "repetition_penalty": 1.2,
        "seed": 2**63 - 1,
        "presence_penalty": -1.0,
        "frequency_penalty": 2.0,
        "logit_bias": {5: -100.0},
        "logprobs": 0,
        "prompt_logprobs": 1,
        "stop_token_ids": [],
    }


MAPPED: dict[str, tuple[Any, str]] = {
    "max_new_tokens": (7, "max_tokens"),
    "min_tokens": (3, "min_tokens"),
    "temperature": (0.5, "temperature"),
    "top_p": (0.9, "top_p"),
    "top_k": (40, "top_k"),
    "min_p": (0.1, "min_p"),
    "repetition_penalty": (1.2, "repetition_penalty"),
    "presence_penalty": (-1.0, "presence_penalty"),
    "frequency_penalty": (2.0, "frequency_penalty"),
    "seed": (3, "seed"),
    "logit_bias": ({5: 1.0}, "logit_bias"),
    "logprobs": (3, "logprobs"),
    "prompt_logprobs": (3, "prompt_logprobs"),
}
"""Field of the contract → a value that asks for something, and its name in vLLM."""
ELSEWHERE = {
    "ignore_eos",  # min_tokens to the limit
    "do_sample",  # temperature 0
    "num_beams",  # requests for one token each
    "early_stopping",  # likewise
    "structured_output",  # an argument of another kind
}


def test_what_ends_later_ends_at_no_stop_token_either() -> None:
    def of(written: int = 0, **params: Any) -> tuple[int, list[int]]:
        found = sampling_arguments(
            GenerationParams(**params),
            room=100,
            n_vocab=VOCABULARY,
            stop_token_ids=[7],
            written=written,
        )
        assert found["min_tokens"] <= found["max_tokens"]
        return found["min_tokens"], found["stop_token_ids"]

    assert of() == of(min_tokens=0) == (0, [7])
    assert of(min_tokens=5) == (5, [])  # vLLM would not let it come
    assert of(ignore_eos=True, max_new_tokens=30) == (30, [])
    assert of(ignore_eos=True, max_new_tokens=None) == (100, [])
    assert of(min_tokens=500, max_new_tokens=None) == (100, [])
    assert (of(3, min_tokens=5), of(5, min_tokens=5)) == ((2, []), (0, [7]))


def test_no_parameter_is_dropped_in_silence() -> None:
    """Each has a name in vLLM, or its own way; the handler claims exactly these."""
    fields = set(GenerationParams.model_fields)
    assert fields == MAPPED.keys() | ELSEWHERE
    assert VLLMHandler().capabilities().params == fields
    neutral = arguments(**dict.fromkeys(fields))
    for field, (value, name) in MAPPED.items():
        found = arguments(**{**dict.fromkeys(fields), field: value})
        changed = {key for key in found if found[key] != neutral[key]}
        assert changed == {name}, field
        assert found[name] == value


def test_an_answer_is_never_longer_than_the_context_has_room() -> None:
    assert arguments(max_new_tokens=None)["max_tokens"] == 100
    assert arguments(max_new_tokens=101)["max_tokens"] == 100
    assert arguments(max_new_tokens=99)["max_tokens"] == 99


@pytest.mark.parametrize(
    "params",
    [
        {"do_sample": False, "temperature": 1.5, "top_p": 0.1, "seed": 3},
        {"temperature": 0.0},
        {"top_k": 1, "temperature": 2.0},
        {"top_p": 0.0, "temperature": 2.0},  # the likeliest is always kept; vLLM refuses 0
        {"temperature": 1e-6},
    ],
)
def test_greedy_is_temperature_zero_and_nothing_else(params: dict[str, Any]) -> None:
    found = arguments(**params)
    assert found["temperature"] == 0.0
    assert not {"top_p", "top_k", "min_p", "seed"} & found.keys()


def test_a_temperature_below_what_vllm_computes_is_the_nearest_that_it_does() -> None:
    assert arguments(temperature=0.006)["temperature"] == 0.01
    assert arguments(temperature=0.004)["temperature"] == 0.0
    assert arguments(temperature=0.01)["temperature"] == 0.01


@given(top_k=st.integers(0, 2**80))
def test_a_top_k_beyond_the_vocabulary_is_none(top_k: int) -> None:
    # Sent on, a number that is no int32 would end the engine.
    found = arguments(top_k=top_k, temperature=1.0)
    assert found.get("top_k", 0) == (top_k if 1 < top_k < VOCABULARY else 0)


@given(penalty=st.floats(1.0, allow_nan=False, allow_infinity=False))
def test_a_repetition_penalty_leaves_numbers(penalty: float) -> None:
    found = arguments(repetition_penalty=penalty)["repetition_penalty"]
    # Logits of a million times as much would still be numbers in single precision.
    assert found <= 1e30
    assert found == penalty or penalty > 1e30


def test_tokens_that_there_are_not_are_refused() -> None:
    assert "logit_bias names token 1000; the model's tokens are 0 to 999" in refusal(
        logit_bias={1000: 1.0}
    )
    check_params(GenerationParams(logit_bias={999: 1.0}), VOCABULARY)


def test_min_p_and_top_p_are_applied_in_another_order_by_vllm() -> None:
    message = refusal(min_p=0.1, top_p=0.9)
    assert "min_p" in message and "top_p" in message
    for params in (
        {"min_p": 0.1, "top_p": 1.0},
        {"min_p": 0.1, "top_k": 5},
        {"min_p": 0.0, "top_p": 0.9},
        {"min_p": 0.1, "top_p": 0.9, "temperature": 0},
    ):
        check_params(GenerationParams(**params), VOCABULARY)


@pytest.mark.parametrize("params", [{"min_p": 0.1}, {"logit_bias": {1: 1.0}}])
def test_speculative_decoding_refuses_what_vllm_would_ignore(params: dict[str, Any]) -> None:
    message = refusal(speculative=True, **params)
    assert next(iter(params)) in message and "speculative_config" in message
    check_params(GenerationParams(**params), VOCABULARY)


def test_beams_are_searched_without_sampling_and_without_penalties() -> None:
    assert "num_beams with sampling" in refusal(num_beams=2)
    assert "repetition_penalty" in refusal(num_beams=2, do_sample=False, repetition_penalty=1.5)
    assert "structured_output" in refusal(
        num_beams=2, do_sample=False, structured_output={"regex": "a"}
    )
    assert "at most 64" in refusal(num_beams=65, do_sample=False)
    for params in (
        {"num_beams": 64, "do_sample": False, "top_k": 5, "seed": 1, "top_p": 0.5},
        {"num_beams": 2, "temperature": 0, "early_stopping": True, "logprobs": 3},
        {"num_beams": 1},
        {"num_beams": None},
    ):
        check_params(GenerationParams(**params), VOCABULARY)


# ── stop sequences ───────────────────────────────────────────────────────────────────────────────

stops = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4)


@given(stops=stops, text=st.text("ab", max_size=12), more=st.text("ab", max_size=6))
def test_after_a_stop_sequence_that_stands_alone_nothing_changes_the_result(
    stops: list[str], text: str, more: str
) -> None:
    for stop in stops_alone(stops):
        ended, went_on = TextPipeline(stops), TextPipeline(stops)
        shown = ended.feed(text + stop) + ended.finish()
        same = went_on.feed(text + stop + more) + went_on.finish()
        assert (shown, ended.matched) == (same, went_on.matched)
        assert ended.matched is not None


def test_many_stop_sequences_take_no_longer_than_their_text() -> None:
    many = [f"{i:04}" for i in range(4000)]
    assert stops_alone([*many, "x0007y"]) == [*many[:7], *many[8:], "x0007y"]


def test_a_stop_sequence_inside_of_another_waits() -> None:
    assert stops_alone(["\n", "a\nb"]) == ["a\nb"]
    assert stops_alone(["\n", "a\n"]) == ["\n", "a\n"]
    assert stops_alone(["\n", "\nb"]) == ["\n", "\nb"]
    assert stops_alone(["x", "x", "y"]) == ["x", "y"]
    assert stops_alone([]) == []
