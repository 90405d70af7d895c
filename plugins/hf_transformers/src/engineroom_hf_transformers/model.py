"""One forward pass of a batch through a Transformers model, and whether a model can do it.

Whether it can is found out by trying: a short text is computed once as Transformers does it and
once in pieces over the cache, with another text beside it. A model whose results differ (one with
a state instead of a cache, with position biases, with code of its own for the attention) runs by
``generate()``, one request at a time.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from engineroom_hf_transformers.attention import (
    NAMES,
    Recorder,
    Span,
    Step,
    driving,
    register,
    stopping,
)
from engineroom_hf_transformers.cache import LayerShape, SlotCache
from engineroom_hf_transformers.chunking import ReadingCost, cost_of
from engineroom_hf_transformers.compat_transformers import attention_of, keeps_state

if TYPE_CHECKING:
    import torch

    from engineroom_hf_transformers.loading import Parts
    from engineroom_hf_transformers.options import HfTransformersOptions

__all__ = ["Forward", "why_not_driven"]

logger = logging.getLogger("engineroom.hf_transformers")

_KNOWN_LAYERS: Final = frozenset({"full_attention", "sliding_attention", "attention", "moe"})
_PROBE: Final = 24
"""Tokens of the text that is tried."""
_CLOSE: Final = {4: 1e-3, 2: 5e-2}
"""Bytes of a number → how far logits may differ, as a share of their spread."""


def _never() -> bool:
    return False


class Forward:
    """Runs the model over packed rows of tokens. Used by one thread.

    :param shapes: what each layer keeps of a token.
    :param slots: how many requests its cache has room for, each with ``length`` tokens.
    :param compiled: compile it.
    """

    def __init__(
        self,
        model: Any,
        shapes: dict[int, LayerShape],
        *,
        slots: int,
        length: int,
        device: torch.device,
        compiled: bool = False,
    ) -> None:
        import torch

        self.cache = SlotCache(shapes, slots, length)
        self._device = device
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._model = torch.compile(model, dynamic=True) if compiled else model

    def __call__(
        self,
        tokens: Sequence[int],
        decoding: Sequence[Span],
        spans: Sequence[Span],
        outputs: Sequence[int],
        stopped: Callable[[], bool] = _never,
    ) -> torch.Tensor:
        """Compute a step.

        :param tokens: of all spans, those that decode first.
        :param outputs: places in ``tokens`` after which logits are wanted.
        :param stopped: asked at each layer; true: give the step up.
        :returns: outputs × vocabulary, float32.
        :raises StepStoppedError: it was given up.
        """
        import torch

        step = Step(self.cache, decoding, spans)
        device = self._device
        places = torch.tensor(outputs, dtype=torch.long, device=device)
        keep = {"logits_to_keep": places} if self._keeps else {}
        with torch.inference_mode(), driving(step), stopping(stopped):
            logits: torch.Tensor = self._model(
                input_ids=torch.tensor([tokens], device=device),
                position_ids=torch.tensor([step.positions()], device=device),
                use_cache=False,
                **keep,
            ).logits[0]
            if not self._keeps:
                logits = logits.index_select(0, places.to(logits.device))
            return logits.float()

    def close(self) -> None:
        """Give the cache up."""
        self.cache.close()
        self._model = None


def reading_cost(parts: Parts) -> ReadingCost:
    """What it takes to read a prompt, of a model that :func:`why_not_driven` takes."""
    recorder = _record(parts.model, _probe_tokens(parts.n_vocab)[:2])
    return cost_of(parts.model, recorder.calls.values())


def forward_of(parts: Parts, options: HfTransformersOptions) -> Forward:
    """A forward pass for a model that :func:`why_not_driven` has nothing against."""
    return Forward(
        parts.model,
        _shapes(parts.model, _probe_tokens(parts.n_vocab)),
        slots=options.max_batch_size,
        length=parts.n_context,
        device=parts.device,
        compiled=options.compile,
    )


def why_not_driven(parts: Parts, options: HfTransformersOptions) -> str:
    """What stands against batching the model here; empty: nothing.

    Gives the model the attention of :mod:`.attention`, if it takes it.
    """
    model = parts.model
    config = model.config.get_text_config(decoder=True)
    if parts.kind != "causal":
        return f"it is an {parts.kind} model"
    if keeps_state(model):
        return "it keeps a state instead of keys and values"
    if unknown := set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS:
        return f"it has layers of the kind {', '.join(sorted(unknown))}"
    before = attention_of(model)
    kernel = "eager" if options.attn_implementation == "eager" else "sdpa"
    try:
        register()
        model.set_attn_implementation(NAMES[kernel])
        if not (why := _try_out(parts, config)):
            return ""
    except Exception as error:  # the model's own code, which may do anything
        logger.debug("the model cannot be driven", exc_info=True)
        why = f"its attention cannot be replaced: {type(error).__name__}: {error}"
    model.set_attn_implementation(before)
    return why


def _try_out(parts: Parts, config: Any) -> str:
    model = parts.model
    tokens = _probe_tokens(parts.n_vocab)
    stock = _logits(model, tokens)
    recorder = _record(model, tokens)
    layers = getattr(config, "num_hidden_layers", None)
    if len(recorder.calls) != layers:
        return f"{len(recorder.calls)} of its {layers} layers have an attention over keys"
    window = getattr(config, "sliding_window", None)
    uses = "sliding_attention" in (getattr(config, "layer_types", None) or ("sliding_attention",))
    sees_windows = any(call.window for call in recorder.calls.values())
    if window and uses and window < parts.n_context and not sees_windows:
        return f"it does not tell its attention about its sliding window of {window} tokens"
    close = _CLOSE.get(parts.dtype.itemsize, _CLOSE[2])
    spread = float(stock.std())
    if not spread > 0:
        return "it computed no numbers for a text that was tried"
    for logits, expected in _in_pieces(parts, recorder, tokens, stock):
        far = float((logits - expected).abs().max()) / spread
        if not far <= close:
            return f"over the cache it computes something else (off by {far:.2g} of the spread)"
    return ""


def _in_pieces(
    parts: Parts, recorder: Recorder, tokens: list[int], stock: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The text in chunks and then token by token, with a part of it as a text beside it."""
    forward = Forward(
        parts.model, _shapes_of(recorder), slots=3, length=_PROBE + 8, device=parts.device
    )
    beside = tokens[: _PROBE // 2]
    half = len(beside)
    try:
        forward(
            [*tokens[:7], *beside[:5]],
            [],
            [Span(0, 2, 0, 7), Span(7, 0, 0, 5)],
            [],
        )
        forward(
            [*tokens[7 : _PROBE - 2], *beside[5 : half - 1]],
            [],
            [Span(0, 2, 7, _PROBE - 9), Span(_PROBE - 9, 0, 5, half - 6)],
            [],
        )
        first = forward(
            [beside[half - 1], tokens[_PROBE - 2]],
            [Span(0, 0, half - 1, 1), Span(1, 2, _PROBE - 2, 1)],
            [],
            [0, 1],
        )
        second = forward([tokens[_PROBE - 1]], [Span(0, 2, _PROBE - 1, 1)], [], [0])
    finally:
        forward.close()
    return [
        (first[0], stock[half - 1]),
        (first[1], stock[_PROBE - 2]),
        (second[0], stock[_PROBE - 1]),
    ]


def _probe_tokens(n_vocab: int) -> list[int]:
    """Tokens all over the vocabulary; which ones does not matter."""
    return [(7919 * (i + 1)) % n_vocab for i in range(_PROBE)]


def _logits(model: Any, tokens: list[int]) -> torch.Tensor:
    """Tokens × vocabulary, computed as Transformers does it."""
    import torch

    with torch.inference_mode():
        logits: torch.Tensor = model(
            input_ids=torch.tensor([tokens], device=model.device), use_cache=False
        ).logits[0]
        return logits.float()


def _record(model: Any, tokens: list[int]) -> Recorder:
    recorder = Recorder()
    with driving(recorder):
        _logits(model, tokens)
    return recorder


def _shapes(model: Any, tokens: list[int]) -> dict[int, LayerShape]:
    return _shapes_of(_record(model, tokens[:2]))


def _shapes_of(recorder: Recorder) -> dict[int, LayerShape]:
    return {
        layer: LayerShape(
            heads=call.key.shape[1],
            key=call.key.shape[3],
            value=call.value.shape[3],
            dtype=call.key.dtype,
            device=call.key.device,
        )
        for layer, call in recorder.calls.items()
    }
