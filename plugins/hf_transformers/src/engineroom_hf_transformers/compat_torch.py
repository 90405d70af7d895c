"""What relies on torch's private parts: oneDNN's linear layers, and the hooks of a module.

They are the operators that torch's own compiler uses for models that it freezes.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch

__all__ = ["BELOW", "computes", "has_hooks", "linear", "packed"]

BELOW: Final = "3"
"""The first version for which nobody has read that what is used here still works so.

The distribution's requirement has it as its upper bound. Within torch 2 the operators are tried
first (:func:`computes`), and so is each model that they compute (:mod:`.packing`): a version that
changes them costs speed only. To lift it, look for the operators in torch's
``RegisterMkldnnOpContextClass.cpp`` and for the hooks in ``nn/modules/module.py``, and run
``test_packing.py``.
"""

_ROWS: Final = 8
"""The number of rows that the layout is chosen for; others are served well by it, too."""


def computes(dtype: torch.dtype) -> bool:
    """Whether oneDNN's operators are here, and compute layers of this type."""
    import torch

    enabled: Any = torch.backends.mkldnn.enabled
    if platform.machine().lower() not in {"x86_64", "amd64"} or not enabled:
        return False
    if dtype not in {torch.float32, torch.bfloat16}:
        return False
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        with torch.inference_mode(False), torch.no_grad():
            ones = torch.ones(2, 2, dtype=dtype)
            twos: torch.Tensor = linear(packed(ones), None)(ones)
            return bool((twos == 2).all())
    except Exception:  # noqa: BLE001 - another version's operators may do anything
        return False


def packed(weight: torch.Tensor) -> torch.Tensor:
    """The weights of a linear layer as oneDNN lays them out; ``to_dense()`` takes that back.

    :param weight: outputs × inputs.
    """
    import torch

    laid_out: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
    return laid_out


def linear(
    weight: torch.Tensor, bias: torch.Tensor | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A linear layer's ``forward``, computed by oneDNN.

    :param weight: plain, or as :func:`packed` returns it.
    """
    import torch

    compute: Callable[..., torch.Tensor] = torch.ops.mkldnn._linear_pointwise.default

    def forward(input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - as the layer calls it
        if input.dim() < 2:
            return compute(input[None], weight, bias, "none", [], "")[0]
        return compute(input, weight, bias, "none", [], "")

    return forward


def has_hooks(module: Any) -> bool:
    """Whether something else is called before or after a module computes."""
    return bool(hasattr(module, "_hf_hook") or module._forward_hooks or module._forward_pre_hooks)
