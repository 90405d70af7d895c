"""The handler: what engineroom asks of the runtime."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final

from engineroom import (
    Capabilities,
    ConfigurationError,
    EngineHandler,
    GenerationParams,
    HandlerHealth,
    InferenceRequest,
    LoadedModel,
    Mailbox,
    ModelConfig,
    ModelNotFoundError,
    ResourceNotAvailableError,
    TokenLogprob,
    TokenStep,
    find_source,
    parse_options,
    request_logger,
    resolve_source,
)
from engineroom.engine import Engine as BaseEngine, logprob_maker
from engineroom.prompts import tokens_of
from engineroom_ctranslate2.engine import Engine, Job
from engineroom_ctranslate2.folder import is_model_folder, read_files
from engineroom_ctranslate2.options import CTranslate2Options
from engineroom_ctranslate2.text import TextCodec

__all__ = ["CTranslate2Handler"]

logger = logging.getLogger("engineroom.ctranslate2")

_HONOURED: Final = frozenset(
    {"max_new_tokens", "temperature", "top_k", "top_p", "do_sample", "logprobs"}
)
"""What CTranslate2 does as the contract defines it; README.md says why not the others."""
_DEFAULT_CONTEXT: Final = 2048
_LEAST_TEMPERATURE: Final = 1e-6
"""CTranslate2 divides by it in single precision."""
_LEAST_TOP_P: Final = 1e-6
"""The likeliest of fewer than a million tokens has more than this: below, it is the only one."""


@dataclass(eq=False)
class _Model(BaseEngine):
    """The ``model_object``: an engine, and what reads and writes its tokens."""

    engine: Engine
    codec: TextCodec
    end_ids: list[int]
    n_ctx: int
    n_vocab: int
    memory_bytes: int
    longer_context = "set the option n_ctx higher if the model was trained for more"

    def health(self) -> HandlerHealth:
        """The engine's own word."""
        return self.engine.health()

    def close(self) -> None:
        """End the threads and free the weights."""
        self.engine.close()


class CTranslate2Handler(EngineHandler):
    """Runs decoder-only models with CTranslate2, some at a time, in this process.

    Options of a model are :class:`~engineroom_ctranslate2.options.CTranslate2Options`.
    """

    name: ClassVar[str] = "ctranslate2"
    api_version: ClassVar[str] = "1.0"
    options_class = CTranslate2Options

    def capabilities(self) -> Capabilities:
        """Sampling by temperature, ``top_k`` and ``top_p``; greedy; log probabilities; chat."""
        return Capabilities(
            params=_HONOURED,
            chat=True,
            tools=True,
            template_args=True,
            stop_sequences=True,
            continue_final_message=True,
        )

    def is_native(self, path: Path) -> bool:
        """True for folders whose ``model.bin`` is CTranslate2's, of a decoder-only model."""
        return is_model_folder(path)

    def estimate_memory(self, config: ModelConfig) -> Mapping[str, int] | None:
        """The weights as they are stored; ``None`` where they will be converted."""
        options = parse_options(CTranslate2Options, config)
        path = find_source(config.source or "")
        if path is None or options.compute_type != "default" or options.device == "auto":
            return None
        device = "cpu" if options.device == "cpu" else f"cuda:{options.device_index}"
        return {device: _weights_bytes(_folder(path))}

    def make_engine(self, config: ModelConfig, options: CTranslate2Options) -> _Model:
        """Load weights and tokenizer."""
        model = _load(config, options)
        logger.info(
            "model %r: %d tokens of context, %d requests at a time",
            config.model_id,
            model.n_ctx,
            options.n_parallel,
        )
        return model

    async def generate_tokens(
        self, loaded_model: LoadedModel, request: InferenceRequest
    ) -> AsyncGenerator[TokenStep | Mailbox, None]:
        """Queue the request and yield a step a token.

        :raises ConfigurationError: the prompt is empty or longer than the context, or the chat
            template refuses the messages.
        :raises QueueFullError: too many requests wait.
        """
        model: _Model = loaded_model.model_object
        ids = await tokens_of(model.codec, request, n_ctx=model.n_ctx, advice=model.longer_context)
        self.check(model, request, ids)
        room = model.n_ctx - len(ids)
        params = request.params
        limit = min(room, params.max_new_tokens or room)
        options = {
            "max_length": limit,
            "end_token": model.end_ids,
            "include_prompt_in_result": False,  # read the prompt in one step, not by token
            "return_logits_vocab": params.logprobs is not None,
            **sampling(params, len(model.codec.vocabulary)),
        }
        job = Job(
            tokens=model.codec.tokens(ids),
            options=options,
            decode=partial(_decode, model, params.logprobs, limit),
            priority=request.priority,
            log=request_logger(logger, request),
        )
        model.engine.submit(job)
        try:
            yield TokenStep(prompt_tokens=len(ids))
            yield job.mailbox
        finally:
            model.engine.cancel(job)


def sampling(params: GenerationParams, vocabulary_size: int) -> dict[str, int | float]:
    """CTranslate2's sampling arguments: ``temperature``, then ``top_k``, then ``top_p``."""
    top_p = 1.0 if params.top_p is None else params.top_p
    if params.greedy or top_p < _LEAST_TOP_P:
        return {"sampling_topk": 1}
    temperature = 1.0 if params.temperature is None else params.temperature
    top_k = params.top_k or 0
    return {
        "sampling_topk": top_k if top_k < vocabulary_size else 0,  # 0: all
        "sampling_topp": top_p,
        "sampling_temperature": max(temperature, _LEAST_TEMPERATURE),
    }


def _decode(model: _Model, logprobs: int | None, limit: int, result: Any) -> TokenStep:
    """One token of CTranslate2's, as engineroom wants it. Called in a thread."""
    token = result.token_id
    if token in model.end_ids:
        return TokenStep(finish="eos_token")
    step = TokenStep((token,), model.codec.piece(token))
    if logprobs is not None:
        step.logprobs = (_logprob(model.codec, token, result.logits, logprobs),)
    if result.step + 1 >= limit:
        step.finish = "length"
    return step


def _logprob(codec: TextCodec, token: int, storage: Any, count: int) -> TokenLogprob:
    import ctranslate2
    import numpy as np

    on_cpu = storage.to(ctranslate2.DataType.float32).to_device(ctranslate2.Device.cpu)
    logits = np.array(on_cpu, dtype=np.float64).ravel()
    logits -= logits.max()
    logits -= np.log(np.exp(logits).sum())
    best = np.argsort(-logits, kind="stable")[:count]
    likeliest = [(int(i), float(logits[i])) for i in best]
    return logprob_maker(codec.token_bytes)(token, float(logits[token]), likeliest)


def _folder(path: Path) -> Path:
    """A model's folder; the path of its ``model.bin`` will do as well."""
    return path.parent if path.name == "model.bin" else path


def _weights_bytes(folder: Path) -> int:
    try:
        return (folder / "model.bin").stat().st_size
    except OSError as error:
        raise ModelNotFoundError(
            f"{str(folder)!r} has no model.bin; name a folder that CTranslate2's converter wrote"
        ) from error


def _load(config: ModelConfig, options: CTranslate2Options) -> _Model:
    files = read_files(_folder(resolve_source(config.source or "")))
    codec = TextCodec(files, options.chat_template)
    end_ids = _end_ids(options.end_tokens or [files.end_token], files.vocabulary)
    generator = _generator(files.path, options)
    engine = Engine(generator, options.n_parallel, options.max_queue, config.model_id)
    n_ctx = options.n_ctx or files.max_context_tokens or _DEFAULT_CONTEXT
    weights = _weights_bytes(files.path)
    return _Model(engine, codec, end_ids, n_ctx, len(files.vocabulary), weights)


def _end_ids(tokens: list[str], vocabulary: list[str]) -> list[int]:
    try:
        return [vocabulary.index(token) for token in tokens]
    except ValueError as error:
        raise ConfigurationError(
            f"the vocabulary lacks one of the tokens that end the text ({', '.join(tokens)}); "
            "set the option end_tokens to tokens that it has"
        ) from error


def _generator(path: Path, options: CTranslate2Options) -> Any:
    import ctranslate2

    threads = options.n_threads or max(1, (os.cpu_count() or 1) // options.n_parallel)
    try:
        return ctranslate2.Generator(
            os.fspath(path),
            options.device,
            device_index=options.device_index,
            compute_type=options.compute_type,
            inter_threads=options.n_parallel,
            intra_threads=threads,
        )
    except MemoryError as error:
        raise ResourceNotAvailableError(
            f"there is not enough memory for {str(path)!r}; unload another model"
        ) from error
    # Damaged files come as almost any class, UnicodeDecodeError among them.
    except Exception as error:
        what = f"CTranslate2 cannot load {str(path)!r}: {error}"
        if "CUDA" in str(error) or "out of memory" in str(error):
            raise ResourceNotAvailableError(f"{what}; set the option device: cpu") from error
        raise ConfigurationError(
            f"{what}; if it is not an option, convert the model again"
        ) from error
