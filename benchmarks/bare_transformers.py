"""The bare sides of the Transformers bars: what the library itself offers.

``generate()``, its continuous batching (``generate_batch``), and its server ``transformers
serve``, which gets real requests by HTTP on the loopback interface.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.foreign_servers import Clients, ServerProcess, events
from benchmarks.harness import DiscardError, UnavailableError
from benchmarks.service import checked
from benchmarks.workers import Peak

__all__ = ["BatchSide", "GenerateSide", "ServeSide"]

POOL: Final[Mapping[str, Any]] = {"num_blocks": 16, "max_batch_tokens": 256}
"""Size of continuous batching's cache. Left to itself it takes most of the memory, and fills it."""
_STARTING: Final = 180.0


class GenerateSide:
    """The model and ``generate()``, greedy, ends of text ignored."""

    def __init__(self, folder: Path, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging as quiet

        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
        quiet.disable_progress_bar()
        torch.set_num_threads(threads)
        self._torch = torch
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        config = self._model.generation_config
        config.eos_token_id = None
        config.do_sample = False
        self._pad = config.pad_token_id = 0

    def one_by_one(self, prompts: Sequence[str], count: int) -> float:
        """Seconds for one after another."""
        began = time.perf_counter()
        counts = [n for prompt in prompts for n in self._generate([prompt], count)]
        return checked(time.perf_counter() - began, counts, count)

    def resident(self, prompts: Sequence[str], count: int) -> float:
        """Most memory that the process had while all of them were one batch, in MiB."""
        with Peak() as peak:
            self._generate(prompts, count)
        return peak.mib

    def _generate(self, prompts: Sequence[str], count: int) -> list[int]:
        torch = self._torch
        tokens = [self._tokenizer(prompt)["input_ids"] for prompt in prompts]
        longest = max(map(len, tokens))
        ids = torch.tensor([[self._pad] * (longest - len(row)) + row for row in tokens])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in tokens])
        with torch.inference_mode():
            found = self._model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=count, do_sample=False
            )
        return [len(row) - longest for row in found]

    def close(self) -> None:
        """Nothing: the process ends."""


class BatchSide(GenerateSide):
    """The model and ``generate_batch``, whose manager stays between the calls."""

    def at_once(self, prompts: Sequence[str], count: int) -> float:
        """Seconds for all of them at one time."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        tokens = [self._tokenizer(prompt)["input_ids"] for prompt in prompts]
        settings = GenerationConfig(
            max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=self._pad
        )
        began = time.perf_counter()
        found = self._model.generate_batch(
            tokens,
            generation_config=settings,
            continuous_batching_config=ContinuousBatchingConfig(**POOL),
            persistent_manager=True,
            warmup=False,
        )
        counts = [len(output.generated_tokens) for output in found.values()]
        if len(counts) != len(prompts):
            raise DiscardError(f"{len(counts)} answers to {len(prompts)} prompts")
        return checked(time.perf_counter() - began, counts, count)


class ServeSide(ServerProcess, Clients):
    """``transformers serve`` in a process of its own, and clients that ask it. Use in a ``with``.

    :param batching: with its continuous batching.
    :raises UnavailableError: it cannot be started.
    """

    def __init__(self, folder: Path, threads: int, *, batching: bool) -> None:
        if missing := [n for n in ("fastapi", "uvicorn", "openai") if not _installed(n)]:
            raise UnavailableError(
                f"transformers serve needs {', '.join(missing)}: pip install transformers[serving]"
            )
        self._folder = str(folder)
        options = ["--dtype", "float32"]
        if batching:
            options += ["--continuous-batching"]
            for name, value in POOL.items():
                options += [f"--cb-{name.replace('_', '-')}", str(value)]
        start = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
        super().__init__(
            "transformers serve",
            [sys.executable, "-c", start, "serve", self._folder, *options],
            {"OMP_NUM_THREADS": str(threads)},
            ready="/health",
            starting_s=_STARTING,
        )

    def _ask(self, prompt: str, count: int) -> int:
        """The number of tokens of an answer."""
        body = {
            "model": self._folder,
            "prompt": prompt,
            "max_tokens": count,
            "temperature": 0,
            "stream": True,
        }
        tokens = 0
        for event in events(self.port, "/v1/completions", body, self.who):
            if usage := event.get("usage"):
                tokens = int(usage["completion_tokens"])
        return tokens


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
