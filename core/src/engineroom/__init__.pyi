# The public face, said once: what is imported here is what ``engineroom`` exports, each name loaded
# when it is first used. Type checkers read this file, and so does ``__init__.py``.

from .border import (
    Border as Border,
)
from .config.deployment import (
    DeploymentConfig as DeploymentConfig,
    load_deployment as load_deployment,
    parse_deployment as parse_deployment,
)
from .config.model import (
    LoadedModel as LoadedModel,
    ModelConfig as ModelConfig,
    ModelVariant as ModelVariant,
)
from .config.options import (
    parse_options as parse_options,
)
from .config.suggestions import (
    did_you_mean as did_you_mean,
)
from .engine.batching import (
    BatchingEngine as BatchingEngine,
    EngineTask as EngineTask,
)
from .engine.decode_loop import (
    CPU_LOOP as CPU_LOOP,
    DecodeLoop as DecodeLoop,
    default_threads as default_threads,
    run_in_new_thread as run_in_new_thread,
)
from .engine.handler import (
    EngineHandler as EngineHandler,
)
from .errors import (
    ConfigurationError as ConfigurationError,
    ContextLengthExceededError as ContextLengthExceededError,
    EngineDeadError as EngineDeadError,
    EngineRoomError as EngineRoomError,
    InferenceError as InferenceError,
    ModelNotFoundError as ModelNotFoundError,
    NoSuitableHandlerError as NoSuitableHandlerError,
    QueueFullError as QueueFullError,
    RequestTimeoutError as RequestTimeoutError,
    ResourceNotAvailableError as ResourceNotAvailableError,
)
from .generation.call_forms import (
    JsonForm as JsonForm,
    NamedForm as NamedForm,
    PythonicForm as PythonicForm,
    ReasoningFormat as ReasoningFormat,
    TaggedForm as TaggedForm,
    ToolFormat as ToolFormat,
)
from .generation.deltas import (
    ReasoningDelta as ReasoningDelta,
    ToolCallDelta as ToolCallDelta,
)
from .generation.mailbox import (
    Mailbox as Mailbox,
    deliver as deliver,
)
from .generation.steps import (
    TokenStep as TokenStep,
)
from .generation.text import (
    TextPipeline as TextPipeline,
    Utf8Decoder as Utf8Decoder,
)
from .generation.traits import (
    ModelTraits as ModelTraits,
)
from .handlers.base import (
    API_VERSION as API_VERSION,
    Capabilities as Capabilities,
    Embeddings as Embeddings,
    HandlerHealth as HandlerHealth,
    InferenceHandler as InferenceHandler,
    Scores as Scores,
    StreamEnd as StreamEnd,
)
from .handlers.dispatch import (
    DispatchReport as DispatchReport,
    HandlerVerdict as HandlerVerdict,
)
from .handlers.markers import (
    hookimpl as hookimpl,
)
from .handlers.registry import (
    HandlerRegistry as HandlerRegistry,
)
from .handlers.token_handler import (
    TokenHandler as TokenHandler,
)
from .inference.streams import (
    InferenceStream as InferenceStream,
    StreamError as StreamError,
)
from .inference.tokenizing import (
    Tokens as Tokens,
)
from .memory.account import (
    DeviceMemory as DeviceMemory,
)
from .memory.probe import (
    give_back_memory as give_back_memory,
)
from .models.manager import (
    LLMModelManager as LLMModelManager,
    ModelSource as ModelSource,
)
from .models.plan import (
    Plan as Plan,
    PlannedModel as PlannedModel,
    PlannedVariant as PlannedVariant,
)
from .models.reloading import (
    reloading as reloading,
)
from .other_requests import (
    CountRequest as CountRequest,
    DetokenizeRequest as DetokenizeRequest,
    EmbeddingRequest as EmbeddingRequest,
    RerankRequest as RerankRequest,
    TokenizeRequest as TokenizeRequest,
)
from .schemas import (
    STRUCTURED_KINDS as STRUCTURED_KINDS,
    ChatMessage as ChatMessage,
    FinishReason as FinishReason,
    GenerationParams as GenerationParams,
    InferenceRequest as InferenceRequest,
    InferenceResponse as InferenceResponse,
    PromptLogprob as PromptLogprob,
    StructuredOutput as StructuredOutput,
    TokenLogprob as TokenLogprob,
)
from .service import (
    LLMInferenceService as LLMInferenceService,
)
from .sources.source import (
    HubSource as HubSource,
    PackageSource as PackageSource,
    PathSource as PathSource,
    Source as Source,
    find_source as find_source,
    parse_source as parse_source,
    resolve_source as resolve_source,
)
from .sources.vectors import (
    VectorSizes as VectorSizes,
)
from .status import (
    ModelState as ModelState,
    ModelStatus as ModelStatus,
    PreloadProgress as PreloadProgress,
    ReloadReport as ReloadReport,
    VariantOutcome as VariantOutcome,
)
from .telemetry import (
    LoggingObserver as LoggingObserver,
    RequestLogger as RequestLogger,
    request_logger as request_logger,
    work_logger as work_logger,
    work_priority as work_priority,
)
from .tools import (
    NamedTool as NamedTool,
    ToolCall as ToolCall,
)
from .turns import (
    WaitingLine as WaitingLine,
    turn_of as turn_of,
)
from .units import (
    ByteSize as ByteSize,
)

__all__: list[str]
__version__: str
