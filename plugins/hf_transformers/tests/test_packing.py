"""Linear layers through oneDNN: the same numbers, the same memory, and a way back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engineroom import ModelConfig
from engineroom_hf_transformers import compat_torch, packing
from engineroom_hf_transformers.loading import load_parts
from engineroom_hf_transformers.options import HfTransformersOptions
from engineroom_hf_transformers.packing import pack

N_VOCAB = 300
KINDS = {
    "llama": "causal",
    "qwen2": "causal",
    "gemma2": "causal",
    "gpt2": "causal",
    "mamba": "causal",
    "t5": "encoder-decoder",
    "bert": "embedding",
}
WHY = "oneDNN's operators are not in this build of torch, or not for this processor"
needs_operators = pytest.mark.skipif(not compat_torch.computes(torch.float32), reason=WHY)
pytestmark = needs_operators


def model_of(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    class_name = {
        "causal": "AutoModelForCausalLM",
        "encoder-decoder": "AutoModelForSeq2SeqLM",
        "embedding": "AutoModel",
    }[KINDS[kind]]
    model = getattr(transformers, class_name).from_pretrained(folder, dtype=dtype)
    return model.eval().requires_grad_(False)


def numbers(model: Any, kind: str, rows: int = 3, tokens: int = 11) -> torch.Tensor:
    ids = torch.randint(3, N_VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(1))
    more = {"decoder_input_ids": ids} if KINDS[kind] == "encoder-decoder" else {}
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=ids, **more)[0]
    return found.float()


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def hollow(model: Any) -> list[str]:
    """Layers whose plain weights are gone."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(weight := getattr(module, "weight", None), torch.Tensor)
        and weight.isnan().any()
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_computes_what_it_did(kind: str, tiny: Callable[[str], Path]) -> None:
    model = model_of(kind, tiny(kind))
    before, shapes = numbers(model, kind), {n: p.shape for n, p in model.named_parameters()}
    size = sum(p.nbytes for p in model.parameters())
    assert pack(model, KINDS[kind], N_VOCAB) > 0
    after = numbers(model, kind)
    assert (after - before).abs().max() < 1e-4 * before.std()
    assert {n: p.shape for n, p in model.named_parameters()} == shapes
    assert sum(p.nbytes for p in model.parameters()) == size  # by which memory is told
    assert model.dtype == torch.float32


def test_the_plain_weights_are_gone_but_those_that_others_have(
    tiny: Callable[[str], Path],
) -> None:
    model = model_of("llama", tiny("llama"))
    embeddings = model.get_input_embeddings().weight.clone()
    count = pack(model, "causal", N_VOCAB)
    linear = [n for n, m in model.named_modules() if type(m) is torch.nn.Linear]
    assert count == len(linear)
    assert set(hollow(model)) == set(linear) - {"lm_head"}  # tied to the embeddings
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
    freed = model.model.layers[0].mlp.up_proj.weight
    assert freed.untyped_storage().nbytes() == freed.element_size()


def test_nothing_is_dropped_where_something_else_reads_the_weights(
    tiny: Callable[[str], Path],
) -> None:
    model = model_of("llama", tiny("llama"))
    before, plain = numbers(model, "llama"), weights(model)
    assert pack(model, "causal", N_VOCAB, keep=True) > 0
    assert (numbers(model, "llama") - before).abs().max() < 1e-4 * before.std()
    after = weights(model)
    assert all(torch.equal(after[name], plain[name]) for name in plain)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_that_reads_weights_itself_gets_them_back(
    kind: str, tiny: Callable[[str], Path]
) -> None:
    model = model_of(kind, tiny(kind))
    owner = model.model.layers[1].mlp if kind == "llama" else model.transformer.h[1].attn
    name = "up_proj" if kind == "llama" else "c_proj"

    class Reader(torch.nn.Module):
        """Computes with a layer's weights, not by the layer."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = getattr(owner, name)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            own = self.inner.weight
            bias = 0 if self.inner.bias is None else self.inner.bias
            return hidden @ (own.t() if kind == "llama" else own) + bias

    setattr(owner, name, Reader())
    before, plain = numbers(model, kind), weights(model)
    assert pack(model, "causal", N_VOCAB) > 0
    assert hollow(model) == []
    after = weights(model)
    assert all(torch.equal(after[name], plain[name]) for name in plain)
    assert (numbers(model, kind) - before).abs().max() < 1e-4 * before.std()


def test_a_model_that_does_not_take_tokens_is_left_alone(tiny: Callable[[str], Path]) -> None:
    model = model_of("llama", tiny("llama"))
    forward = model.forward

    def needs_more(**inputs: Any) -> Any:
        if "positions" not in inputs:
            raise ValueError("positions are needed")
        return forward(**inputs)

    model.forward = needs_more
    plain = weights(model)
    assert pack(model, "causal", N_VOCAB) == 0
    assert hollow(model) == []
    after = weights(model)
    assert all(torch.equal(after[name], plain[name]) for name in plain)


def test_layers_that_compute_in_their_own_way_are_left_alone(tiny: Callable[[str], Path]) -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
            return 2 * super().forward(input)

    model = model_of("llama", tiny("llama"))
    first, second = (layer.mlp for layer in model.model.layers)
    first.up_proj.__class__ = Doubled
    seen = []
    second.up_proj.register_forward_hook(lambda *_: seen.append(1))
    before = numbers(model, "llama")
    seen.clear()
    pack(model, "causal", N_VOCAB)
    seen.clear()
    assert (numbers(model, "llama") - before).abs().max() < 1e-4 * before.std()
    assert seen == [1]
    assert not first.up_proj.weight.isnan().any()
    assert not second.up_proj.weight.isnan().any()


def test_a_layer_takes_what_it_took() -> None:
    layer = torch.nn.Linear(24, 16).requires_grad_(False)
    shapes = [(24,), (1, 24), (0, 24), (2, 3, 24), (137, 24)]
    inputs = [torch.randn(shape) for shape in shapes]
    inputs.append(torch.randn(5, 24, 4).transpose(1, 2))  # not contiguous
    expected = [layer(each) for each in inputs]
    packing._take_over(packing._Layer(layer, across=False, shared=False), keep=False)
    with torch.inference_mode():
        for each, wanted in zip(inputs, expected, strict=True):
            found = layer(each)
            assert found.shape == wanted.shape
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("how", ["raises", "differs"])
def test_operators_that_another_version_changed_are_left_alone(
    how: str, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(weight: torch.Tensor) -> torch.Tensor:
        if how == "raises":
            raise TypeError("expected at most 1 argument, but received 2")
        return weight + 1

    monkeypatch.setattr(compat_torch, "packed", changed)
    assert not compat_torch.computes(torch.float32)
    assert pack(model_of("llama", tiny("llama")), "causal", N_VOCAB) == 0


@pytest.mark.skipif(not compat_torch.computes(torch.bfloat16), reason=WHY)
def test_bfloat16(tiny: Callable[[str], Path]) -> None:
    model = model_of("llama", tiny("llama"), torch.bfloat16)
    before = numbers(model, "llama")
    assert pack(model, "causal", N_VOCAB) > 0
    assert (numbers(model, "llama") - before).abs().max() < 5e-2 * before.std()


@pytest.mark.parametrize(
    ("options", "packed"), [({}, True), ({"compile": True}, False), ({"dtype": "float16"}, False)]
)
def test_models_are_loaded_so_where_it_can_be(
    options: dict[str, Any], packed: bool, tiny: Callable[[str], Path]
) -> None:
    config = ModelConfig(model_id="m", source=str(tiny("qwen2")))
    parts = load_parts(config, HfTransformersOptions(device="cpu", **options))
    assert bool(hollow(parts.model)) == packed


def test_the_file_does_not_stay_in_memory(copied: Callable[[str], Path]) -> None:
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("this system does not tell what is mapped")
    folder = copied("llama")
    parts = load_parts(
        ModelConfig(model_id="m", source=str(folder)), HfTransformersOptions(device="cpu")
    )
    assert hollow(parts.model)
    assert str(folder) not in maps.read_text(encoding="utf-8")
