"""Sizes and durations as people write them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, strategies as st
from pydantic import BaseModel, ValidationError

from engineroom.units import (
    DeviceBudgets,
    Duration,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("16GiB", 16 << 30),
        ("1.5 GiB", 3 << 29),
        ("500MB", 500_000_000),
        ("2tib", 2 << 40),
        ("4096", 4096),
        ("7 b", 7),
        (12, 12),
        (0, 0),
    ],
)
def test_a_size(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1", -1, True, None, "1 GiB 2", "ten", [], math.nan])
def test_what_is_no_size_says_how_one_is_written(text):
    with pytest.raises(ValueError, match="such as 16GiB"):
        parse_size(text)


def test_a_wrong_unit_and_too_much_are_told_apart():
    with pytest.raises(ValueError, match="'GiBs' is no unit"):
        parse_size("3GiBs")
    with pytest.raises(ValueError, match="check the unit"):
        parse_size("9999999 TiB")
    with pytest.raises(ValueError, match="check the unit"):
        parse_size(math.inf)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5m", 300), ("1.5h", 5400), ("30s", 30), ("250ms", 0.25), ("2d", 172800), ("7", 7), (0, 0),
     ("forever", math.inf), (" Forever ", math.inf)],
)  # fmt: skip
def test_a_duration(text, expected):
    assert parse_duration(text) == expected


@pytest.mark.parametrize("text", ["", "m", "-1s", -1, True, None, "soon", math.nan])
def test_what_is_no_duration_says_how_one_is_written(text):
    with pytest.raises(ValueError, match="such as 30s, 5m or 1h"):
        parse_duration(text)


@given(st.integers(0, 10**6).map(float) | st.just(math.inf))
def test_a_duration_that_was_written_is_read_again(seconds):
    assert parse_duration(format_duration(seconds)) == pytest.approx(seconds, rel=1e-5)


@given(st.integers(-(10**15), 10**15))
def test_every_size_can_be_shown(count):
    shown = format_size(count)
    assert parse_size(shown.removeprefix("-")) == pytest.approx(abs(count), rel=0.5)


class Config(BaseModel):
    memory: DeviceBudgets = {}
    keep: Duration = 0.0


def test_devices_and_budgets():
    config = Config(memory={"cpu": "1GiB", "cuda:0": "unlimited"}, keep="forever")
    assert config.memory == {"cpu": 1 << 30, "cuda:0": None}
    assert Config.model_validate_json(config.model_dump_json()).keep == math.inf
    for name in ("cuda", "cpu:0", "gpu0", "CPU", ""):
        with pytest.raises(ValidationError, match="write cpu, or cuda:0"):
            Config(memory={name: 1})
