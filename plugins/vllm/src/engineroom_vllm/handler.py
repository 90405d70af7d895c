"""The handler: what engineroom asks of the vLLM runtime."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Collection, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from engineroom import (
    STRUCTURED_KINDS,
    Capabilities,
    ConfigurationError,
    EngineHandler,
    GenerationParams,
    InferenceRequest,
    LoadedModel,
    ModelConfig,
    ResourceNotAvailableError,
    TokenStep,
    parse_options,
)
from engineroom.engine import BackgroundLoad
from engineroom.prompts import read_prompt
from engineroom_vllm.folder import is_model_folder
from engineroom_vllm.library import INSTALL, installed
from engineroom_vllm.options import VLLMOptions

if TYPE_CHECKING:
    from engineroom_vllm.engine import VLLMEngine

__all__ = ["VLLMHandler"]

logger = logging.getLogger("engineroom.vllm")


class VLLMHandler(EngineHandler):
    """Runs Hugging Face models with vLLM, many requests at a time, in processes of its own.

    Options of a model are :class:`~engineroom_vllm.options.VLLMOptions`.
    """

    name: ClassVar[str] = "vllm"
    api_version: ClassVar[str] = "1.0"
    options_class = VLLMOptions

    def capabilities(self) -> Capabilities:
        """Everything; beams without sampling; adapters by their name in the options;
        embeddings from models that are made for them.
        """
        return Capabilities(
            params=frozenset(GenerationParams.model_fields),
            chat=True,
            tools=True,
            template_args=True,
            structured_output=frozenset(STRUCTURED_KINDS),
            reasoning_budget=True,
            adapters=True,
            embeddings=True,
            prompt_token_ids=True,
            continue_final_message=True,
        )

    def unavailable(self) -> str | None:
        """Why not, where vLLM is not installed; which of its two builds, only the user can tell."""
        return None if installed() else f"vLLM is not installed; {INSTALL}"

    def can_load(self, config: ModelConfig) -> bool:
        """True for folders as transformers saves them, and for repositories on the hub, where
        vLLM is installed.
        """
        return installed() and super().can_load(config)

    def is_native(self, path: Path) -> bool:
        """True for folders as transformers saves them."""
        return is_model_folder(path)

    def is_native_name(self, source: str) -> bool:
        """True for whole repositories on the hub."""
        return source.startswith("hf:") and source.count(":") == source.count("/") == 1

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

    def make_engine(self, config: ModelConfig, options: VLLMOptions) -> VLLMEngine:
        """Start an engine, which does not listen yet; see :meth:`load_model`."""
        from engineroom_vllm.loading import EngineStart

        return EngineStart(config, options).run()

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
        load = BackgroundLoad(start.run, self.free_engine, name="vllm", stop=start.stop)
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
        engine.memory_bytes = engine.footprint.memory_bytes
        return self.loaded_model(config, engine)

    async def unload_model(self, loaded_model: LoadedModel) -> None:
        """End the engine's processes, and what still runs in them."""
        await loaded_model.model_object.stop()
        await super().unload_model(loaded_model)

    def embedder(self, engine: VLLMEngine) -> VLLMEngine:
        """The engine, where it was started to make embeddings."""
        if not engine.embeds:
            raise ConfigurationError(
                "this model generates text and makes no embeddings; use an encoder, or a model "
                "whose folder has a modules.json that says how to pool, or set the option "
                "runner: pooling"
            )
        return engine

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
        engine: VLLMEngine = loaded_model.model_object
        if engine.embeds:
            raise ConfigurationError(
                "this model makes embeddings and generates no text; ask for embeddings, or load a "
                "model that generates text, or set the option runner: generate"
            )
        prompt = await read_prompt(
            engine.codec, request, n_ctx=engine.n_ctx, advice=engine.longer_context
        )
        async with aclosing(engine.generate(request, prompt.tokens, prompt.tail)) as steps:
            async for step in steps:
                yield step
