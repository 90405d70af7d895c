"""What a request may not exceed, and what is said then."""

from __future__ import annotations

import pytest

from engineroom import ConfigurationError, ContextLengthExceededError
from engineroom.prompts import (
    check_adapter,
    check_beams,
    check_prompt,
    check_texts,
    check_token_ids,
)


def test_a_prompt_has_tokens_and_leaves_room_for_one() -> None:
    check_prompt([1], 2, "")
    with pytest.raises(ConfigurationError, match="no tokens; send at least one character"):
        check_prompt([], 2, "")
    with pytest.raises(
        ContextLengthExceededError, match="length is 2 .* has 2 tokens.*or buy more"
    ):
        check_prompt([1, 1], 2, "buy more")


def test_ids_are_those_of_the_model() -> None:
    check_token_ids(10)
    check_token_ids(10, prompt=[0, 9], bias={9: 1.0})
    with pytest.raises(ConfigurationError, match="prompt_token_ids has 12; .* 0 to 9"):
        check_token_ids(10, prompt=[3, 12, 10])
    with pytest.raises(ConfigurationError, match="logit_bias names token 10; .* 0 to 9"):
        check_token_ids(10, bias={10: 1.0, 1: 2.0})


def test_an_adapter_is_one_of_those_that_are_loaded() -> None:
    check_adapter(None, [], "lora")
    check_adapter("a", {"a": 1}, "lora")
    with pytest.raises(ConfigurationError, match="'c' is not loaded .*; it has a, b"):
        check_adapter("c", ["b", "a"], "lora")
    with pytest.raises(ConfigurationError, match=r"it has none \(see the option lora\)"):
        check_adapter("c", [], "lora")


@pytest.mark.parametrize("beams", [None, 1, 64])
def test_beams_may_be_many(beams: int | None) -> None:
    check_beams(beams)


@pytest.mark.parametrize("beams", [65, 2**63, 10**30])
def test_beams_are_bounded(beams: int) -> None:
    with pytest.raises(ConfigurationError, match=f"num_beams={beams}: at most 64"):
        check_beams(beams)


def test_texts_have_tokens_and_fit() -> None:
    check_texts([[1], [1, 2]], 2)
    with pytest.raises(ContextLengthExceededError, match="is 2 tokens.* text 1 has 3 tokens"):
        check_texts([[1], [1, 2, 3]], 2)
    with pytest.raises(ConfigurationError, match="text 0 has no tokens"):
        check_texts([[]], 2)
