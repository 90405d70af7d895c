"""One LLM inference service in front of any runtime.

.. code-block:: python

    import asyncio
    from engineroom import InferenceRequest, LLMInferenceService, LLMModelManager

    async def main():
        manager = LLMModelManager(config_path="deployment.yaml")
        async with LLMInferenceService(manager) as service:
            request = InferenceRequest(model_id="smollm2", prompt="Hello", stream=True)
            async for chunk in await service.process_inference(request):
                print(chunk, end="", flush=True)

    asyncio.run(main())

Read :mod:`engineroom.service` first, then :mod:`engineroom.handlers.base`. Runtimes are plugins:
``pip install engineroom-llamacpp``, and ``engineroom plugins`` lists them.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from engineroom.engine.batching import BatchingEngine, EngineTask
    from engineroom.config.deployment import (
        DeploymentConfig,
        load_deployment,
    )
    from engineroom.engine.decode_loop import (
        CPU_LOOP,
        DecodeLoop,
        default_threads,
        run_in_new_thread,
    )
    from engineroom.models.entry import (
        ModelStatus,
        VariantOutcome,
    )
    from engineroom.errors import (
        ConfigurationError,
        EngineDeadError,
        EngineRoomError,
        InferenceError,
        ModelNotFoundError,
        NoSuitableHandlerError,
        QueueFullError,
        RequestTimeoutError,
        ResourceNotAvailableError,
    )
    from engineroom.generation.generation import (
        TokenHandler,
        TokenStep,
    )
    from engineroom.handlers.base import (
        API_VERSION,
        Capabilities,
        Embeddings,
        HandlerHealth,
        InferenceHandler,
        StreamEnd,
    )
    from engineroom.handlers.markers import (
        hookimpl,
    )
    from engineroom.generation.mailbox import Mailbox, deliver
    from engineroom.models.manager import (
        LLMModelManager,
        ModelSource,
        PreloadProgress,
    )
    from engineroom.memory.account import (
        DeviceMemory,
    )
    from engineroom.memory.probe import give_back_memory
    from engineroom.config.options import (
        parse_options,
    )
    from engineroom.models.plan import (
        Plan,
        PlannedModel,
        PlannedVariant,
    )
    from engineroom.handlers.registry import (
        DispatchReport,
        HandlerRegistry,
        HandlerVerdict,
    )
    from engineroom.config.changes import (
        ReloadReport,
    )
    from engineroom.schemas import (
        ChatMessage,
        FinishReason,
        GenerationParams,
        InferenceRequest,
        InferenceResponse,
        LoadedModel,
        ModelConfig,
        ModelVariant,
        StructuredOutput,
        TokenLogprob,
    )
    from engineroom.service import (
        LLMInferenceService,
    )
    from engineroom.sources.source import (
        find_source,
        resolve_source,
    )
    from engineroom.inference.streams import (
        InferenceStream,
        StreamError,
    )
    from engineroom.config.suggestions import (
        did_you_mean,
    )
    from engineroom.telemetry import (
        LoggingObserver,
        RequestLogger,
        request_logger,
    )
    from engineroom.generation.text import (
        TextPipeline,
    )
    from engineroom.models.reloading import (
        reloading,
    )

__all__ = [
    "API_VERSION",
    "CPU_LOOP",
    "BatchingEngine",
    "Capabilities",
    "ChatMessage",
    "ConfigurationError",
    "DecodeLoop",
    "DeploymentConfig",
    "DeviceMemory",
    "DispatchReport",
    "Embeddings",
    "EngineDeadError",
    "EngineRoomError",
    "EngineTask",
    "FinishReason",
    "GenerationParams",
    "HandlerHealth",
    "HandlerRegistry",
    "HandlerVerdict",
    "InferenceError",
    "InferenceHandler",
    "InferenceRequest",
    "InferenceResponse",
    "InferenceStream",
    "LLMInferenceService",
    "LLMModelManager",
    "LoadedModel",
    "LoggingObserver",
    "Mailbox",
    "ModelConfig",
    "ModelNotFoundError",
    "ModelSource",
    "ModelStatus",
    "ModelVariant",
    "NoSuitableHandlerError",
    "Plan",
    "PlannedModel",
    "PlannedVariant",
    "PreloadProgress",
    "QueueFullError",
    "ReloadReport",
    "RequestLogger",
    "RequestTimeoutError",
    "ResourceNotAvailableError",
    "StreamEnd",
    "StreamError",
    "StructuredOutput",
    "TextPipeline",
    "TokenHandler",
    "TokenLogprob",
    "TokenStep",
    "VariantOutcome",
    "default_threads",
    "deliver",
    "did_you_mean",
    "find_source",
    "give_back_memory",
    "hookimpl",
    "load_deployment",
    "parse_options",
    "reloading",
    "request_logger",
    "resolve_source",
    "run_in_new_thread",
]

# Where each name lives. They are imported when they are first used: pydantic's schemas cost more
# than all else, and whoever only asks for a version or `--help` should not pay for them.
_MODULES: Final = {
    "BatchingEngine": "batching",
    "EngineTask": "batching",
    "DeploymentConfig": "config",
    "load_deployment": "config",
    "CPU_LOOP": "decode_loop",
    "DecodeLoop": "decode_loop",
    "default_threads": "decode_loop",
    "run_in_new_thread": "decode_loop",
    "ConfigurationError": "errors",
    "EngineDeadError": "errors",
    "EngineRoomError": "errors",
    "InferenceError": "errors",
    "ModelNotFoundError": "errors",
    "NoSuitableHandlerError": "errors",
    "QueueFullError": "errors",
    "RequestTimeoutError": "errors",
    "ResourceNotAvailableError": "errors",
    "TokenHandler": "generation",
    "TokenStep": "generation",
    "API_VERSION": "handler",
    "Capabilities": "handler",
    "Embeddings": "handler",
    "HandlerHealth": "handler",
    "InferenceHandler": "handler",
    "StreamEnd": "handler",
    "hookimpl": "hookspecs",
    "Mailbox": "mailbox",
    "deliver": "mailbox",
    "LLMModelManager": "manager",
    "ModelSource": "manager",
    "ModelStatus": "entries",
    "VariantOutcome": "entries",
    "PreloadProgress": "manager",
    "DeviceMemory": "memory",
    "Plan": "plan",
    "PlannedModel": "plan",
    "PlannedVariant": "plan",
    "ReloadReport": "reload",
    "reloading": "triggers",
    "give_back_memory": "meter",
    "parse_options": "options",
    "DispatchReport": "registry",
    "HandlerRegistry": "registry",
    "HandlerVerdict": "registry",
    "ChatMessage": "schemas",
    "FinishReason": "schemas",
    "GenerationParams": "schemas",
    "InferenceRequest": "schemas",
    "InferenceResponse": "schemas",
    "LoadedModel": "schemas",
    "ModelConfig": "schemas",
    "ModelVariant": "schemas",
    "StructuredOutput": "schemas",
    "TokenLogprob": "schemas",
    "LLMInferenceService": "service",
    "find_source": "sources",
    "resolve_source": "sources",
    "InferenceStream": "streams",
    "StreamError": "streams",
    "did_you_mean": "suggestions",
    "LoggingObserver": "telemetry",
    "RequestLogger": "telemetry",
    "request_logger": "telemetry",
    "TextPipeline": "text",
}

# A library leaves it to the application whether its logs are written.
logging.getLogger("engineroom").addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            value: Any = version("engineroom")
        except PackageNotFoundError:  # run from a checkout that is not installed
            value = "0.0.0"
    elif (module := _MODULES.get(name)) is not None:
        from importlib import import_module

        value = getattr(import_module(f"engineroom.{module}"), name)
    else:
        raise AttributeError(f"module 'engineroom' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
