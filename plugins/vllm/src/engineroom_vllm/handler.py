"""The handler: what engineroom asks of the vLLM runtime."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, ClassVar, Final

from engineroom import (
    Capabilities,
    ConfigurationError,
    Embeddings,
    GenerationParams,
    HandlerHealth,
    InferenceRequest,
    LoadedModel,
    ModelConfig,
    ModelNotFoundError,
    ResourceNotAvailableError,
    TokenHandler,
    TokenStep,
    parse_options,
    resolve_source,
)
from engineroom.engine import BackgroundLoad
from engineroom.prompts import tokens_of
from engineroom_vllm.folder import is_model_folder
from engineroom_vllm.library import INSTALL, installed
from engineroom_vllm.options import VLLMOptions

if TYPE_CHECKING:
    from engineroom_vllm.engine import VLLMEngine

__all__ = ["VLLMHandler"]

logger = logging.getLogger("engineroom.vllm")

_KINDS: Final = frozenset({"json_schema", "regex", "grammar"})


class VLLMHandler(TokenHandler):
    """Runs Hugging Face models with vLLM, many requests at a time, in processes of its own.

    Options of a model are :class:`~engineroom_vllm.options.VLLMOptions`.
    """

    name: ClassVar[str] = "vllm"
    api_version: ClassVar[str] = "1.0"

    def capabilities(self) -> Capabilities:
        """Everything but tools; beams without sampling; adapters by their name in the options;
        embeddings from models that are made for them.
        """
        return Capabilities(
            params=frozenset(GenerationParams.model_fields),
            chat=True,
            structured_output=_KINDS,
            adapters=True,
            embeddings=True,
            prompt_token_ids=True,
        )

    def unavailable(self) -> str | None:
        """Why not, where vLLM is not installed; which of its two builds, only the user can tell."""
        return None if installed() else f"vLLM is not installed; {INSTALL}"

    def can_handle(self, loaded_model: LoadedModel) -> bool:
        """True for models that this handler loaded."""
        if loaded_model.handler_name != self.name:
            return False
        from engineroom_vllm.engine import VLLMEngine

        return isinstance(loaded_model.model_object, VLLMEngine)

    def can_load(self, config: ModelConfig) -> bool:
        """True for folders as transformers saves them, and for repositories on the hub, where
        vLLM is installed.
        """
        source = config.source or ""
        if not installed():
            return False
        if source.startswith("hf:"):
            return source.count(":") == 1 and source.count("/") == 1
        try:
            return is_model_folder(resolve_source(source))
        except (ConfigurationError, ModelNotFoundError):
            return False

    def estimate_memory(self, config: ModelConfig) -> Mapping[str, int] | None:
        """Weights, cache and processes in bytes, from the folder's small files."""
        options = parse_options(VLLMOptions, config)
        source = config.source or ""
        if source.startswith("hf:"):
            return None  # it would have to be downloaded first
        from engineroom_vllm.loading import estimate

        return estimate(source, options)

    def import_runtime(self) -> None:
        """Import vLLM into this process; its engines have processes of their own.

        :raises ConfigurationError: it is not installed, or cannot be imported.
        """
        from engineroom_vllm.library import load

        load()

    def runtime_processes(self) -> Collection[int]:
        """The process that engines are forked from; they themselves are models'."""
        from engineroom_vllm.forkserver import SERVERS

        return SERVERS.processes()

    async def load_model(self, config: ModelConfig) -> LoadedModel:
        """Start an engine and wait, in a thread, until it is ready: a minute or more.

        :raises ModelNotFoundError: there is no such folder.
        :raises ConfigurationError: vLLM is not installed, an option is wrong, or the folder holds
            no model that vLLM can run.
        :raises ResourceNotAvailableError: there is no memory for it, or it took too long.
        """
        options = parse_options(VLLMOptions, config)
        from engineroom_vllm.loading import EngineStart

        start = EngineStart(config, options)
        load = BackgroundLoad(
            start.run, lambda engine: engine.close(), name="vllm", stop=start.stop
        )
        engine = await load.result()
        try:
            await asyncio.wait_for(engine.wake(), options.load_timeout_s)
        except BaseException as error:
            load.abandon()
            if isinstance(error, TimeoutError):
                raise ResourceNotAvailableError(
                    f"the engine of model {config.model_id!r} does not answer; load it again"
                ) from error
            raise
        return LoadedModel(
            model_id=config.model_id,
            model_object=engine,
            config=config,
            handler_name=self.name,
            tokenizer=engine.codec,
            max_context_tokens=engine.n_ctx,
            memory_bytes=engine.footprint.memory_bytes,
        )

    async def unload_model(self, loaded_model: LoadedModel) -> None:
        """End the engine's processes, and what still runs in them."""
        engine = _engine(loaded_model)
        await engine.stop()
        await asyncio.to_thread(engine.close)

    def count_tokens(self, loaded_model: LoadedModel, text: str) -> int:
        """Tokens of ``text``, read as plain text, without any that the model adds."""
        return _engine(loaded_model).codec.count(text)

    def health(self, loaded_model: LoadedModel) -> HandlerHealth:
        """The engine's own word."""
        return _engine(loaded_model).health()

    async def embed(self, loaded_model: LoadedModel, texts: Sequence[str]) -> Embeddings:
        """Texts as vectors, pooled as the model's folder says.

        :raises ConfigurationError: the model makes no embeddings, or a text is too long for it.
        :raises QueueFullError: too many requests wait.
        :raises EngineDeadError: the engine has ended.
        """
        engine = _engine(loaded_model)
        if not engine.embeds:
            raise ConfigurationError(
                "this model generates text and makes no embeddings; use an encoder, or a model "
                "whose folder has a modules.json that says how to pool, or set the option "
                "runner: pooling"
            )
        tokens = await asyncio.to_thread(lambda: [engine.codec.whole(text) for text in texts])
        return Embeddings(await engine.embed(tokens), sum(map(len, tokens)))

    async def generate_tokens(
        self, loaded_model: LoadedModel, request: InferenceRequest
    ) -> AsyncGenerator[TokenStep, None]:
        """Run the request and yield a step a token.

        :raises ConfigurationError: the prompt is empty or longer than the context, a parameter
            is one that vLLM has no way for, the chat template refuses the messages, or the model
            makes embeddings.
        :raises QueueFullError: too many requests wait.
        :raises EngineDeadError: the engine has ended.
        """
        engine = _engine(loaded_model)
        if engine.embeds:
            raise ConfigurationError(
                "this model makes embeddings and generates no text; ask for embeddings, or load a "
                "model that generates text, or set the option runner: generate"
            )
        tokens = await tokens_of(engine.codec, request)
        async with aclosing(engine.generate(request, tokens)) as steps:
            async for step in steps:
                yield step


def _engine(loaded_model: LoadedModel) -> VLLMEngine:
    engine: VLLMEngine = loaded_model.model_object
    return engine
