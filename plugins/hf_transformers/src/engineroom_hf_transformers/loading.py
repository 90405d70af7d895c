"""Loading and unloading, which block: a source into a model in memory, and that into nothing."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, TypeVar, cast

from engineroom import ConfigurationError, ModelConfig, default_threads, give_back_memory
from engineroom_hf_transformers.adapters import adapter_folder, with_adapter
from engineroom_hf_transformers.checkpoint import Checkpoint, find_checkpoint
from engineroom_hf_transformers.load_errors import has, short, typed_errors
from engineroom_hf_transformers.noise import quieten
from engineroom_hf_transformers.options import HfTransformersOptions
from engineroom_hf_transformers.packing import pack
from engineroom_hf_transformers.sizes import (
    choose_device,
    choose_dtype,
    context_tokens,
    trained_tokens,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

__all__ = ["Kind", "Parts", "import_libraries", "load_engine", "load_parts", "release"]

_E = TypeVar("_E")

_IMPORTED: Final = (
    "torch",
    "transformers",
    "transformers.modeling_utils",
    "transformers.generation",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.modeling_gguf_pytorch_utils",
    "accelerate",
    "gguf",
)
_OPTIONAL: Final = frozenset({"accelerate", "gguf", "transformers.modeling_gguf_pytorch_utils"})

Kind: TypeAlias = Literal["causal", "encoder-decoder", "embedding", "ranking"]


@dataclass(slots=True)
class Parts:
    """A model in memory, and what belongs to it.

    :param model: on its device, in evaluation mode, without gradients.
    :param kind: a model that continues text, one that answers through an encoder, or one that
        generates nothing: it makes embeddings, or ranks documents.
    :param end_ids: tokens that end a generation.
    :param n_vocab: width of a row of logits.
    :param n_context: most tokens of one request.
    :param n_trained: positions that the model was made for, where it counts them.
    :param weight_bytes: memory of weights and buffers.
    :param folder: where its files are.
    :param device: where the inputs go; the first of several.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    kind: Kind
    end_ids: frozenset[int]
    n_vocab: int
    n_context: int
    n_trained: int | None
    weight_bytes: int
    device: torch.device
    dtype: torch.dtype
    folder: Path
    draft: Parts | None = None


def release(parts: Parts) -> None:
    """Drop the model and give its memory back, as far as nobody else holds it."""
    if parts.draft is not None:
        parts.draft.model = None
    parts.model = None
    parts.draft = None
    gc.collect()  # modules and their hooks refer to each other
    if parts.device.type == "cuda":
        import torch

        torch.cuda.empty_cache()
    give_back_memory()


def import_libraries() -> None:
    """Import what a load imports of torch and transformers, whatever the model.

    :raises ConfigurationError: something of it cannot be imported.
    """
    quieten()
    for name in _IMPORTED:
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:
            if name in _OPTIONAL:
                continue  # the load that needs it says so
            raise ConfigurationError(
                f"{name} cannot be imported: {type(error).__name__}: {error}; install it again: "
                "pip install --upgrade engineroom-hf-transformers"
            ) from error


# ── loading ──────────────────────────────────────────────────────────────────────────────────


def load_engine(
    config: ModelConfig, options: HfTransformersOptions, build: Callable[[Parts], _E]
) -> _E:
    """Load a model, and build an engine around it. Blocks; raises what :func:`load_parts` does.

    :param build: makes the engine; where it raises, the model is released.
    """
    parts = load_parts(config, options)
    try:
        return build(parts)
    except BaseException:
        release(parts)
        raise


def load_parts(config: ModelConfig, options: HfTransformersOptions) -> Parts:
    """Load a model with its tokenizer, adapter and draft model. Blocks.

    :raises ModelNotFoundError: there is no such source.
    :raises ConfigurationError: an option is wrong, what it needs is not installed, or the
        checkpoint is damaged, incomplete, not safe, or not of a model that this runtime runs.
    :raises ResourceNotAvailableError: there is no memory for it.
    """
    checkpoint = find_checkpoint(config.source or "", options)
    adapter = adapter_folder(options)
    quieten()
    parts = _load(checkpoint, options, adapter)
    if options.draft_model is not None:
        try:
            parts.draft = _load_draft(parts, options)
        except BaseException:
            release(parts)
            raise
    return parts


def _load_draft(parts: Parts, options: HfTransformersOptions) -> Parts:
    alone = options.model_copy(
        update={"draft_model": None, "adapter": None, "revision": None, "quantization": None}
    )
    if parts.kind != "causal":
        raise ConfigurationError("draft_model is for models that continue text; this is none")
    draft = _load(find_checkpoint(options.draft_model or "", alone), alone, None)
    try:
        same = cast("Any", draft.tokenizer).get_vocab() == cast("Any", parts.tokenizer).get_vocab()
        if draft.kind != "causal" or not same:
            raise ConfigurationError(
                f"draft_model: {options.draft_model!r} has another vocabulary than the model; use "
                "a smaller model of the same family"
            )
    except BaseException:
        release(draft)
        raise
    return draft


def _load(checkpoint: Checkpoint, options: HfTransformersOptions, adapter: Path | None) -> Parts:
    import torch

    device = choose_device(options) if options.device_map is None else None
    dtype_name = choose_dtype(checkpoint.config, options, device or "cuda:0")
    dtype: torch.dtype = getattr(torch, dtype_name)
    if device in {"cpu", None}:
        torch.set_num_threads(options.n_threads or default_threads())
    with typed_errors(checkpoint, options):
        library_config = _library_config(checkpoint, options)
        kind = _kind(checkpoint, library_config)
        tokenizer = _tokenizer(checkpoint, options)
        model = _weights(checkpoint, options, library_config, kind, dtype, device)
        if adapter is not None:
            model = with_adapter(model, adapter, options)
        model.eval()
        model.requires_grad_(False)
    settings = library_config.to_dict()
    n_vocab = _n_vocab(model, library_config)
    weight_bytes = _bytes_of(model)
    if device == "cpu" and options.quantization is None and not options.compile:
        pack(model, kind, n_vocab, keep=adapter is not None)
    return Parts(
        model=model,
        tokenizer=tokenizer,
        kind=kind,
        end_ids=_end_ids(model, tokenizer),
        n_vocab=n_vocab,
        n_context=context_tokens(settings, options),
        n_trained=trained_tokens(settings),
        weight_bytes=weight_bytes,
        device=torch.device(model.device),
        dtype=dtype,
        folder=checkpoint.folder,
    )


def _where(checkpoint: Checkpoint, options: HfTransformersOptions) -> dict[str, Any]:
    """What every ``from_pretrained`` is told."""
    arguments: dict[str, Any] = {
        "pretrained_model_name_or_path": str(checkpoint.folder),
        "trust_remote_code": options.trust_remote_code,
        # What is to be loaded is here; only code that lies elsewhere may have to be fetched.
        "local_files_only": not options.trust_remote_code,
    }
    if checkpoint.format == "gguf":
        arguments["gguf_file"] = checkpoint.path.name
    return arguments


def _library_config(checkpoint: Checkpoint, options: HfTransformersOptions) -> Any:
    import transformers
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = checkpoint.config["model_type"]
    if checkpoint.format != "gguf" and model_type not in CONFIG_MAPPING:
        if not checkpoint.config.get("auto_map"):
            raise ConfigurationError(
                f"transformers {transformers.__version__} does not know models of the type "
                f"{model_type!r} (from {str(checkpoint.path / 'config.json')!r}); a newer one may"
            )
        if not options.trust_remote_code:
            raise ConfigurationError(
                f"{str(checkpoint.path)!r} is a model of the type {model_type!r}, whose Python "
                "code comes with it. Read that code, then set the option trust_remote_code: true "
                "to run it"
            )
    return AutoConfig.from_pretrained(**_where(checkpoint, options))


def _kind(checkpoint: Checkpoint, config: Any) -> Kind:
    from transformers.models.auto import modeling_auto as auto

    if checkpoint.format == "gguf":
        return "encoder-decoder" if config.is_encoder_decoder else "causal"
    name = str(checkpoint.config["architectures"][0])
    model_type = config.model_type
    remote = checkpoint.config.get("auto_map") or {}
    generates = name in _class_names(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, model_type)
    if config.is_encoder_decoder:
        if name in _class_names(auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, model_type):
            return "encoder-decoder"
    elif generates or "AutoModelForCausalLM" in remote:
        return "causal"
    if (
        name in _class_names(auto.MODEL_MAPPING_NAMES, model_type)
        or name in _class_names(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, model_type)
        or "AutoModel" in remote
    ):
        return "embedding"
    if name in _class_names(auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, model_type):
        if config.num_labels == 1:
            return "ranking"
        raise ConfigurationError(
            f"{str(checkpoint.path)!r} sorts texts into {config.num_labels} classes; this runtime "
            "ranks documents with models that have one label"
        )
    raise ConfigurationError(
        f"{str(checkpoint.path)!r} is a {name}, which neither generates text nor is a plain model "
        "of embeddings; this runtime runs models for causal and sequence-to-sequence language "
        "modelling, encoders, and models that rank documents"
    )


def _class_names(mapping: Mapping[str, Any], model_type: str) -> tuple[str, ...]:
    names = mapping.get(model_type, ())
    return (names,) if isinstance(names, str) else tuple(names)


def _weights(
    checkpoint: Checkpoint,
    options: HfTransformersOptions,
    config: Any,
    kind: Kind,
    dtype: torch.dtype,
    device: str | None,
) -> Any:
    import transformers

    class_name = {
        "causal": "AutoModelForCausalLM",
        "encoder-decoder": "AutoModelForSeq2SeqLM",
        "embedding": "AutoModel",
        "ranking": "AutoModelForSequenceClassification",
    }[kind]
    arguments = _where(checkpoint, options) | {
        "config": config,
        "dtype": dtype,
        "output_loading_info": True,
        "use_safetensors": None if options.allow_pickle else True,
    }
    if options.attn_implementation != "auto":
        arguments["attn_implementation"] = options.attn_implementation
    if options.quantization is not None:
        arguments["quantization_config"] = _quantization(options.quantization)
    if options.device_map is not None:
        arguments["device_map"] = options.device_map
    elif device != "cpu" and has("accelerate"):
        arguments["device_map"] = {"": device}  # straight to it, not through the CPU's memory
    model, info = getattr(transformers, class_name).from_pretrained(**arguments)
    _all_there(checkpoint, kind, info)
    if device is not None and "device_map" not in arguments:
        model.to(device)
    return model


def _all_there(checkpoint: Checkpoint, kind: Kind, info: Mapping[str, Any]) -> None:
    """Weights that are not there are made at random: such a model talks nonsense, in silence."""
    missing = sorted({*map(str, info["missing_keys"]), *map(str, info["mismatched_keys"])})
    if kind == "embedding":
        missing = [name for name in missing if "pooler" not in name]  # not what is asked for
    if missing:
        more = f" and {len(missing) - 4} others" if len(missing) > 4 else ""
        raise ConfigurationError(
            f"{str(checkpoint.path)!r} has no weights for {', '.join(missing[:4])}{more}, which "
            "its config.json asks for; download it again, or correct architectures in config.json"
        )


def _quantization(settings: Mapping[str, Any]) -> Any:
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        AutoQuantizationConfig,
    )

    method = settings.get("quant_method")
    in_bits = settings.get("load_in_8bit") or settings.get("load_in_4bit")
    if method not in AUTO_QUANTIZATION_CONFIG_MAPPING and not in_bits:
        raise ConfigurationError(
            f"quantization: the quant_method {method!r} is not known; it is one of "
            f"{', '.join(sorted(map(str, AUTO_QUANTIZATION_CONFIG_MAPPING)))}"
        )
    try:
        return AutoQuantizationConfig.from_dict(dict(settings))
    except ImportError:
        raise
    except Exception as error:  # each method checks its own settings, in its own way
        raise ConfigurationError(
            f"quantization: {method or 'bitsandbytes'} refuses the settings: {short(error)}"
        ) from error


def _tokenizer(checkpoint: Checkpoint, options: HfTransformersOptions) -> Any:
    from transformers import AutoTokenizer

    where = str(checkpoint.folder)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(**_where(checkpoint, options))
    except (ImportError, MemoryError):
        raise
    except BaseException as error:
        # Its parser is foreign code that says what it likes, panics of Rust's among it.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ConfigurationError(
            f"{where!r} has no tokenizer that can be read: {short(error)}; the files that the "
            "hub has beside the weights are needed, too"
        ) from error
    names = {"tokenizer.json", *type(tokenizer).vocab_files_names.values()}
    local = checkpoint.format != "gguf" and not options.trust_remote_code
    if local and not any((checkpoint.folder / name).is_file() for name in names):
        raise ConfigurationError(
            f"{where!r} has no tokenizer (none of {', '.join(sorted(names))}); the files that the "
            "hub has beside the weights are needed, too"
        )
    return tokenizer


def _end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    settings = getattr(model, "generation_config", None)
    declared = getattr(settings, "eos_token_id", None)
    ids = declared if isinstance(declared, list | tuple) else [declared]
    return frozenset(int(e) for e in (*ids, tokenizer.eos_token_id) if e is not None)


def _n_vocab(model: Any, config: Any) -> int:
    head = model.get_output_embeddings()
    width = getattr(head, "out_features", None)  # packed weights have another shape
    if isinstance(width, int) and width > 0:
        return width
    return int(config.get_text_config().vocab_size)


def _bytes_of(model: Any) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
