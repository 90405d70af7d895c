"""The arithmetic of the benchmarks, on made-up clocks. No test looks at a real one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from benchmarks import __main__ as command
from benchmarks.harness import (
    DiscardError,
    Measurement,
    Pair,
    Ticks,
    UnavailableError,
    at_least,
    at_most,
    collect,
    interleave,
    repeat,
    undisturbed,
)


def clock(*readings: float) -> Callable[[], float]:
    times: Iterator[float] = iter(readings)
    return lambda: next(times)


def test_the_median_of_the_ratios_counts_not_the_ratio_of_the_medians():
    pairs = interleave(clock(1.0, 2.0, 3.0), clock(2.0, 1.0, 2.0), 3)
    assert pairs.ratios() == [0.5, 2.0, 1.5]
    assert Measurement("x", at_least(1), pairs.ratios()).median == 1.5
    assert pairs.median_a() / pairs.median_b() == 1.0


def test_the_sides_take_turns():
    order = []
    interleave(lambda: order.append("a") or 1.0, lambda: order.append("b") or 1.0, 3)
    assert order == ["a", "b"] * 3


def test_a_stalled_round_is_discarded_and_measured_again():
    pairs = interleave(clock(1.0, 3.1, 1.0, 1.2), clock(1.0, 1.0, 1.0, 1.0), 3)
    assert pairs.discarded == 1
    assert pairs.ratios() == [1.0, 1.0, 1.2]


@pytest.mark.parametrize("side", ["a", "b"])
def test_either_side_can_stall(side):
    stalled = Pair(9.0, 1.0) if side == "a" else Pair(1.0, 9.0)
    assert undisturbed([Pair(1.0, 1.0), stalled]) == [Pair(1.0, 1.0)]


def test_threefold_is_not_yet_a_stall():
    both = [Pair(1.0, 1.0), Pair(3.0, 3.0)]
    assert undisturbed(both) == both


def test_most_rounds_may_be_stalled():
    pairs = interleave(clock(50.0, 40.0, 1.0, 60.0, 1.0, 1.0), clock(*[1.0] * 6), 3)
    assert pairs.ratios() == [1.0, 1.0, 1.0]
    assert pairs.discarded == 3


def test_measuring_again_comes_to_an_end():
    pairs = interleave(clock(1.0, *[10.0] * 5), clock(*[1.0] * 6), 3)
    assert pairs.ratios() == [1.0]
    assert pairs.discarded == 5


def test_a_side_can_refuse_its_round():
    answers = iter([DiscardError("31 tokens instead of 32"), Pair(2.0, 1.0)])

    def measure() -> Pair:
        answer = next(answers)
        if isinstance(answer, DiscardError):
            raise answer
        return answer

    pairs = collect(measure, 1)
    assert (pairs.ratios(), pairs.discarded) == ([2.0], 1)


def test_without_a_round_that_counts_there_is_no_number():
    def measure() -> Pair:
        raise DiscardError("never comparable")

    with pytest.raises(UnavailableError, match=r"none of 10 rounds.*never comparable"):
        collect(measure, 5)


def test_a_side_without_a_counterpart_is_compared_with_nothing():
    pairs = collect(lambda: Pair(18.0, 0.0), 3)
    assert [pair.a for pair in pairs.kept] == [18.0] * 3


def test_what_has_no_other_side_keeps_all_its_values():
    assert repeat(clock(-1.0, 50.0, 1.0), 3) == ([-1.0, 50.0, 1.0], 0)


def test_what_has_no_other_side_can_be_refused_but_not_for_ever():
    answers = iter([DiscardError("too late"), 2.0, DiscardError("too late"), 3.0])

    def measure() -> float:
        answer = next(answers, None) or DiscardError("never")
        if isinstance(answer, DiscardError):
            raise answer
        return answer

    assert repeat(measure, 2) == ([2.0, 3.0], 2)
    with pytest.raises(UnavailableError, match=r"none of 6 rounds.*never"):
        repeat(measure, 3)


@pytest.mark.parametrize(
    ("target", "value", "met"),
    [
        (at_least(0.97), 0.97, True),
        (at_least(0.97), 0.96, False),
        (at_most(10, " µs"), 10.0, True),
        (at_most(10, " µs"), 10.1, False),
    ],
)
def test_targets(target, value, met):
    assert Measurement("x", target, [value]).met is met


def test_targets_are_written_with_their_unit():
    assert [str(at_least(0.97)), str(at_most(10, " µs"))] == ["≥ 0.97", "≤ 10 µs"]


def test_stolen_time():
    before = Ticks.parse("cpu  100 0 100 700 0 0 0 100 50 0\ncpu0 1 2 3 4 5 6 7 8\n")
    after = Ticks.parse("cpu  150 0 150 760 0 0 0 140 90 0\n")
    assert before == (1000, 100)
    assert after is not None
    assert after.stolen_since(before) == 0.2  # 40 of 200
    assert before.stolen_since(before) == 0.0


def test_a_system_that_does_not_tell_what_was_stolen():
    assert Ticks.parse("cpu  1 2 3 4\n") is None
    assert Ticks.parse("") is None


def test_a_row_of_the_table():
    row = command.as_row(2, Measurement("what", at_least(0.97), [0.9, 1.0, 1.1], discarded=2))
    assert row == ("2", "what", "≥ 0.97", "1.00", "0.90–1.10", "yes", "3", "2")
    assert len(row) == len(command.COLUMNS)


def test_bars_are_chosen_by_group_and_by_number(capsys):
    numbers = {
        arguments: [each.number for each in command.chosen(arguments)]
        for arguments in ((), ("core",), ("3", "core"))
    }
    assert set(numbers["core",]) < set(numbers[()])
    assert set(numbers["3", "core"]) == {3, *numbers["core",]}
    for name in command.GROUPS:  # two runtimes may have the same bar, but none has one twice
        found = [each.number for each in command.chosen([name])]
        assert len(found) == len(set(found))
    both = [each.measure.__module__ for each in command.chosen(["llamacpp:9"])]
    assert both == ["benchmarks.llamacpp"]
    for name in ("no-such-bar", "llamacpp:1"):
        with pytest.raises(SystemExit):
            command.main([name])
        assert name in capsys.readouterr().err


def test_what_a_library_is_compiled_for_is_read_from_what_it_says():
    from benchmarks.llamacpp_sides import instructions

    said = "CPU : SSE3 = 1 | AVX = 1 | AVX2 = 1 | AVX512 = 0 | FMA = 1 | OPENMP = 1 | "
    assert instructions(said) == "AVX, AVX2"
    assert instructions("CPU : NEON = 1 | ARM_FMA = 1 | DOTPROD = 1 | ") == "NEON, DOTPROD"
    assert instructions("") == "no vector instructions"


def test_every_bar_says_what_its_sides_are():
    for each in command.chosen(()):
        assert "A:" in (each.measure.__doc__ or ""), each.number


def test_a_bar_that_cannot_be_measured_or_breaks_leaves_the_others(monkeypatch, capsys, tmp_path):
    from benchmarks.harness import Bar

    def unavailable(settings):
        raise UnavailableError("install it")
        yield

    def broken(settings):
        raise KeyError("oops")
        yield

    def fine(settings):
        yield Measurement("fine", at_least(1), [2.0] * settings.rounds)

    bars = [Bar(1, unavailable), Bar(2, broken), Bar(3, fine)]
    monkeypatch.setattr(command, "chosen", lambda names: bars)
    file = tmp_path / "numbers.json"
    assert command.main(["--rounds", "4", "--json", str(file)]) == 1
    out = capsys.readouterr().out
    assert "bar 1 was not measured: install it" in out
    assert "bar 2 failed: KeyError: 'oops'" in out
    assert "| fine " in out
    assert '"median": 2.0' in file.read_text(encoding="utf-8")
    bars.pop(1)
    assert command.main([]) == 0


def test_the_servers_load_is_measured_side_by_side(capsys, monkeypatch):
    pytest.importorskip("uvicorn", reason="needs engineroom[server]")
    pytest.importorskip("msgspec", reason="needs engineroom[server]")
    from benchmarks import server_load

    monkeypatch.setitem(server_load.SIDES, "litserve", "no_such_module")
    monkeypatch.setattr(server_load.measure, "__defaults__", ((1, 3),))
    assert server_load.main(["engineroom", "litserve", "--seconds", "0.1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1:3] for line in lines[2:4]] == [
        [" engineroom ", " 1 "], [" engineroom ", " 3 "],
    ]  # fmt: skip
    assert lines[4:] == ["litserve: skipped, it needs no_such_module: pip install no_such_module"]
    with pytest.raises(SystemExit):
        server_load.main(["nobody"])
