"""``min_tokens`` and ``ignore_eos``: no end comes too early, but that of a form."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from engineroom import GenerationParams, InferenceRequest, TokenStep
from engineroom.engine import GrammarCompiler, Sampler
from engineroom.engine.later_end import LaterEnd
from engineroom.generation.generation import Generation
from engineroom.generation.traits import PLAIN
from engineroom.prompts import ModelTokens, PromptCodec

END = 256
PIECES = [*(bytes([byte]) for byte in range(256)), b""]


class Codec:
    traits = PLAIN

    def model_tokens(self):
        return ModelTokens(PIECES, frozenset({END}), [END], self.read)

    def width_and_ends(self):
        return PromptCodec.width_and_ends(self)

    def read(self, text):
        return list(text.encode())


def asking(prompt="a", **params):
    return InferenceRequest(model_id="m", prompt=prompt, params=params)


def constraint(**params):
    return asyncio.run(GrammarCompiler(Codec()).compile(asking(**params)))


def liking_the_end():
    logits = np.zeros(257, np.float32)
    logits[END], logits[65] = 9.0, 5.0
    return logits


@pytest.mark.parametrize("way", [{"do_sample": False}, {"seed": 3}, {"seed": 3, "top_k": 2}])
def test_the_end_comes_only_after_so_many_tokens(way):
    params = GenerationParams(min_tokens=3, **way)
    sampler = Sampler(params, [1], LaterEnd(None, params.least_tokens, 257, frozenset({END})))
    tokens = [sampler.sample(liking_the_end()) for _ in range(4)]
    assert END not in tokens[:3] and tokens[3] == END
    assert sum(place.complete for place in [sampler.constraint]) == 1


def test_it_never_comes_where_it_is_ignored():
    place = constraint(ignore_eos=True)
    assert place is not None
    for _ in range(500):
        assert not place.allows(END) and not place.allowed()[END] and place.allowed()[:END].all()
        place.take(65)


def test_beams_do_not_end_either():
    params = GenerationParams(min_tokens=2, num_beams=2, do_sample=False)
    sampler = Sampler(params, [1], LaterEnd(None, 2, 257, frozenset({END})))
    for generated, may in (((), False), ((65,), False), ((65, 65), True)):
        row = sampler.log_probabilities(liking_the_end(), generated)
        assert bool(np.isfinite(row[END])) is may
    assert sampler.constraint.copy().allows(END) is False  # a copy counts for itself


def test_a_form_that_is_at_its_end_ends_all_the_same():
    pytest.importorskip("llguidance", reason="needs the extra engineroom[structured]")
    for asked in ({"ignore_eos": True}, {"min_tokens": 9}):
        place = constraint(structured_output={"regex": "ab{1,2}"}, **asked)
        for token in b"ab":
            assert not place.allows(END)
            place.take(token)
        assert not place.allows(END) and not place.allowed()[END]  # another b may follow
        place.take(ord("b"))
        assert place.allows(END) and place.ended and place.complete
        assert np.flatnonzero(place.allowed()).tolist() == [END]


def test_a_request_that_asks_for_nothing_pays_nothing():
    assert constraint() is None and constraint(min_tokens=0, ignore_eos=False) is None


def test_min_tokens_is_no_more_than_max_new_tokens():
    with pytest.raises(ValueError, match=r"min_tokens \(9\) is more than the limit of 8 tokens"):
        GenerationParams(min_tokens=9, max_new_tokens=8)
    assert GenerationParams(min_tokens=9, max_new_tokens=None).least_tokens == 9


@pytest.mark.parametrize(
    ("least", "text"), [(None, ""), (0, ""), (1, "xa"), (2, "xa"), (3, "xax"), (9, "xaxbxc")]
)
def test_stop_sequences_are_looked_for_behind_so_many_tokens(least, text):
    request = InferenceRequest(
        model_id="m", prompt="a", params={"min_tokens": least}, stop_sequences=["x", "bx"]
    )
    generation = Generation(request, "toy")
    shown = ""
    for place, letter in enumerate("xaxbxc"):
        shown += generation.take(TokenStep((place,), letter))
        if generation.finish_reason is not None:
            break
    shown += generation.finish()
    assert generation.text == shown == text


def told_in_steps(least, sizes, *, bytewise):
    """What a request shows whose six tokens come in steps of these sizes."""
    request = InferenceRequest(
        model_id="m", prompt="a", params={"min_tokens": least}, stop_sequences=["x", "bx"]
    )
    generation, place = Generation(request, "toy"), 0
    for size in sizes:
        ids = range(place, place + size)
        text, place = "xaxbxc"[place : place + size], place + size
        ends = range(1, size + 1) if size > 1 else ()
        generation.take(TokenStep(ids, text.encode() if bytewise else text, text_ends=ends))
        if generation.finish_reason is not None:
            break
    generation.finish()
    return generation.text, generation.finish_reason


@pytest.mark.parametrize("bytewise", [False, True])
def test_how_many_tokens_a_step_has_does_not_say_where_a_text_ends(bytewise):
    for least in (0, 1, 2, 3, 4, 5, 6, 9):
        alone = told_in_steps(least, [1] * 6, bytewise=bytewise)
        for sizes in ([6], [2, 4], [4, 2], [1, 3, 2], [5, 1], [3, 3], [2, 2, 2]):
            assert told_in_steps(least, sizes, bytewise=bytewise) == alone, (least, sizes)
