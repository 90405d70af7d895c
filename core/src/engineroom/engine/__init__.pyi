# What plugins may use; each name is loaded when it is first used (see ``__init__.py``).

from .background_load import (
    BackgroundLoad as BackgroundLoad,
)
from .base import (
    Engine as Engine,
)
from .batching import (
    BatchingEngine as BatchingEngine,
    EngineTask as EngineTask,
)
from .beam_search import (
    Beam as Beam,
    BeamSearch as BeamSearch,
    Likeliest as Likeliest,
)
from .constraint import (
    FREE_S as FREE_S,
    PER_TOKEN_S as PER_TOKEN_S,
    TOO_LONG as TOO_LONG,
    Constraint as Constraint,
)
from .constraints import (
    GrammarCompiler as GrammarCompiler,
    compiled as compiled,
    grammar_of as grammar_of,
    reasoning_budget_of as reasoning_budget_of,
)
from .decode_loop import (
    CPU_LOOP as CPU_LOOP,
    DecodeLoop as DecodeLoop,
    default_threads as default_threads,
    run_in_new_thread as run_in_new_thread,
)
from .handler import (
    EngineHandler as EngineHandler,
)
from .logprobs import (
    MakeLogprob as MakeLogprob,
    first_of_prompt as first_of_prompt,
    logprob_maker as logprob_maker,
)
from .prompt_lookup import (
    Drafter as Drafter,
    DraftRequest as DraftRequest,
    PromptLookup as PromptLookup,
    common_prefix as common_prefix,
)
from .reasoning_budget import (
    ReasoningBudget as ReasoningBudget,
)
from .sampling import (
    Logits as Logits,
    NoNumbersError as NoNumbersError,
    Sampler as Sampler,
    SamplerState as SamplerState,
    largest as largest,
    top_logprobs as top_logprobs,
)
from .scheduler import (
    BatchSlice as BatchSlice,
    Choice as Choice,
    Chosen as Chosen,
    PromptScores as PromptScores,
    Scheduler as Scheduler,
    StepBatch as StepBatch,
    StepOutputs as StepOutputs,
    TextTask as TextTask,
)
from .step_watch import (
    StepWatch as StepWatch,
)

__all__: list[str]
