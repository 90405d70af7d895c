"""Reasoning that has a bound: what ends it is forced, and an answer of its form follows."""

import asyncio

import pytest

pytest.importorskip("llguidance", reason="needs the extra engineroom[structured]")

from engineroom import InferenceRequest, TokenStep
from engineroom.engine import GrammarCompiler
from engineroom.generation.generation import Generation
from engineroom.generation.tool_formats import REASONING_FORMATS
from engineroom.generation.traits import ModelTraits
from engineroom.prompts import ModelTokens

END = 256
PIECES = [bytes([b]) for b in range(256)] + [b"<end>", b"</think>", b"ok<"]
THINK = next(format_ for format_ in REASONING_FORMATS if format_.name == "think")


class Codec:
    traits = ModelTraits(reasoning=THINK)

    def model_tokens(self):
        return ModelTokens(PIECES, frozenset({END}), [END], self.read)

    def read(self, text):
        return list(text.encode())


def constraint(budget, tail, **params):
    request = InferenceRequest(
        model_id="m",
        messages=[{"role": "user", "content": "q"}],
        reasoning_budget=budget,
        params=params,
    )
    return asyncio.run(GrammarCompiler(Codec()).compile(request, tail))


def write(place, liked):
    """What is written where the model likes best what ``liked`` says, as far as it is allowed."""
    text = []
    for likeliest in liked:
        allowed = place.allows(likeliest)
        token = likeliest if allowed else int(place.allowed().argmax())
        place.take(token)
        text.append(PIECES[token])
    return b"".join(text).decode()


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_what_is_begun_ends_and_the_answer_is_free(budget):
    text = write(constraint(budget, "<think>\n"), b"x" * 30)
    thought, _, answer = text.partition("</think>\n\n")
    assert (thought, set(answer)) == ("x" * budget, {"x"}) and len(text) == 30


def test_the_answer_has_its_form():
    place = constraint(3, "<think>\n", structured_output={"choice": ["yes"]})
    text = write(place, b"x" * 18)  # the form allows two more line breaks
    assert text.replace("\n", "") == "xxx</think>yes" and place.complete
    assert place.allows(END) and not place.allows(ord("x"))


@pytest.mark.parametrize("budget", range(6))
def test_a_character_is_written_to_its_end(budget):
    place = constraint(budget, "<think>\n", structured_output={"choice": ["yes"]})
    thought, _, answer = write(place, "🌸".encode() * 5).partition("</think>")
    assert thought == "🌸" * -(-budget // 4)
    assert "yes".startswith(answer.replace("\n", "").replace("<end>", ""))


def test_what_ends_by_itself_has_all_its_tokens():
    place = constraint(20, "<think>\n")
    assert write(place, [*b"ab", 257, *b"y" * 40]) == "ab</think>" + "y" * 40
    place = constraint(20, "<think>\n")
    assert write(place, [258, *b"/think>", *b"y" * 40]) == "ok</think>" + "y" * 40


def test_a_model_that_begins_by_itself():
    text = write(constraint(2, "assistant\n"), [*b"\n<think>", *b"x" * 20])
    assert text.startswith("\n<think>xx</think>\n\nxx")
    assert write(constraint(2, "assistant\n"), b"x" * 20) == "x" * 20
    assert constraint(2, "<think>\n\n</think>\n\n") is None


def test_a_copy_goes_its_own_way():
    place = constraint(2, "<think>\n", structured_output={"choice": ["yes"]})
    place.take(ord("x"))
    other = place.copy()
    assert write(other, b"x" * 8) == "x</think"
    assert write(place, b"y" * 2) == "y<" and not place.complete
    rest = write(other, b"y" * 8).replace("\n", "")
    assert rest.replace("<end>", "") == ">yes" and other.complete


@pytest.mark.parametrize(("budget", "content"), [(2, "yes"), (None, "</think>\n\nyes")])
def test_a_model_that_ends_its_reasoning_once_more(budget, content):
    request = InferenceRequest(
        model_id="m", messages=[{"role": "user", "content": "q"}], reasoning_budget=budget
    )
    generation = Generation(request, "h", reader=Codec.traits.reader(request), tail="<think>\n")
    for char in "xx</think>\n\n</think>\n\nyes":
        generation.take(TokenStep((1,), char.encode()))
    generation.finish()
    answer = generation.response()
    assert (answer.reasoning, answer.generated_text) == ("xx", content)
    assert "".join(generation.parsed.take_chunks()) == content
