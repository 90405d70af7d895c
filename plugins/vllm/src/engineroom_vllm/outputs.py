"""What vLLM gives of a request, as the steps of engineroom's contract. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias

from engineroom import InferenceError, TokenLogprob, TokenStep
from engineroom.engine import logprob_maker
from engineroom_vllm.text import TextCodec

__all__ = ["Outputs"]

_Finish: TypeAlias = Literal["eos_token", "length"]


class Outputs:
    """Reads vLLM's outputs for one model.

    :param ends: tokens that end a generation.
    """

    def __init__(self, codec: TextCodec, ends: frozenset[int]) -> None:
        self._codec = codec
        self.make_logprob = logprob_maker(codec.token_bytes)
        self._ends = ends

    def steps(self, output: Any, logprobs: int | None) -> Iterator[TokenStep]:
        """One step a token, however many vLLM hands over at once: stop sequences count tokens.

        :param output: a ``CompletionOutput`` of what is new.
        :param logprobs: how many likeliest alternatives to tell; ``None``: nothing of the kind.
        :raises InferenceError: vLLM ended the request for a reason that is no end.
        """
        ids = list(output.token_ids)
        finish = self._finish(output)
        if finish == "eos_token" and ids:
            ids.pop()
        entries = None if logprobs is None else self._logprobs(ids, output, logprobs)
        if not self._codec.knows_bytes:
            yield TokenStep(ids, output.text, logprobs=entries, finish=finish)
            return
        if not ids:
            if finish is not None:
                yield TokenStep(finish=finish)
            return
        last = len(ids) - 1
        for place, token in enumerate(ids):
            yield TokenStep(
                (token,),
                self._codec.piece(token),
                logprobs=None if entries is None else (entries[place],),
                finish=finish if place == last else None,
            )

    def _logprobs(self, ids: Sequence[int], output: Any, count: int) -> list[TokenLogprob]:
        return [
            self.logprob(token, [(i, e.logprob) for i, e in output.logprobs[place].items()], count)
            for place, token in enumerate(ids)
        ]

    def _finish(self, output: Any) -> _Finish | None:
        """Why a request has ended, in the contract's words; ``None``: it goes on."""
        reason = output.finish_reason
        if reason is None:
            return None
        if reason == "length":
            return "length"
        if reason == "stop":
            # A token of a stop sequence of the request's is text, in which core finds it.
            stopped = output.stop_reason
            return "eos_token" if stopped is None or stopped in self._ends else None
        raise InferenceError(f"vLLM ended the request with {reason!r}; its log says more")

    def logprob(self, token: int, choices: Sequence[tuple[int, float]], count: int) -> TokenLogprob:
        """A token among the likeliest ``count``.

        :param choices: tokens with their log probabilities; the token itself is among them.
        """
        own = next(value for i, value in choices if i == token)
        return self.make_logprob(token, own, sorted(choices, key=lambda c: -c[1])[:count])
