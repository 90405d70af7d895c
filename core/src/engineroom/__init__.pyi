# The public face, said once: what is imported here is what ``engineroom`` exports, each name loaded
# when it is first used. Type checkers read this file, and so does ``__init__.py``.

from .config.deployment import (
    DeploymentConfig as DeploymentConfig,
)
from .config.deployment import (
    load_deployment as load_deployment,
)
from .config.deployment import (
    parse_deployment as parse_deployment,
)
from .config.model import (
    LoadedModel as LoadedModel,
)
from .config.model import (
    ModelConfig as ModelConfig,
)
from .config.model import (
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
)
from .engine.batching import (
    EngineTask as EngineTask,
)
from .engine.decode_loop import (
    CPU_LOOP as CPU_LOOP,
)
from .engine.decode_loop import (
    DecodeLoop as DecodeLoop,
)
from .engine.decode_loop import (
    default_threads as default_threads,
)
from .engine.decode_loop import (
    run_in_new_thread as run_in_new_thread,
)
from .errors import (
    ConfigurationError as ConfigurationError,
)
from .errors import (
    EngineDeadError as EngineDeadError,
)
from .errors import (
    EngineRoomError as EngineRoomError,
)
from .errors import (
    InferenceError as InferenceError,
)
from .errors import (
    ModelNotFoundError as ModelNotFoundError,
)
from .errors import (
    NoSuitableHandlerError as NoSuitableHandlerError,
)
from .errors import (
    QueueFullError as QueueFullError,
)
from .errors import (
    RequestTimeoutError as RequestTimeoutError,
)
from .errors import (
    ResourceNotAvailableError as ResourceNotAvailableError,
)
from .generation.mailbox import (
    Mailbox as Mailbox,
)
from .generation.mailbox import (
    deliver as deliver,
)
from .generation.steps import (
    TokenStep as TokenStep,
)
from .generation.text import (
    TextPipeline as TextPipeline,
)
from .generation.text import (
    Utf8Decoder as Utf8Decoder,
)
from .handlers.base import (
    API_VERSION as API_VERSION,
)
from .handlers.base import (
    Capabilities as Capabilities,
)
from .handlers.base import (
    Embeddings as Embeddings,
)
from .handlers.base import (
    HandlerHealth as HandlerHealth,
)
from .handlers.base import (
    InferenceHandler as InferenceHandler,
)
from .handlers.base import (
    StreamEnd as StreamEnd,
)
from .handlers.dispatch import (
    DispatchReport as DispatchReport,
)
from .handlers.dispatch import (
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
)
from .inference.streams import (
    StreamError as StreamError,
)
from .memory.account import (
    DeviceMemory as DeviceMemory,
)
from .memory.probe import (
    give_back_memory as give_back_memory,
)
from .models.manager import (
    LLMModelManager as LLMModelManager,
)
from .models.manager import (
    ModelSource as ModelSource,
)
from .models.plan import (
    Plan as Plan,
)
from .models.plan import (
    PlannedModel as PlannedModel,
)
from .models.plan import (
    PlannedVariant as PlannedVariant,
)
from .models.reloading import (
    reloading as reloading,
)
from .schemas import (
    ChatMessage as ChatMessage,
)
from .schemas import (
    EmbeddingRequest as EmbeddingRequest,
)
from .schemas import (
    FinishReason as FinishReason,
)
from .schemas import (
    GenerationParams as GenerationParams,
)
from .schemas import (
    InferenceRequest as InferenceRequest,
)
from .schemas import (
    InferenceResponse as InferenceResponse,
)
from .schemas import (
    StructuredOutput as StructuredOutput,
)
from .schemas import (
    TokenLogprob as TokenLogprob,
)
from .service import (
    LLMInferenceService as LLMInferenceService,
)
from .sources.source import (
    HubSource as HubSource,
)
from .sources.source import (
    PackageSource as PackageSource,
)
from .sources.source import (
    PathSource as PathSource,
)
from .sources.source import (
    Source as Source,
)
from .sources.source import (
    find_source as find_source,
)
from .sources.source import (
    parse_source as parse_source,
)
from .sources.source import (
    resolve_source as resolve_source,
)
from .status import (
    ModelState as ModelState,
)
from .status import (
    ModelStatus as ModelStatus,
)
from .status import (
    PreloadProgress as PreloadProgress,
)
from .status import (
    ReloadReport as ReloadReport,
)
from .status import (
    VariantOutcome as VariantOutcome,
)
from .telemetry import (
    LoggingObserver as LoggingObserver,
)
from .telemetry import (
    RequestLogger as RequestLogger,
)
from .telemetry import (
    request_logger as request_logger,
)

__all__: list[str]
__version__: str
