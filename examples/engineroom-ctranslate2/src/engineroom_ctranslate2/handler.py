"""The handler: what engineroom asks of the runtime."""

from __future__ import annotations

import asyncio
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
    GenerationParams,
    HandlerHealth,
    InferenceRequest,
    LoadedModel,
    Mailbox,
    ModelConfig,
    ModelNotFoundError,
    ResourceNotAvailableError,
    TokenHandler,
    TokenLogprob,
    TokenStep,
    find_source,
    parse_options,
    request_logger,
    resolve_source,
)
from engineroom.engine import BackgroundLoad
from engineroom.prompts import check_prompt, tokens_of
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


@dataclass(frozen=True, slots=True)
class _Model:
    """The ``model_object``."""

    engine: Engine
    codec: TextCodec
    end_ids: list[int]
    n_ctx: int
    memory_bytes: int


class CTranslate2Handler(TokenHandler):
    """Runs decoder-only models with CTranslate2, some at a time, in this process.

    Options of a model are :class:`~engineroom_ctranslate2.options.CTranslate2Options`.
    """

    name: ClassVar[str] = "ctranslate2"
    api_version: ClassVar[str] = "1.0"

    def capabilities(self) -> Capabilities:
        """Sampling by temperature, ``top_k`` and ``top_p``; greedy; log probabilities; chat."""
        return Capabilities(params=_HONOURED, chat=True, stop_sequences=True)

    def can_handle(self, loaded_model: LoadedModel) -> bool:
        """True for models that this handler loaded."""
        return isinstance(loaded_model.model_object, _Model)

    def can_load(self, config: ModelConfig) -> bool:
        """True for folders whose ``model.bin`` is CTranslate2's, of a decoder-only model."""
        try:
            path = find_source(config.source or "")
        except (ConfigurationError, ModelNotFoundError):
            return False
        return path is not None and is_model_folder(path)

    def estimate_memory(self, config: ModelConfig) -> Mapping[str, int] | None:
        """The weights as they are stored; ``None`` where they will be converted."""
        options = parse_options(CTranslate2Options, config)
        path = find_source(config.source or "")
        if path is None or options.compute_type != "default" or options.device == "auto":
            return None
        device = "cpu" if options.device == "cpu" else f"cuda:{options.device_index}"
        return {device: _weights_bytes(_folder(path))}

    async def load_model(self, config: ModelConfig) -> LoadedModel:
        """Load weights and tokenizer, in a thread.

        :raises ModelNotFoundError: there is no such folder.
        :raises ConfigurationError: an option is wrong, or a file is missing or damaged.
        :raises ResourceNotAvailableError: there is not enough memory, or no such device.
        """
        options = parse_options(CTranslate2Options, config)
        model = await BackgroundLoad(
            partial(_load, config, options), lambda model: model.engine.close(), name="ctranslate2"
        ).result()
        logger.info(
            "model %r: %d tokens of context, %d requests at a time",
            config.model_id,
            model.n_ctx,
            options.n_parallel,
        )
        return LoadedModel(
            model_id=config.model_id,
            model_object=model,
            config=config,
            handler_name=self.name,
            tokenizer=model.codec,
            max_context_tokens=model.n_ctx,
            memory_bytes=model.memory_bytes,
        )

    async def unload_model(self, loaded_model: LoadedModel) -> None:
        """End the threads and free the weights."""
        await asyncio.to_thread(_model(loaded_model).engine.close)

    def count_tokens(self, loaded_model: LoadedModel, text: str) -> int:
        """Tokens of ``text``, read as plain text, without any that the model adds."""
        return _model(loaded_model).codec.count(text)

    def health(self, loaded_model: LoadedModel) -> HandlerHealth:
        """The engine's own word."""
        return _model(loaded_model).engine.health()

    async def generate_tokens(
        self, loaded_model: LoadedModel, request: InferenceRequest
    ) -> AsyncGenerator[TokenStep | Mailbox, None]:
        """Queue the request and yield a step a token.

        :raises ConfigurationError: the prompt is empty or longer than the context, or the chat
            template refuses the messages.
        :raises QueueFullError: too many requests wait.
        """
        model = _model(loaded_model)
        ids = await tokens_of(model.codec, request)
        room = model.n_ctx - len(ids)
        check_prompt(
            ids, model.n_ctx, "set the option n_ctx higher if the model was trained for more"
        )
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
    return TokenLogprob(
        token_id=token,
        token=codec.token_text(token),
        logprob=float(logits[token]),
        top=[(int(i), codec.token_text(int(i)), float(logits[i])) for i in best],
    )


def _model(loaded_model: LoadedModel) -> _Model:
    model: _Model = loaded_model.model_object
    return model


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
    return _Model(engine, codec, end_ids, n_ctx, _weights_bytes(files.path))


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
