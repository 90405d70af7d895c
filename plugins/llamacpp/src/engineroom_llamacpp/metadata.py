"""What of a header would end the process inside of llama.cpp, however well its sizes fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from engineroom_llamacpp.header import GgufArray, GgufHeader, Tensor

__all__ = ["NOT_COMPUTED", "what_is_wrong"]

_MAX_LAYERS: Final = 512
_MAX_EXPERTS: Final = 1024
_ROPE_SCALING: Final = ("none", "linear", "yarn", "longrope")
_F32: Final = 0
NOT_COMPUTED: Final = (9, 15, 24, 25, 26, 27, 28)
"""Q8_1 and Q8_K, which only exist while something is computed, integers, and F64."""


def what_is_wrong(header: GgufHeader) -> str:
    """What of the metadata would end the process inside of llama.cpp; empty: nothing known.

    These are its assertions, for what every architecture has. Those of single architectures
    show in the trial (:mod:`.trial`).
    """
    number, metadata = header.number, header.metadata
    layers = number("block_count")
    if layers is not None and not 1 <= layers <= _MAX_LAYERS:
        return f"it declares {layers} layers, not 1 to {_MAX_LAYERS}"
    for key, value in metadata.items():
        if key.endswith("_epsilon") and isinstance(value, float) and not value >= 0.0:
            return f"{key[:80]} is {value}, not a small positive number"
    if (predicting := number("nextn_predict_layers") or 0) > (layers or 0):
        return f"nextn_predict_layers is {predicting}, of {layers} layers"
    scaling = metadata.get(f"{header.architecture}.rope.scaling.type", "none")
    if scaling not in _ROPE_SCALING:
        return f"rope.scaling.type is {str(scaling)[:80]!r}, none of {', '.join(_ROPE_SCALING)}"
    width, out = number("embedding_length"), number("embedding_length_out")
    if out not in (None, width) and not any("dense" in t.name for t in header.tensors):
        return f"embedding_length_out is {out}, but nothing makes it of {width}"
    return (
        _wrong_rope(header)
        or _wrong_experts(header, layers or 0)
        or _wrong_vocabulary(metadata)
        or next(filter(None, map(_wrong_type, header.tensors)), "")
    )


def _wrong_rope(header: GgufHeader) -> str:
    """More rotary dimensions than a head has show in the first computation, not at the load."""
    dimensions = header.number("rope.dimension_count") or 0
    width, heads = header.number("embedding_length") or 0, header.numbers("attention.head_count", 1)
    head = header.number("attention.key_length")
    if head is None and heads is not None and heads[0] > 0:
        head = width // heads[0]
    if head is not None and dimensions > head:
        return f"rope.dimension_count is {dimensions}, of heads of {head}"
    return ""


def _wrong_type(tensor: Tensor) -> str:
    """A type that there is no arithmetic for, where the tensor is."""
    name = tensor.name
    if tensor.kind in NOT_COMPUTED and name.endswith(".weight") and "tid2eid" not in name:
        return f"tensor {name[:80]!r} is of a type ({tensor.kind}) that no weights are of"
    if tensor.kind != _F32 and (
        name.endswith("norm.weight") or (name.endswith(".bias") and len(tensor.shape) == 1)
    ):
        return f"tensor {name[:80]!r} is of a type ({tensor.kind}) other than F32"
    return ""


def _wrong_experts(header: GgufHeader, layers: int) -> str:
    experts = header.number("expert_count") or 0
    used = max(header.numbers("expert_used_count", layers) or (0,))
    groups = header.number("expert_group_count") or 0
    groups_used = header.number("expert_group_used_count") or 0
    if header.architecture.startswith("hunyuan") and experts <= 1:
        return ""  # to these, one expert is none
    if experts < 0 or experts > _MAX_EXPERTS:
        return f"expert_count is {experts}, not 0 to {_MAX_EXPERTS}"
    if not (1 <= used <= experts if experts else used == 0):
        return f"expert_used_count is {used}, of {experts} experts"
    if groups >= max(1, experts) or (groups > 1 and experts % groups):
        return f"expert_group_count is {groups}, of {experts} experts"
    if groups > 1 and not 1 <= groups_used < groups:
        return f"expert_group_used_count is {groups_used}, of {groups} groups"
    return ""


def _wrong_vocabulary(metadata: Mapping[str, Any]) -> str:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if tokens is None:
        return ""
    for key, what in (("scores", "scores"), ("token_type", "types")):
        values = metadata.get(f"tokenizer.ggml.{key}")
        if isinstance(values, GgufArray) and values.length < tokens.length:
            return f"its vocabulary has {tokens.length} tokens and {values.length} {what}"
        if values is not None and not isinstance(values, GgufArray):
            return f"tokenizer.ggml.{key} is no array"
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        return "tokenizer.chat_template is no text"
    return ""
