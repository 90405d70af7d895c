"""Attention of a whole batch over the cache, inside of Transformers' own models.

A step packs the tokens of all requests into one row: first one token of each request that
decodes, then chunks of prompts. Transformers' models take such a row as a batch of one, with
positions; everything in them works token by token but the attention, and that can be replaced:
Transformers has a registry of attention functions (``AttentionInterface``). The one registered
here stores the step's keys and values in the cache and lets each token attend to its own
request's. There is no padding, and the matrix products see all tokens at once.

Outside of a step (:func:`driving`) the same function does what Transformers does, so that
``generate()`` works on the same model. One thing differs: Transformers' fused attention leaves
out soft caps and sinks, which change what the model says; here they are never left out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from engineroom_hf_transformers import kernels
from engineroom_hf_transformers.kernels import Call

if TYPE_CHECKING:
    import torch

    from engineroom_hf_transformers.cache import SlotCache

__all__ = [
    "NAMES",
    "Recorder",
    "Span",
    "Step",
    "StepStoppedError",
    "driving",
    "register",
    "stopping",
]

NAMES: Final = {"sdpa": "engineroom_fused", "eager": "engineroom_plain"}
"""Kernels → what the attention that uses them is registered as."""

_WASTE: Final = 2.0
"""Requests are computed together, padded to the longest, up to so many times the tokens that
they have; beyond that one by one."""


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens of one request in a step.

    :param row: place of the first of them in the packed row.
    :param slot: where the request's keys and values are.
    :param start: position of the first of them in the request.
    :param count: how many there are.
    """

    row: int
    slot: int
    start: int
    count: int

    @property
    def end(self) -> int:
        """How many tokens the request has with them."""
        return self.start + self.count


class Driver(Protocol):
    """What takes the attention over while it is current."""

    def attend(self, call: Call) -> torch.Tensor:
        """Tokens × heads × numbers."""


class UnsupportedAttentionError(Exception):
    """The model asks its attention for something that is not known here."""


class StepStoppedError(Exception):
    """The forward pass was given up because nobody wants it any more."""


class _Current(threading.local):
    driver: Driver | None = None
    stopped: Callable[[], bool] | None = None


_current: Final = _Current()


@contextmanager
def driving(driver: Driver) -> Iterator[None]:
    """Let ``driver`` compute the attention of what this thread runs inside."""
    _current.driver = driver
    try:
        yield
    finally:
        _current.driver = None


@contextmanager
def stopping(stopped: Callable[[], bool]) -> Iterator[None]:
    """Ask at each layer of what this thread runs inside whether to give it up.

    :raises StepStoppedError: it was given up.
    """
    _current.stopped = stopped
    try:
        yield
    finally:
        _current.stopped = None


def register() -> None:
    """Make the attention known to Transformers. Harmless when done again."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import eager_mask, sdpa_mask

    for kernel, name, stock, mask in (
        ("sdpa", NAMES["sdpa"], sdpa_attention_forward, sdpa_mask),
        ("eager", NAMES["eager"], _stock_eager, eager_mask),
    ):
        AttentionInterface.register(name, _attention(kernel, stock))
        AttentionMaskInterface.register(name, _mask(mask))


def _mask(stock: Any) -> Any:
    def engineroom_mask(*args: Any, **kwargs: Any) -> Any:
        return None if _current.driver is not None else stock(*args, **kwargs)

    return engineroom_mask


def _attention(kernel: str, stock: Any) -> Any:
    import torch

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def engineroom_attention(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Any]:
        stopped = _current.stopped
        if stopped is not None and stopped():
            raise StepStoppedError
        driver = _current.driver
        if driver is None:
            capped = kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None
            compute = _stock_eager if capped else stock
            result: tuple[torch.Tensor, Any] = compute(
                module, query, key, value, attention_mask, scaling=scaling, **kwargs
            )
            return result
        if kwargs.get("position_bias") is not None or not getattr(module, "is_causal", True):
            raise UnsupportedAttentionError("the attention has a position bias, or looks ahead")
        call = Call(
            layer=module.layer_idx,
            query=query,
            key=key,
            value=value,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            window=kwargs.get("sliding_window"),
            softcap=kwargs.get("softcap"),
            sinks=kwargs.get("s_aux"),
            kernel=kernel,
        )
        return driver.attend(call)[None], None

    return engineroom_attention


def _stock_eager(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Plain attention, for ``generate()``."""
    call = Call(
        layer=0,
        query=query,
        key=key,
        value=value,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=None,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        kernel="eager",
    )
    mask = None if attention_mask is None else attention_mask[..., : key.shape[-2]]
    if mask is None and query.shape[2] > 1 and getattr(module, "is_causal", True):
        mask = kernels.causal(call, 0, query.shape[2], triangle=True)
    return kernels.plain(call, query, key, value, mask).transpose(1, 2), None


class Recorder:
    """Notes what each layer keeps, and computes what a single sequence's attention is."""

    def __init__(self) -> None:
        self.calls: dict[int, Call] = {}

    def attend(self, call: Call) -> torch.Tensor:
        """Causal attention of one sequence from its beginning."""
        self.calls[call.layer] = call
        mask = kernels.causal(call, 0, call.query.shape[2])
        return kernels.attend(call, call.query, call.key, call.value, mask)[0].transpose(0, 1)


class Step:
    """One forward pass: who is in it, and the attention over the cache.

    :param decoding: a token of each request that decodes, in the packed row's first places.
    :param spans: the others.
    """

    def __init__(self, cache: SlotCache, decoding: Sequence[Span], spans: Sequence[Span]) -> None:
        self._cache = cache
        self._decoding = decoding
        self._spans = spans
        self._places: dict[Any, torch.Tensor] = {}
        self._masks: dict[Any, torch.Tensor | None] = {}
        slots = [span.slot for span in decoding]
        self._beside = slots == list(range(slots[0], slots[0] + len(slots))) if slots else False
        self._longest = max((span.end for span in decoding), default=0)
        total = sum(span.end for span in decoding)
        padded = self._longest * len(decoding)
        self._together = len(decoding) > 1 and padded <= _WASTE * total

    def positions(self) -> list[int]:
        """Of each token of the packed row, in its request."""
        return [
            position
            for span in (*self._decoding, *self._spans)
            for position in range(span.start, span.end)
        ]

    def attend(self, call: Call) -> torch.Tensor:
        """Keep the layer's keys and values, and let each token attend to its request's."""
        device = call.query.device
        self._cache.write(
            call.layer,
            self._on(device),
            call.key[0].transpose(0, 1),
            call.value[0].transpose(0, 1),
        )
        heads, tokens = call.query.shape[1:3]
        out = call.query.new_empty((tokens, heads, call.value.shape[-1]))
        if self._decoding:
            self._decode(call, out)
        for span in self._spans:
            start = 0 if call.window is None else max(0, span.start + 1 - call.window)
            keys, values = self._cache.read(
                call.layer, slice(span.slot, span.slot + 1), slice(start, span.end)
            )
            query = call.query[:, :, span.row : span.row + span.count]
            mask = self._mask_of(call, device, span, start)
            out[span.row : span.row + span.count] = kernels.attend(call, query, keys, values, mask)[
                0
            ].transpose(0, 1)
        return out

    def _decode(self, call: Call, out: torch.Tensor) -> None:
        """One token of each request: its heads that share keys stand in for positions."""
        count = len(self._decoding)
        heads, width = call.query.shape[1], call.query.shape[3]
        groups = call.key.shape[1]
        # tokens × groups × heads of a group × numbers
        query = call.query[0, :, :count].transpose(0, 1).reshape(count, groups, -1, width)
        on_cpu = call.query.device.type == "cpu"
        if self._together and (self._beside or not on_cpu):
            attended = self._decode_together(call, query)
            out[:count] = attended.reshape(count, heads, -1)
            return
        for row, span in enumerate(self._decoding):
            start = 0 if call.window is None else max(0, span.end - call.window)
            keys, values = self._cache.read(
                call.layer, slice(span.slot, span.slot + 1), slice(start, span.end)
            )
            one = kernels.kernel(call, query[row : row + 1], keys, values, None)
            out[row] = one.reshape(heads, -1)

    def _decode_together(self, call: Call, query: torch.Tensor) -> torch.Tensor:
        positions = slice(0, self._longest)
        device = query.device
        if self._beside:
            first = self._decoding[0].slot
            slots = slice(first, first + len(self._decoding))
            keys, values = self._cache.read(call.layer, slots, positions)
        else:
            keys, values = self._cache.gather(call.layer, self._slots_on(device), positions)
        return kernels.kernel(call, query, keys, values, self._length_mask(call.window, device))

    # ── what all layers share ────────────────────────────────────────────────────────────────

    def _on(self, device: torch.device) -> torch.Tensor:
        import torch

        places = self._places.get(device)
        if places is None:
            length = self._cache.length
            flat = [
                span.slot * length + position
                for span in (*self._decoding, *self._spans)
                for position in range(span.start, span.end)
            ]
            places = self._places[device] = torch.tensor(flat, device=device)
        return places

    def _slots_on(self, device: torch.device) -> torch.Tensor:
        import torch

        key = ("slots", device)
        slots = self._places.get(key)
        if slots is None:
            indices = [span.slot for span in self._decoding]
            slots = self._places[key] = torch.tensor(indices, device=device)
        return slots

    def _length_mask(self, window: int | None, device: torch.device) -> torch.Tensor | None:
        """Which positions each decoding request may see: requests × 1 × 1 × positions."""
        import torch

        key = ("decoding", window, device)
        if key not in self._masks:
            ends = torch.tensor([span.end for span in self._decoding], device=device)[:, None]
            position = torch.arange(self._longest, device=device)[None]
            seen = position < ends
            if window is not None:
                seen &= position >= ends - window
            self._masks[key] = None if bool(seen.all()) else seen[:, None, None]
        return self._masks[key]

    def _mask_of(
        self, call: Call, device: torch.device, span: Span, start: int
    ) -> torch.Tensor | None:
        key = (span.row, call.window, device)
        if key not in self._masks:
            self._masks[key] = kernels.causal(call, span.start, span.end, start)
        return self._masks[key]
