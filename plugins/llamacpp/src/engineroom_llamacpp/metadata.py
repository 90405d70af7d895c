"""What of a header would end the process inside of llama.cpp, however well its sizes fit."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from engineroom.sources import (
    GgufArray,
    GgufHeader,
    GgufTensor,
    read_gguf_header,
    refuse_gguf,
)

__all__ = ["NOT_COMPUTED", "read_header", "what_is_wrong"]

_MAX_LAYERS: Final = 512
_MAX_EXPERTS: Final = 1024
_ROPE_SCALING: Final = ("none", "linear", "yarn", "longrope")
_F32: Final = 0
_STRING: Final = 8
"""GGUF's number for strings."""
NOT_COMPUTED: Final = (9, 15, 24, 25, 26, 27, 28)
"""Q8_1 and Q8_K, which only exist while something is computed, integers, and F64."""

_TOKENS: Final = "tokenizer.ggml.tokens"
_MAX_PIECE: Final = 256
"""Bytes of a token of WordPiece's; real ones have up to some 60."""
_BEGINNING: Final = re.compile(rb"\\x[0-9a-fA-F]{2}|\\?.", re.DOTALL)
"""The first byte of a token of RWKV's, which are written with escapes."""


def read_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF file, and check it, before llama.cpp sees the file. Blocks.

    :param path: the file, or the first of several (``…-00001-of-00003.gguf``).
    :raises ConfigurationError: the file is damaged, or would end the process inside of llama.cpp;
        the message says why.
    """
    header = read_gguf_header(path, keep=(_TOKENS,))
    if wrong := what_is_wrong(header):
        refuse_gguf(path, wrong)
    metadata = dict(header.metadata)
    if isinstance(tokens := metadata.get(_TOKENS), GgufArray):
        metadata[_TOKENS] = GgufArray(tokens.length)  # checked, and large
    return replace(header, metadata=metadata)


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


def _wrong_type(tensor: GgufTensor) -> str:
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
    tokens = metadata.get(_TOKENS)
    if tokens is None:
        return ""
    if not isinstance(tokens, GgufArray) or tokens.kind != _STRING:
        return "its vocabulary is no array of strings"
    for key, what in (("scores", "scores"), ("token_type", "types")):
        values = metadata.get(f"tokenizer.ggml.{key}")
        if isinstance(values, GgufArray) and values.length < tokens.length:
            return f"its vocabulary has {tokens.length} tokens and {values.length} {what}"
        if values is not None and not isinstance(values, GgufArray):
            return f"tokenizer.ggml.{key} is no array"
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        return "tokenizer.chat_template is no text"
    return _wrong_tokens(tokens.values or (), metadata.get("tokenizer.ggml.model"))


def _wrong_tokens(tokens: Sequence[bytes], model: Any) -> str:
    """A vocabulary that ends the process, or that texts are not read with in time.

    One of sentencepiece's falls back to bytes: where it has no token for some byte, the first
    text that has it ends the process. WordPiece tries all lengths up to that of the longest
    token, at every place.
    """
    known: set[bytes] = set()
    for token in tokens:
        if token in known and token:  # empty ones get a name of their own
            return f"its vocabulary has the token {token[:80]!r} twice"
        known.add(token)
    if model == "rwkv":
        return _wrong_beginnings(known)
    if model == "bert" and (longest := max(map(len, known), default=0)) > _MAX_PIECE:
        return f"its vocabulary has a token of {longest} bytes"
    for byte in range(256 if model == "llama" else 0):
        if b"<0x%02X>" % byte not in known and bytes([byte]) not in known:
            return f"its vocabulary has no token for the byte 0x{byte:02X}"
    return ""


def _wrong_beginnings(tokens: Collection[bytes]) -> str:
    """RWKV's tokenizer stays where it is, for ever, where a text begins as a token does and
    has no token that begins so: a single byte must be one.
    """
    beginnings: set[int] = set()
    whole_tokens: set[int] = set()
    for token in tokens:
        if (match := _BEGINNING.match(token)) is not None:
            same = whole_tokens if match.end() == len(token) else beginnings
            same.add(_byte(match[0]))
    for byte in sorted(beginnings - whole_tokens):
        return f"its vocabulary has tokens that begin with the byte 0x{byte:02X}, and none for it"
    return ""


def _byte(escaped: bytes) -> int:
    """A byte that may be written with an escape."""
    if len(escaped) == 4:
        return int(escaped[2:].decode(), 16)
    return {b"\\t": 9, b"\\n": 10, b"\\r": 13}.get(escaped, escaped[-1])
