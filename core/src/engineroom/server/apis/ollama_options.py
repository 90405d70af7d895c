"""The ``options`` of Ollama's requests: how to generate, and how a model would be loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, Tag

from engineroom.field_types import FewFields, either
from engineroom.server.apis.request_fields import (
    NOT_ZERO,
    Number,
    StopList,
    SubSchema,
    tell_unknown,
)
from engineroom.server.http.call import Call
from engineroom.server.http.errors import unsupported
from engineroom.units import format_duration

__all__ = [
    "DEFAULTS",
    "PLACES",
    "KeepAlive",
    "OllamaOptions",
    "seconds_of",
    "told_in_vain",
    "told_of_keep_alive",
]

DEFAULTS: Final[Mapping[str, Any]] = {
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.9,
    "max_new_tokens": None,
}
"""What Ollama does where a request does not say."""
PLACES: Final[Mapping[str, str]] = {
    "max_new_tokens": "options.num_predict",
    "stop_sequences": "options.stop",
    "repetition_penalty": "options.repeat_penalty",
    **{
        name: f"options.{name}"
        for name in (
            "temperature", "top_k", "top_p", "min_p", "seed",
            "presence_penalty", "frequency_penalty",
        )
    },
}  # fmt: skip
"""Fields of ``GenerationParams`` and ``InferenceRequest`` → what this API calls them."""
_REFUSED: Final[Mapping[str, tuple[float, ...]]] = {
    "mirostat": (0,),
    "typical_p": (1,),
    "tfs_z": (1,),
}
"""Options that no runtime here has → the values that ask for nothing."""
_WITHOUT_EFFECT: Final = frozenset({"mirostat_tau", "mirostat_eta", "num_keep"})
"""They say how mirostat is done, and how a context that is full is moved on, which none is."""
_OF_THE_DEPLOYMENT: Final = (
    "numa", "num_batch", "num_gpu", "main_gpu", "low_vram", "f16_kv", "logits_all", "vocab_only",
    "use_mmap", "use_mlock", "num_thread", "embedding_only", "draft_num_predict",
)  # fmt: skip
_DURATION: Final = re.compile(r"([+-]?)((?:\d{1,12}(?:\.\d{0,12})?(?:ns|us|µs|μs|ms|s|m|h))+|0)")
_PART: Final = re.compile(r"([\d.]+)(ns|us|µs|μs|ms|s|m|h)")
_UNITS: Final = {
    "ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600,
}  # fmt: skip


def _integral(value: Any) -> Any:
    exact = isinstance(value, float) and abs(value) < 1 << 53 and value.is_integer()
    return int(value) if exact else value


_Whole = Annotated[int, BeforeValidator(_integral)]
"""Some clients write numbers with a point, whole or not."""


def seconds_of(value: float | str) -> float:
    """``keep_alive`` in seconds; below zero is forever.

    :raises ValueError: it is no duration.
    """
    if isinstance(value, str):
        if (match := _DURATION.fullmatch(value)) is None:
            raise ValueError("must be seconds or a duration as 5m, 1h30m, 0 or -1s")
        parts = _PART.findall(match[2])
        value = sum(float(number) * _UNITS[unit] for number, unit in parts)
        value = -value if match[1] == "-" else value
    return math.inf if value < 0 else float(value)


def _is_duration(value: float | str) -> float | str:
    seconds_of(value)
    return value


KeepAlive = Annotated[
    Annotated[Number, Tag("(seconds)")] | Annotated[str, Field(max_length=64), Tag("(duration)")],
    either(
        "seconds, or a duration in a text",
        {str: "(duration)", int: "(seconds)", float: "(seconds)"},
    ),
    AfterValidator(_is_duration),
]
"""How long the model is to stay loaded afterwards, in seconds or as ``5m``; below zero: forever."""


class OllamaOptions(FewFields, SubSchema):
    """How to generate. What says how a model is loaded is without effect, and warned of."""

    model_config = ConfigDict(extra="allow")

    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    """0 is greedy; 0.8 unless said."""
    top_k: _Whole | None = None
    """40 unless said; 0 and below: all."""
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    """0.9 unless said."""
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    seed: Annotated[_Whole, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    """Below zero: a fresh one, as without it."""
    num_predict: Annotated[_Whole, Field(ge=-2), *NOT_ZERO] | None = None
    """Most tokens to generate; below zero, and unless said: until the context is full.
    0 is refused: Ollama does not write down what it means."""
    stop: (
        Annotated[
            Annotated[str, Tag("(text)")] | Annotated[StopList, Tag("(texts)")],
            either("a text or a list of texts", {str: "(text)", list: "(texts)"}),
        ]
        | None
    ) = None
    repeat_penalty: Annotated[Number, Field(ge=1)] | None = None
    repeat_last_n: Annotated[_Whole, Field(ge=-1)] | None = None
    """0: no repeat penalty; -1 is what there is else: of the whole text."""
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    penalize_newline: bool | None = None
    num_ctx: Annotated[_Whole, Field(ge=0)] | None = None
    """Without effect: the context is that of the deployment."""

    def params(self) -> dict[str, Any]:
        """Fields of ``GenerationParams``; ``None``: not said."""
        most = self.num_predict
        return {
            "temperature": self.temperature,
            "top_k": None if self.top_k is None else max(0, self.top_k),
            "top_p": self.top_p,
            "min_p": self.min_p,
            "seed": None if self.seed is None or self.seed < 0 else self.seed,
            "max_new_tokens": None if most is None or most < 0 else most,
            "repetition_penalty": None if self.repeat_last_n == 0 else self.repeat_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
        }

    @property
    def stops(self) -> list[str] | None:
        """``InferenceRequest.stop_sequences``."""
        return ([self.stop] if isinstance(self.stop, str) else self.stop) or None

    @property
    def penalizes(self) -> bool:
        """Whether anything is made less likely for being there already."""
        penalties = (self.presence_penalty, self.frequency_penalty)
        return self.repeat_penalty not in (None, 1) or any(penalties)


def told_in_vain(call: Call, options: OllamaOptions, context_tokens: int | None) -> None:
    """Refuse options that cannot be had, and warn of those that change nothing.

    :param context_tokens: the model's context; ``None``: not known now.
    :raises ApiError: 400.
    """
    extra = {name: v for name, v in (options.model_extra or {}).items() if v is not None}
    for name, neutral in _REFUSED.items():
        if name in extra and (isinstance(extra[name], bool) or extra[name] not in neutral):
            raise unsupported(f"options.{name}", "options")
    if of_deployment := [name for name in _OF_THE_DEPLOYMENT if name in extra]:
        names = ", ".join(f"options.{name}" for name in of_deployment)
        call.warn([f"{names} changed nothing: how a model is loaded, its deployment says"])
    if (options.num_ctx or 0) > (context_tokens or 0):
        own = f", {context_tokens} tokens" if context_tokens else ""
        call.warn([f"options.num_ctx changed nothing: the context is that of the deployment{own}"])
    if options.penalizes:
        if options.repeat_last_n not in (None, 0, -1):
            call.warn(["options.repeat_last_n was ignored: penalties are of the whole text"])
        if options.penalize_newline is False:
            call.warn(["options.penalize_newline was ignored: line breaks are penalized as well"])
    known_names = {*_REFUSED, *_WITHOUT_EFFECT, *_OF_THE_DEPLOYMENT}
    tell_unknown(call, set(options.model_extra or ()) - known_names)


def told_of_keep_alive(call: Call, asked: float | str | None, own: float | None) -> None:
    """Warn where the model stays longer or shorter than it was asked to.

    :param own: what its deployment says; ``None``: forever.
    """
    own = math.inf if own is None else own
    if asked is not None and seconds_of(asked) != own:
        stays = "forever" if own == math.inf else format_duration(own)
        call.warn([f"keep_alive changed nothing: the deployment says {stays}"])
