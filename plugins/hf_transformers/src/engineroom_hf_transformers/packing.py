"""Linear layers on the CPU through oneDNN, with weights that are laid out for it once.

What torch computes in single precision goes to MKL, and what it computes in bfloat16 to oneDNN;
both lay the weights out anew in every call. For a few rows, which is what decoding has, that is
most of the work: SmolLM2-135M's layers take 95 ms for eight rows by ``torch.nn.functional.linear``
and 38 ms laid out before (two cores of an AMD EPYC, float32, torch 2.13); for 136 rows 350 and
240 ms.

The laid-out weights take the place of the plain ones, so that memory stays what it was. A model
may read a layer's weights in some other way than through the layer; such ones would then find
not-a-number, and the result of a trial tells. They keep their plain weights.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from engineroom_hf_transformers import compat_torch

if TYPE_CHECKING:
    import torch

__all__ = ["pack"]

logger = logging.getLogger("engineroom.hf_transformers")

_TRIAL: Final = 8
"""Tokens of the trial."""
_CLOSE: Final = {4: 1e-3, 2: 5e-2}
"""Bytes of a number → how far results may differ, as a share of their spread."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer that oneDNN computes.

    :param across: its weights are inputs × outputs, as GPT-2 has them.
    :param shared: they are those of another layer, too, and have to stay plain.
    """

    module: Any
    across: bool
    shared: bool


def pack(model: Any, kind: str, n_vocab: int, *, keep: bool = False) -> int:
    """Let oneDNN compute the model's linear layers, where it can.

    :param kind: as :class:`~.loading.Parts` has it.
    :param keep: keep the plain weights, which something else reads, and go without a layout.
    :returns: the number of layers that it computes.
    """
    import torch

    layers = list(_layers(model))
    if not layers or not compat_torch.computes(next(model.parameters()).dtype):
        return 0
    with torch.inference_mode(False), torch.no_grad():
        before = _trial(model, kind, n_vocab)
        if before is None:
            return 0
        if not keep:
            _let_go_of_the_file(model, layers)
        undo = [_take_over(layer, keep=keep) for layer in layers]
        after = _trial(model, kind, n_vocab)
        far = _distance(before, after)
        if far <= _CLOSE.get(before.element_size(), _CLOSE[2]):
            return len(layers)
        for back in undo:
            back()
    if keep:
        logger.debug("oneDNN computes something else (off by %.2g of the spread)", far)
        return 0
    return pack(model, kind, n_vocab, keep=True)


def _layers(model: Any) -> Iterator[_Layer]:
    import torch
    from transformers.pytorch_utils import Conv1D

    owners = Counter(p.data_ptr() for _, p in model.named_parameters(remove_duplicate=False))
    for module in model.modules():
        plain = type(module) is torch.nn.Linear
        # Subclasses and layers that somebody wraps compute in ways of their own.
        if not plain and type(module) is not Conv1D:
            continue
        weight = module.weight
        if weight.device.type != "cpu" or weight.dim() != 2 or "forward" in vars(module):
            continue
        if compat_torch.has_hooks(module):
            continue
        yield _Layer(module, not plain, owners[weight.data_ptr()] > 1)


def _let_go_of_the_file(model: Any, layers: Sequence[_Layer]) -> None:
    """Copy what stays plain out of the mapped file, which else would stay in memory in whole."""
    packed = {id(layer.module.weight) for layer in layers if not layer.shared}
    for parameter in model.parameters():
        if id(parameter) not in packed:
            parameter.data = parameter.data.clone()


def _take_over(layer: _Layer, *, keep: bool) -> Callable[[], None]:
    """Let oneDNN compute a layer.

    :returns: what takes it back.
    """
    import torch

    module, plain = layer.module, layer.module.weight
    shape, parameter = plain.shape, isinstance(plain, torch.nn.Parameter)
    weight = plain.detach().t() if layer.across else plain.detach()
    packed: torch.Tensor | None = None
    if not keep and not layer.shared:
        packed = weight = compat_torch.packed(weight)
        # Of the same shape and type, but without memory; and whoever reads it is found out.
        hollow = torch.full((1,), float("nan"), dtype=plain.dtype).expand(shape)
        module.weight = torch.nn.Parameter(hollow, requires_grad=False)
    elif layer.across:
        return lambda: None  # another layout would need memory
    module.forward = compat_torch.linear(weight, module.bias)

    def back() -> None:
        del module.forward
        if packed is not None:
            dense = packed.to_dense()
            dense = dense.t().contiguous() if layer.across else dense
            module.weight = torch.nn.Parameter(dense, requires_grad=False) if parameter else dense

    return back


def _trial(model: Any, kind: str, n_vocab: int) -> torch.Tensor | None:
    """What the model computes for a few tokens; ``None``: it does not take them so."""
    import torch

    tokens = torch.tensor([[(7919 * (i + 1)) % n_vocab for i in range(_TRIAL)]])
    more: dict[str, Any] = {"decoder_input_ids": tokens} if kind == "encoder-decoder" else {}
    if kind not in ("embedding", "ranking"):
        more["use_cache"] = False
    try:
        computed: torch.Tensor = model(input_ids=tokens, **more)[0]
        if kind == "ranking":  # one number has no spread
            body = model.base_model(input_ids=tokens)[0]
            computed = torch.cat([body.flatten(), computed.flatten()])
    except Exception:  # the model's own code, which may do anything
        logger.debug("the model does not take plain tokens", exc_info=True)
        return None
    return computed


def _distance(before: torch.Tensor, after: torch.Tensor | None) -> float:
    """How far two results differ, as a share of their spread; infinite where one has no numbers."""
    if after is None:
        return math.inf
    far = float((after.float() - before.float()).abs().max()) / float(before.float().std())
    return math.inf if math.isnan(far) else far
