"""Requests that Transformers' own ``generate()`` works on, a token at a time.

Beam search, and models whose cache cannot be driven. ``generate()`` runs to its end once it is
called, so it gets a thread of its own, which runs only while the engine's waits for it: the two
pass a baton, once a token. Other requests are thus held up by one token's work at a time, and one
that is cancelled ends where its thread waits for the baton.

Without beams the tokens are chosen as everywhere here (:mod:`.sampling`): a logits processor
leaves ``generate()`` only the one that was chosen.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from copy import copy
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

from engineroom import EngineRoomError, InferenceError, TokenStep
from engineroom.engine import MakeLogprob, NoNumbersError, SamplerState, first_of_prompt
from engineroom_hf_transformers.attention import StepStoppedError, stopping
from engineroom_hf_transformers.sampling import adjusted, choose, logprobs_of, logprobs_of_rows

if TYPE_CHECKING:
    import torch

    from engineroom_hf_transformers.loading import Parts
    from engineroom_hf_transformers.tasks import Task

__all__ = ["GenerateCall", "neutral"]

_LOOK_S: Final = 1.0
"""Seconds after which it is looked whether the thread that is waited for lives."""


def neutral(model: Any) -> None:
    """Let ``generate()`` forget what the model's files say of sampling, penalties and lengths.

    It takes from there whatever a call leaves open, and a request's ``None`` is neutral. What
    the model cannot begin without stays.
    """
    from transformers import GenerationConfig

    make_config: Any = GenerationConfig
    own = getattr(model, "generation_config", None)
    if own is not None:
        kept = ("decoder_start_token_id", "forced_bos_token_id", "bos_token_id", "pad_token_id")
        model.generation_config = make_config(
            **{name: getattr(own, name, None) for name in (*kept, "eos_token_id")}
        )


class GenerateCall:
    """One request's run of ``generate()``, in a thread of its own.

    :param ends: whether a token ends the generation.
    :param stopped: asked at each layer; true: give up.
    """

    def __init__(
        self,
        parts: Parts,
        task: Task,
        ends: Callable[[int], bool],
        stopped: Callable[[], bool],
    ) -> None:
        self._parts = parts
        self._task = task
        self._ends = ends
        self._stopped = stopped
        self._go = threading.Semaphore(0)
        self._done = threading.Semaphore(0)
        self._closing = False
        self._error: BaseException | None = None
        self._step: TokenStep | None = None
        self._make_logprob: MakeLogprob | None = None
        params = task.request.params
        self._seeded = (params.num_beams or 1) > 1 and params.seed is not None
        self._outer: Any = None
        # Of each beam; generate() has a repetition penalty of its own.
        self._beam = SamplerState(params.model_copy(update={"repetition_penalty": None}), ())
        self._thread: threading.Thread | None = None

    def advance(self, make_logprob: MakeLogprob) -> TokenStep | None:
        """Let it go on for a token.

        :returns: what came of it; ``None`` where nothing can be shown yet.
        :raises BaseException: what ``generate()`` raised.
        :raises RuntimeError: its thread has ended without a word.
        """
        self._make_logprob = make_logprob
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, name="hf_transformers-generate", daemon=True
            )
            self._thread.start()
        self._step = None
        self._go.release()
        while not self._done.acquire(timeout=_LOOK_S):
            if not self._thread.is_alive():
                raise RuntimeError("the thread of generate() has ended")
        if self._error is not None:
            raise self._error
        return self._step

    def close(self) -> None:
        """End it where it stands. Blocks for what is left of a token's work at most."""
        self._closing = True
        if self._thread is not None:
            self._go.release()
            self._thread.join()

    # ── its own thread ───────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._closing:
                import torch

                with torch.inference_mode(), stopping(self._stopped):
                    self._generate()
        except StepStoppedError:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again in advance()
            self._error = error
        finally:
            self._done.release()

    def _pause(self) -> None:
        """Hand the baton over and wait for it.

        Beam sampling draws from torch's global generator. With a seed it must get the same
        numbers whatever happens beside it, so that the generator's state is its own while it runs.
        """
        device = self._parts.device
        own = _random_state(device) if self._seeded else None
        if self._seeded:
            _set_random_state(device, self._outer)
        self._done.release()
        self._go.acquire()
        if self._seeded:
            self._outer = _random_state(device)
            _set_random_state(device, own)
        if self._closing:
            raise StepStoppedError

    def _generate(self) -> None:
        import torch
        from transformers import GenerationConfig, LogitsProcessorList

        make_config: Any = GenerationConfig
        parts, task = self._parts, self._task
        params = task.request.params
        beams = params.num_beams or 1
        config: dict[str, Any] = {
            "max_new_tokens": task.limit - task.prompt_tokens,
            "num_beams": beams,
            "do_sample": False,
            "eos_token_id": sorted(parts.end_ids) or None,
            "pad_token_id": min(parts.end_ids, default=0),
            "use_cache": True,
        }
        processors: list[Any] = []
        if beams > 1:
            config["early_stopping"] = bool(params.early_stopping)
            if (params.repetition_penalty or 1.0) != 1.0:
                config["repetition_penalty"] = params.repetition_penalty
            if not params.greedy:
                config.update(
                    do_sample=True,
                    temperature=1.0 if params.temperature is None else params.temperature,
                    top_k=params.top_k or 0,
                    top_p=1.0 if params.top_p is None else params.top_p,
                    min_p=params.min_p,
                )
            processors.append(self._adjust_beams)
        else:
            processors.append(self._choose)
        ids = torch.tensor([task.tokens], device=parts.device)
        if task.prompt_logprobs is not None:
            self._tell_prompt(ids, task.prompt_logprobs)
        if self._seeded:
            self._outer = _random_state(parts.device)
            torch.manual_seed(params.seed or 0)
        try:
            sequences = parts.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=make_config(**config),
                logits_processor=LogitsProcessorList(processors),
            )
        finally:
            if self._seeded:
                _set_random_state(parts.device, self._outer)
        if beams > 1:
            self._step = self._whole(sequences[0].tolist())
        elif self._step is None or self._step.finish is None:
            self._step = TokenStep(finish="length")

    def _tell_prompt(self, ids: torch.Tensor, count: int) -> None:
        """Compute the prompt by itself, for its log probabilities; then a pause."""
        assert self._make_logprob is not None
        make, tokens = self._make_logprob, self._task.tokens
        entries = [first_of_prompt(make, tokens[0])]
        if len(tokens) > 1:
            logits = self._parts.model(input_ids=ids, use_cache=False).logits[0]
            scores = logprobs_of_rows(logits[:-1], tokens[1:], count)
            if scores is None:
                raise NoNumbersError("NaN or infinity for a token of the prompt")
            of_tokens = zip(tokens[1:], scores, strict=True)
            entries += [make(token, own, best) for token, (own, best) in of_tokens]
        self._step = TokenStep(prompt_logprobs=entries)
        self._pause()

    def _whole(self, tokens: list[int]) -> TokenStep:
        """What beam search found, all at once."""
        task = self._task
        prompt = 1 if self._parts.kind == "encoder-decoder" else task.prompt_tokens
        written = tokens[prompt:]
        finish: Any = "length"
        for place, token in enumerate(written):
            if self._ends(token):
                written, finish = written[:place], "eos_token"
                break
        pieces = [*map(task.decoder.feed, written)]
        ends = tuple(accumulate(map(len, pieces)))
        text = "".join([*pieces, task.decoder.finish()])
        return TokenStep(written, text, finish=finish, text_ends=ends)

    def _choose(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Choose the token, show it, and leave ``generate()`` no other choice."""
        import torch

        task = self._task
        logits = scores.float()
        (token,) = choose(logits, [task.sampling])
        if isinstance(token, EngineRoomError):
            raise token
        if token is None:
            raise NoNumbersError("NaN or infinity for the next token")
        forced = torch.full_like(scores, float("-inf"))
        forced[0, token] = 0.0
        if self._ends(token):
            self._step = TokenStep(text=task.decoder.finish(), finish="eos_token")
            return forced
        task.tokens.append(token)
        full = len(task.tokens) >= task.limit
        text = task.decoder.feed(token) + (task.decoder.finish() if full else "")
        step = TokenStep((token,), text, finish="length" if full else None)
        if task.logprobs is not None and self._make_logprob is not None:
            ((own, best),) = logprobs_of(logits, [token], [task.logprobs])
            step.logprobs = (self._make_logprob(token, own, best),)
        self._step = step
        if not full:
            self._pause()
        return forced

    def _adjust_beams(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """What ``generate()`` has no name for, on every beam; then a pause."""
        import torch

        prompt = 1 if self._parts.kind == "encoder-decoder" else self._task.prompt_tokens
        if self._task.sampling.constraint is not None:
            scores = self._only_allowed(ids[:, prompt:], scores)
        if self._beam.touches:
            beams = [copy(self._beam) for _ in ids]
            for beam, tokens in zip(beams, ids[:, prompt:].tolist(), strict=True):
                beam.counts = Counter(tokens)
            scores = adjusted(scores, beams)
        self._pause()
        if bool(torch.isnan(scores).any()):
            raise NoNumbersError("NaN for the next token")
        return scores

    def _only_allowed(self, generated: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores, in which each beam has only what its constraint allows behind its tokens."""
        import torch

        scores = scores.clone()
        for beam, tokens in enumerate(generated.tolist()):
            try:
                place = self._task.sampling.constraint_after(tuple(tokens))
            except InferenceError:
                # Beam sampling draws as many as it has beams, whether as many are possible or not.
                scores[beam] = -torch.inf
                continue
            allowed = torch.from_numpy(place.allowed()[: scores.shape[-1]]).to(scores.device)
            scores[beam].masked_fill_(~allowed, -torch.inf)
        return scores


def _random_state(device: torch.device) -> Any:
    import torch

    return torch.get_rng_state(), (
        torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    )


def _set_random_state(device: torch.device, state: Any) -> None:
    import torch

    on_cpu, on_gpu = state
    torch.set_rng_state(on_cpu)
    if on_gpu is not None:
        torch.cuda.set_rng_state(on_gpu, device)
