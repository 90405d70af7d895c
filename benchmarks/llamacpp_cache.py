"""Bars of the llama.cpp runtime's cache: does the speed stay when it fills, and with long prompts.

Over HTTP on both sides, a process a server; SmolLM2-135M in Q4_0 and Q8_0, or what
``ENGINEROOM_BENCH_KINDS`` names; beside llama-server with the options of
``ENGINEROOM_BENCH_OPTIONS`` (``kv_unified=false``). Prompts are words of a token each, which never
come again unless that is what is measured. Notes have the processor's time beside each figure.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from benchmarks.harness import (
    Bars,
    Measurement,
    Pair,
    Pairs,
    Settings,
    Target,
    at_least,
    at_most,
    collect,
    interleave,
)
from benchmarks.llamacpp_sides import LongBareSide, model_path
from benchmarks.served import (
    Answer,
    Engineroom,
    LlamaServer,
    Served,
    median_first,
    seconds,
    words,
)
from benchmarks.workers import Worker

bar = Bars()

N_CTX: Final = 32768
SHORT: Final = 64
LONG: Final = 1489
LONGER: Final = 4000
IDLE: Final = 14
"""Long prompts that a full cache has had."""
SYSTEM: Final = 2000
USERS: Final = 32
TURNS: Final = 20

_seeds = itertools.count(1, 1000)


class Spent:
    """What a server spent on answers."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def at_once(self, server: Served, prompts: Sequence[str], count: int) -> list[Answer]:
        """Answers, and what the processor worked for each of their tokens."""
        before = server.cpu
        answers = server.at_once(prompts, count)
        self.seconds.append((server.cpu - before) / (len(prompts) * count))
        return answers

    def __str__(self) -> str:
        return f"{1000 * statistics.median(self.seconds):.1f} ms CPU a token"


def kinds() -> Sequence[str]:
    """Quantisations to measure with."""
    return os.environ.get("ENGINEROOM_BENCH_KINDS", "Q4_0 Q8_0").split()


def different(count: int, length: int) -> list[str]:
    """Prompts that nobody has had."""
    return [words(length, next(_seeds)) for _ in range(count)]


def _figures(pairs: Pairs, unit: str = "s", scale: float = 1.0) -> str:
    return f"{scale * pairs.median_a():.3g} {unit} against {scale * pairs.median_b():.3g}"


@bar(28)
def after_filling(settings: Settings) -> Iterator[Measurement]:
    """Tokens a second of 8 and of 32 at once, and first tokens, with a full cache ÷ fresh.

    A: a server that has had 14 prompts of 1,489 tokens, and two more before each round. B: one
    that keeps no prompt. All at once: prompts of 64 tokens, answers of 64. Alone: the first token
    of a prompt of 1,489 tokens and of one of 4,000.
    """
    for kind, at_once in itertools.product(kinds(), (8, 32)):
        path = model_path(kind)
        options = {"n_ctx": N_CTX, "n_parallel": at_once}
        with (
            Engineroom(path, **options) as full,
            Engineroom(path, **options, prefix_cache="false") as fresh,
        ):
            full.fill(IDLE, next(_seeds))
            fresh.fill(1, next(_seeds))
            spent = Spent(), Spent()

            def round_(server: Served, spent: Spent, at_once: int = at_once) -> float:
                return seconds(spent.at_once(server, different(at_once, SHORT), SHORT))

            def filled(full: Served = full, work: Callable[..., float] = round_) -> float:
                full.fill(2, next(_seeds))
                return work(full, spent[0])  # noqa: B023

            pairs = interleave(filled, lambda: round_(fresh, spent[1]), settings.rounds)  # noqa: B023
            tokens = at_once * SHORT
            yield Measurement(
                f"llamacpp {at_once} at once, cache full ÷ fresh, {kind}",
                at_least(0.95),
                pairs.values(lambda a, b: b / a),
                pairs.discarded,
                f"{tokens / pairs.median_a():.0f} tokens/s ({spent[0]}) against "
                f"{tokens / pairs.median_b():.0f} ({spent[1]})",
            )
            if at_once > 8:
                continue
            for length in (LONG, LONGER):
                pairs = interleave(
                    lambda: full.ask(words(length, next(_seeds)), 1).first,  # noqa: B023
                    lambda: fresh.ask(words(length, next(_seeds)), 1).first,  # noqa: B023
                    settings.rounds,
                )
                yield Measurement(
                    f"llamacpp first token of {length} tokens, cache full ÷ fresh, {kind}",
                    at_most(1.1),
                    pairs.ratios(),
                    pairs.discarded,
                    _figures(pairs),
                )


@bar(25)
def prefill(settings: Settings) -> Iterator[Measurement]:
    """The speed of reading one prompt of 4,000 tokens ÷ the bare runtime's; cache fresh, and full.

    A: until the first token over HTTP, with a cache that keeps nothing, and with one that has had
    14 prompts of 1,489 tokens. B: the bare loop, the prompt in one batch, until it has the token.
    """
    for kind in kinds():
        path = model_path(kind)
        with (
            Engineroom(path, n_ctx=N_CTX) as full,
            Engineroom(path, n_ctx=N_CTX, prefix_cache="false") as fresh,
            Worker(LongBareSide, path) as bare,
        ):
            full.fill(IDLE, next(_seeds))
            prompts = itertools.count(1000)

            def tokens(prompts: Iterator[int] = prompts) -> list[int]:
                return [1000 + next(prompts) * 7919 % 40000 for _ in range(LONGER)]

            for server, name in ((fresh, "fresh"), (full, "full")):
                pairs = interleave(
                    lambda: server.ask(tokens(), 1).first,  # noqa: B023
                    lambda: float(bare.call("generate", [tokens()], 1)),
                    settings.rounds,
                )
                yield Measurement(
                    f"llamacpp prefill of {LONGER} tokens ÷ bare loop, cache {name}, {kind}",
                    at_least(0.95),
                    pairs.values(lambda a, b: b / a),
                    pairs.discarded,
                    _figures(pairs),
                )


@bar(23)
def warm_prompt(settings: Settings) -> Iterator[Measurement]:
    """The first token of a prompt of 1,489 tokens that was just answered ÷ llama-server's.

    A: the median of nine of them, one after another. B: the same of llama-server.
    """
    for kind in kinds():
        with _both(kind, 8) as (ours, theirs):
            prompt = words(LONG, next(_seeds))

            def first(server: Served, prompt: str = prompt) -> float:
                return median_first([server.ask(prompt, 1) for _ in range(9)])

            for server in (ours, theirs):
                first(server)
            pairs = interleave(lambda: first(ours), lambda: first(theirs), settings.rounds)
            yield _at_most(
                1.0, f"llamacpp first token of a warm prompt ÷ llama-server, {kind}", pairs,
                _figures(pairs, "ms", 1000),
            )  # fmt: skip


@bar(29)
def eight_long_prompts(settings: Settings) -> Iterator[Measurement]:
    """Eight prompts of 1,489 tokens at once: first tokens and gaps ÷ llama-server's.

    A: the median of the seconds until the first token; the largest gap between chunks of any
    answer; and that which one gap of twenty is larger than. Answers of 32 tokens. B: the same of
    llama-server, with as many slots and cells.
    """
    for kind in kinds():
        rows: list[tuple[Pair, Pair, Pair]] = []
        spent = Spent(), Spent()
        with _both(kind, 8) as servers:

            def measure(
                servers: Sequence[Served] = servers,
                spent: Sequence[Spent] = spent,
                rows: list[tuple[Pair, Pair, Pair]] = rows,
            ) -> Pair:
                seen = [
                    eight_at_once(spent[side].at_once(server, different(8, LONG), 32))
                    for side, server in enumerate(servers)
                ]
                firsts, largest, usual = (Pair(a, b) for a, b in zip(*seen, strict=True))
                rows.append((firsts, largest, usual))
                return firsts

            pairs = collect(measure, settings.rounds)
        for which, name in enumerate(("median first token", "largest gap", "gap of one in 20")):
            kept = Pairs([row[which] for row in rows if row[0] in pairs.kept], pairs.discarded)
            yield _at_most(
                0.8, f"llamacpp 8 × {LONG} tokens at once, {name} ÷ llama-server, {kind}", kept,
                f"{_figures(kept, 'ms', 1000)}; {spent[0]} against {spent[1]}",
            )  # fmt: skip


@bar(30)
def thirty_two(settings: Settings) -> Iterator[Measurement]:
    """Tokens a second of 8 and of 32 at once over HTTP ÷ llama-server's.

    A: prompts of 64 tokens and answers of 64, all at one time. B: llama-server, with as many slots.
    """
    for kind, at_once in itertools.product(kinds(), (8, 32)):
        spent = Spent(), Spent()
        with _both(kind, at_once) as servers:

            def round_(
                side: int,
                servers: Sequence[Served] = servers,
                spent: Sequence[Spent] = spent,
                at_once: int = at_once,
            ) -> float:
                prompts = different(at_once, SHORT)
                return seconds(spent[side].at_once(servers[side], prompts, SHORT))

            for side in range(2):
                round_(side)
            pairs = interleave(lambda: round_(0), lambda: round_(1), settings.rounds)
        tokens = at_once * SHORT
        yield Measurement(
            f"llamacpp {at_once} at once ÷ llama-server, {kind}",
            at_least(1.2),
            pairs.values(lambda a, b: b / a),
            pairs.discarded,
            f"{tokens / pairs.median_a():.0f} tokens/s ({spent[0]}) against "
            f"{tokens / pairs.median_b():.0f} ({spent[1]})",
        )


@bar(31)
def conversation(settings: Settings) -> Iterator[Measurement]:
    """A conversation of 20 turns beside seven others ÷ llama-server's.

    A: each turn sends all that was said and 100 tokens more, and gets 32; beside it seven clients
    ask for answers of 64 tokens to prompts of 64, one after another. Tokens read in all turns, the
    median first token, and the memory that the server has at the end. B: llama-server's.
    """
    for kind in kinds():
        with _both(kind, 8) as servers:
            yield from _compared(
                "conversation of 20 turns", kind, servers,
                lambda server, seed: asyncio.run(_talk(server, seed)), min(settings.rounds, 3),
            )  # fmt: skip


@bar(32)
def common_system_prompt(settings: Settings) -> Iterator[Measurement]:
    """32 users at once, whose prompts begin with the same 2,000 tokens ÷ llama-server's.

    A: 50 tokens of each one's own, answers of 16, then a second turn of all with 50 more. Tokens
    read, the median first token, and the server's memory. B: llama-server's. Cells for all 32
    prompts on both sides, because llama-server's slots share none.
    """
    for kind in kinds():
        with _both(kind, USERS, USERS * 2560) as servers:
            yield from _compared(
                f"{USERS} users with a common prompt", kind, servers, _crowd,
                min(settings.rounds, 2),
            )  # fmt: skip


# ── what is done ─────────────────────────────────────────────────────────────────────────────


class _both:  # noqa: N801 - used as a function
    """Our server and llama-server, with the same model, slots and cells."""

    def __init__(self, kind: str, n_parallel: int, n_ctx: int = N_CTX) -> None:
        path = model_path(kind)
        more = dict(
            part.split("=") for part in os.environ.get("ENGINEROOM_BENCH_OPTIONS", "").split()
        )
        self._theirs = LlamaServer(path, n_ctx, n_parallel)
        try:
            self._ours = Engineroom(path, n_ctx=n_ctx, n_parallel=n_parallel, **more)
        except BaseException:
            self._theirs.__exit__(None, None, None)
            raise

    def __enter__(self) -> tuple[Served, Served]:
        return self._ours, self._theirs

    def __exit__(self, *_: Any) -> None:
        self._ours.__exit__(None, None, None)
        self._theirs.__exit__(None, None, None)


def eight_at_once(answers: Sequence[Answer]) -> tuple[float, float, float]:
    """The median first token, the largest gap, and that which one in twenty is larger than."""
    gaps = sorted(gap for answer in answers for gap in answer.gaps)
    return median_first(answers), gaps[-1], gaps[len(gaps) * 19 // 20]


async def _talk(server: Served, seed: int) -> list[Answer]:
    """The answers of a conversation beside others."""
    numbers = itertools.count(seed + 500)

    async def others() -> None:
        while True:
            await server.answer(words(SHORT, next(numbers)), SHORT)

    beside = [asyncio.create_task(others()) for _ in range(7)]
    text = ""
    answers: list[Answer] = []
    try:
        for turn in range(TURNS):
            text += words(100, seed + turn)
            answers.append(await server.answer(text, 32))
            text += answers[-1].text
    finally:
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
    return answers


def _crowd(server: Served, seed: int) -> list[Answer]:
    """Both turns of all users."""
    system = words(SYSTEM, seed)
    prompts = [system + words(50, seed + 1 + user) for user in range(USERS)]
    first = server.at_once(prompts, 16)
    longer = [
        prompt + answer.text + words(50, seed + 100 + user)
        for user, (prompt, answer) in enumerate(zip(prompts, first, strict=True))
    ]
    return first + server.at_once(longer, 16)


def _compared(
    what: str,
    kind: str,
    servers: Sequence[Served],
    work: Callable[[Served, int], list[Answer]],
    rounds: int,
) -> Iterator[Measurement]:
    """Tokens read, first tokens and memory of both."""
    read: list[Pair] = []
    firsts: list[Pair] = []
    memory: list[Pair] = []
    for _ in range(rounds):
        seed = next(_seeds)
        answers = [work(server, seed) for server in servers]
        read.append(Pair(*(float(sum(a.read for a in side)) for side in answers)))
        firsts.append(Pair(*(median_first(side) for side in answers)))
        memory.append(Pair(*(server.mib for server in servers)))
    names = ("tokens read", "median first token", "memory")
    for name, pairs in zip(names, (read, firsts, memory), strict=True):
        unit = {"tokens read": "", "memory": "MiB"}.get(name, "s")
        kept = Pairs(pairs, 0)
        yield _at_most(
            1.0, f"llamacpp {what}, {name} ÷ llama-server, {kind}", kept, _figures(kept, unit)
        )


def _at_most(limit: float, what: str, pairs: Pairs, note: str) -> Measurement:
    target: Target = at_most(limit)
    return Measurement(what, target, pairs.ratios(), pairs.discarded, note)
