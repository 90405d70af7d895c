"""A GGUF file of a Llama into a folder for CTranslate2, with nothing but numpy.

``ct2-transformers-converter`` is the way for most models, but it needs torch and transformers.
This one needs the package ``gguf``, and reads Llamas with a byte-level vocabulary::

    pip install "engineroom-ctranslate2[convert]"
    python -m engineroom_ctranslate2.convert model.gguf folder
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from engineroom import ConfigurationError, EngineRoomError, resolve_source

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

__all__ = ["convert", "main"]

_CONTROL: Final = 3
"""The type of a control token in ``tokenizer.ggml.token_type``."""


class _Metadata:
    """The metadata of a GGUF file; what is missing is said by name."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields

    def __getitem__(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ConfigurationError(f"the file's metadata has no {key}")
        return value

    def get(self, key: str) -> Any:
        field = self._fields.get(key)
        return None if field is None else field.contents()


def convert(source: str | Path, folder: Path, quantization: str | None = "int8") -> Path:
    """Write the folder. Blocks, and takes memory for all weights in single precision.

    :param source: a GGUF file, or a source of engineroom's that stands for one.
    :param folder: made if it is not there; must be empty.
    :param quantization: one of CTranslate2's, or ``None`` for single precision.
    :raises ModelNotFoundError: there is no such file.
    :raises ConfigurationError: it is no GGUF file of a Llama with a byte-level vocabulary, or the
        folder is not empty.
    """
    import gguf

    path = resolve_source(str(source))
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ConfigurationError(f"{str(folder)!r} is not empty; name a new folder")
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, OSError) as error:
        raise ConfigurationError(f"{str(path)!r} cannot be read as GGUF: {error}") from error
    metadata = _Metadata(reader.fields)
    if (architecture := metadata["general.architecture"]) != "llama":
        raise ConfigurationError(
            f"{str(path)!r} is a {architecture}; only llama is converted here, see "
            "ct2-transformers-converter for others"
        )
    tokenizer, tokens = _tokenizer(metadata)

    def tensor(name: str) -> npt.NDArray[np.float32]:
        for tensor in reader.tensors:
            if tensor.name == name:
                values: npt.NDArray[np.float32] = gguf.quants.dequantize(
                    tensor.data, tensor.tensor_type
                )
                return values
        raise ConfigurationError(f"{str(path)!r} has no tensor {name!r}")

    names = {tensor.name for tensor in reader.tensors}
    spec = _spec(metadata, tensor, "output.weight" in names)
    spec.config.eos_token = tokens[metadata["tokenizer.ggml.eos_token_id"]]
    spec.config.bos_token = tokens[metadata["tokenizer.ggml.bos_token_id"]]
    spec.config.unk_token = tokens[metadata.get("tokenizer.ggml.unknown_token_id") or 0]
    spec.register_vocabulary(tokens)
    spec.validate()
    spec.optimize(quantization=quantization)
    spec.save(str(folder))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "model_max_length": metadata["llama.context_length"],
        "chat_template": metadata.get("tokenizer.chat_template"),
    }
    text = json.dumps(settings, ensure_ascii=False, indent=2)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    return folder


def _spec(
    metadata: _Metadata, tensor: Callable[[str], npt.NDArray[np.float32]], has_output: bool
) -> Any:
    import numpy as np
    from ctranslate2.specs import common_spec, transformer_spec

    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        metadata["llama.block_count"],
        metadata["llama.attention.head_count"],
        activation=common_spec.Activation.SWISH,
        ffn_glu=True,
        rms_norm=True,
        rotary_dim=0,
        rotary_interleave=True,  # as llama.cpp orders the rows of queries and keys
        rotary_base=metadata.get("llama.rope.freq_base") or 10_000.0,
        num_heads_kv=metadata["llama.attention.head_count_kv"],
    )
    spec.config.layer_norm_epsilon = metadata["llama.attention.layer_norm_rms_epsilon"]
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = tensor("token_embd.weight")
    # Models that share the matrix of input and output have it once.
    decoder.projection.weight = tensor("output.weight" if has_output else "token_embd.weight")
    decoder.layer_norm.gamma = tensor("output_norm.weight")
    for number, layer in enumerate(decoder.layer):
        block = f"blk.{number}."
        attention, ffn = layer.self_attention, layer.ffn
        attention.layer_norm.gamma = tensor(block + "attn_norm.weight")
        queries_keys_values = [tensor(f"{block}attn_{name}.weight") for name in "qkv"]
        attention.linear[0].weight = np.concatenate(queries_keys_values)
        attention.linear[1].weight = tensor(block + "attn_output.weight")
        ffn.layer_norm.gamma = tensor(block + "ffn_norm.weight")
        ffn.linear_0.weight = tensor(block + "ffn_gate.weight")
        ffn.linear_0_noact.weight = tensor(block + "ffn_up.weight")
        ffn.linear_1.weight = tensor(block + "ffn_down.weight")
    return spec


def _tokenizer(metadata: _Metadata) -> tuple[Tokenizer, list[str]]:
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    if (kind := metadata["tokenizer.ggml.model"]) != "gpt2":
        raise ConfigurationError(
            f"the vocabulary is of the kind {kind!r}; only 'gpt2' (byte-level) is converted here"
        )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = _pre_tokenizer(metadata.get("tokenizer.ggml.pre") or "gpt-2")
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == _CONTROL
        ]
    )
    if metadata.get("tokenizer.ggml.add_bos_token"):
        bos = metadata["tokenizer.ggml.bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]}:0 $A:0", special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer, tokens


def _pre_tokenizer(kind: str) -> PreTokenizer:
    """How text is cut before it is encoded: by words, as GPT-2 does, or by words and digits."""
    from tokenizers import pre_tokenizers

    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if kind in {"gpt-2", "default"}:
        return words
    if kind == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    raise ConfigurationError(
        f"the vocabulary cuts text in the way of {kind!r}; gpt-2 and smollm are known here"
    )


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m engineroom_ctranslate2.convert",
        description="Convert a GGUF file of a Llama into a folder for CTranslate2.",
    )
    parser.add_argument("source", help="a GGUF file; also hf:owner/name:file, package:module/file")
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument(
        "--quantization", default="int8", help="int8 (the default), float16, float32, …"
    )
    parsed = parser.parse_args(arguments)
    try:
        convert(parsed.source, parsed.folder, parsed.quantization)
    except EngineRoomError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    print(f"{parsed.folder}: engineroom run {parsed.folder} --runtime ctranslate2")
    return 0


if __name__ == "__main__":
    sys.exit(main())
