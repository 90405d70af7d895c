# What plugins may use; each name is loaded when it is first used (see ``__init__.py``).

from .background_load import (
    BackgroundLoad as BackgroundLoad,
)
from .batching import (
    BatchingEngine as BatchingEngine,
)
from .batching import (
    EngineTask as EngineTask,
)
from .beam_search import (
    Beam as Beam,
)
from .beam_search import (
    BeamSearch as BeamSearch,
)
from .beam_search import (
    Likeliest as Likeliest,
)
from .decode_loop import (
    CPU_LOOP as CPU_LOOP,
)
from .decode_loop import (
    DecodeLoop as DecodeLoop,
)
from .decode_loop import (
    default_threads as default_threads,
)
from .decode_loop import (
    run_in_new_thread as run_in_new_thread,
)
from .prompt_lookup import (
    Drafter as Drafter,
)
from .prompt_lookup import (
    DraftRequest as DraftRequest,
)
from .prompt_lookup import (
    PromptLookup as PromptLookup,
)
from .prompt_lookup import (
    common_prefix as common_prefix,
)
from .sampling import (
    Logits as Logits,
)
from .sampling import (
    MakeLogprob as MakeLogprob,
)
from .sampling import (
    NoNumbersError as NoNumbersError,
)
from .sampling import (
    Sampler as Sampler,
)
from .sampling import (
    SamplerState as SamplerState,
)
from .sampling import (
    largest as largest,
)
from .sampling import (
    logprob_maker as logprob_maker,
)
from .sampling import (
    top_logprobs as top_logprobs,
)
from .scheduler import (
    BatchSlice as BatchSlice,
)
from .scheduler import (
    Choice as Choice,
)
from .scheduler import (
    Chosen as Chosen,
)
from .scheduler import (
    Scheduler as Scheduler,
)
from .scheduler import (
    StepBatch as StepBatch,
)
from .scheduler import (
    StepOutputs as StepOutputs,
)
from .scheduler import (
    TextTask as TextTask,
)

__all__: list[str]
