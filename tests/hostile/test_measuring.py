"""What of a late loop is laid to the server, and what to the machine; and the corpus in itself."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, strategies as st

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("psutil", reason="needs psutil")
pytest.importorskip("numpy", reason="the models are made with numpy")

import corpus
from corpus_apis import EVERY
from corpus_base import SMALL, WHOLE
from hostile_server import Work

SECONDS = st.floats(0, 10)
NOTHING = Work(busy=0, idle=0, ours=0, loop=0)


@given(SECONDS, SECONDS, SECONDS, SECONDS, SECONDS)
def test_what_the_loop_worked_is_never_laid_to_others(late, busy, idle, ours, loop):
    held = Work(busy, idle, ours, loop).holds_out_of(late, NOTHING)
    assert loop <= held <= max(loop, late)


@pytest.mark.parametrize(
    ("work", "held"),
    [
        (Work(busy=1, idle=1, ours=1, loop=0), 1),  # a thread of ours kept the interpreter
        (Work(busy=2, idle=0, ours=2, loop=0), 1),  # two of them
        (Work(busy=2, idle=0, ours=0, loop=0), 0),  # others had both cores
        (Work(busy=2, idle=0, ours=1, loop=0), 0),  # or the other one: we may have waited for it
        (Work(busy=2, idle=0, ours=1, loop=1), 1),
        (Work(busy=1, idle=1, ours=0, loop=0), 1),  # there was a core to be had
    ],
)
def test_what_others_took_beyond_what_was_free_is_not_laid_to_us(work, held):
    assert work.holds_out_of(1, NOTHING) == held


def test_every_place_in_a_body_is_json():
    for api in EVERY:
        for places, hole in (
            (api.texts, '"x"'), (api.lists, "1"), (api.objects, '"x":1'), (api.numbers, "1"),
        ):  # fmt: skip
            for name, template in places.items():
                assert template.count("%s") == 1, (api.name, name)
                json.loads(template.replace("%s", hole))


def test_rows_have_names_of_their_own_and_bodies_fit_the_server():
    rows = [row for part in corpus.PARTS.values() for row in part]
    names = [(row.name, route) for row in rows for route, _ in row.visits(WHOLE)]
    assert len(names) == len(set(names))
    assert 200 < sum(1 for row in rows if row.small for _ in row.visits(SMALL)) < 500
