"""vLLM itself: whether it is installed, and all that differs between its versions.

No other module imports vLLM. Written for 0.30 and later; where a version names something in
another way, the names are tried in turn here.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import logging
import os
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Final

from engineroom import Border, ConfigurationError, did_you_mean
from engineroom.sources import EmbeddingOptions, VectorSizes, vector_sizes
from engineroom_vllm.prompt_rows import keep_rows

__all__ = [
    "CONTEXT_FUNCTION",
    "FORKED_IMPORTS",
    "INSTALL",
    "Library",
    "installed",
    "load",
]

logger = logging.getLogger("engineroom.vllm.library")

INSTALL: Final = (
    'pip install "engineroom-vllm[cuda]" (GPUs) or pip install "engineroom-vllm[cpu]" (no GPU)'
)
_LEVELS: Final = {logging.ERROR: logging.WARNING, logging.CRITICAL: logging.WARNING}
_FORMATTER: Final = logging.Formatter()
_SOCKETS_S: Final = 2.0
"""Seconds for the event loop to close the sockets of an engine that has ended."""
FORKED_IMPORTS: Final = (
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
)
"""What the processes of an engine on a CPU import."""
CONTEXT_FUNCTION: Final = ("vllm.v1.engine.utils", "get_mp_context")
"""A module, and its function by which vLLM chooses how the first process of an engine is
started."""
_CONFIGURE: Final = "VLLM_CONFIGURE_LOGGING"
_COMPILES: Final = "_validate_structured_outputs"
_ANY_GRAMMAR: Final = 'start: "a"'
_lock: Final = threading.Lock()
_state: Final[dict[str, Library]] = {}


def installed() -> bool:
    """Whether vLLM can be found; nothing is imported."""
    try:
        return importlib.util.find_spec("vllm") is not None
    except (ImportError, ValueError):
        return False


def load() -> Library:
    """vLLM, imported once a process. Takes seconds, so not on the event loop.

    :raises ConfigurationError: it is not installed, or cannot be imported.
    """
    with _lock:
        if (library := _state.get("library")) is None:
            if not installed():
                raise ConfigurationError(f"vLLM is not installed; {INSTALL}")
            try:
                with _imported_quietly():
                    library = Library()
                _state["library"] = library
            except (ImportError, OSError, RuntimeError, AttributeError) as error:
                raise ConfigurationError(
                    f"vLLM cannot be imported: {type(error).__name__}: {error}; install it again: "
                    f"{INSTALL}"
                ) from error
        return library


class Library:
    """The names of vLLM that this plugin uses, and what it does with them."""

    def __init__(self) -> None:
        import vllm
        from vllm.config import PoolerConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.pooling_params import PoolingParams
        from vllm.sampling_params import (
            RequestOutputKind,
            SamplingParams,
            StructuredOutputsParams,
        )
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.engine.exceptions import EngineDeadError
        from vllm.v1.engine.logprobs import LogprobsProcessor

        keep_rows(LogprobsProcessor)
        self.version = str(getattr(vllm, "__version__", "?"))
        self.dead_error: type[BaseException] = EngineDeadError
        self.request_errors = _request_errors()
        self.cpu = bool(current_platform.is_cpu())
        self._async_llm: Any = AsyncLLM
        self._arguments: Any = AsyncEngineArgs
        self._sampling_params: Any = _without_compiling(SamplingParams)
        self._structured: Any = StructuredOutputsParams
        self._delta = RequestOutputKind.DELTA
        self._pooler: Any = PoolerConfig
        self._pooling_params: Any = PoolingParams
        self._tokens = _tokens_input()
        self._log_is_ours = not logging_is_the_users()

    # ── the engine ───────────────────────────────────────────────────────────────────────────

    def check_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Compare the names in ``engine_args`` with those that this vLLM has.

        :raises ConfigurationError: names the unknown ones, with the nearest known one.
        """
        known = {f.name for f in dataclasses.fields(self._arguments) if f.name[0] != "_"}
        unknown = [
            f"{name}: there is no such argument{did_you_mean(name, sorted(known)) or ''}"
            for name in arguments
            if name not in known
        ]
        if unknown:
            raise ConfigurationError(
                f"engine_args: {'; '.join(unknown)} (vLLM {self.version}; its documentation of "
                "engine arguments lists them)"
            )

    def configure(self, arguments: Mapping[str, Any]) -> Any:
        """VLLM's whole configuration, made of arguments of its engine; no process is started.

        Arguments with a value of ``None`` are left to vLLM.
        """
        stated = {name: value for name, value in arguments.items() if value is not None}
        if isinstance(pooler := stated.get("pooler_config"), Mapping):
            stated["pooler_config"] = self._pooler(**pooler)
        return self._arguments(**stated).create_engine_config()

    def can_fork(self, configuration: Any) -> bool:
        """Whether an engine's processes can be forked by :mod:`.forkserver`: one process that
        schedules and one that computes, on a CPU, and vLLM has the place where they are started.
        """
        if not (self.cpu and sys.platform == "linux"):
            return False
        parallel = configuration.parallel_config
        alone = getattr(parallel, "world_size_across_dp", parallel.world_size) == 1
        if not alone or getattr(parallel, "numa_bind", False):
            return False
        name, function = CONTEXT_FUNCTION
        return importlib.util.find_spec(name) is not None and hasattr(
            importlib.import_module(name), function
        )

    def check(self, configuration: Any) -> None:
        """Refuse what would end the engine at its first request: vLLM itself looks no earlier.

        :raises ConfigurationError: says what the model has and what vLLM can do.
        """
        model = configuration.model_config
        size = int(model.get_head_size() or 0)
        if not self.cpu or not size or getattr(model, "use_mla", False):
            return
        try:
            from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
        except ImportError:
            return
        sizes = CPUAttentionBackend.get_supported_head_sizes()
        if sizes and size not in sizes and not getattr(model, "is_attention_free", False):
            raise ConfigurationError(
                f"the model's attention heads have {size} numbers each; on CPUs vLLM computes "
                f"heads of {', '.join(map(str, sizes))}; use hf_transformers"
            )

    def start(self, configuration: Any) -> Any:
        """Start an engine and wait until it is ready. Blocks for a minute or more."""
        try:
            return self._async_llm.from_vllm_config(configuration, disable_log_stats=True)
        finally:
            if self._log_is_ours:  # it was set up anew, as for the engine's processes
                _take_over_the_log()

    @staticmethod
    def shut_down(llm: Any, timeout: float) -> None:
        """End an engine: its processes are asked to, and after ``timeout`` seconds killed.

        Not on the event loop, which closes the engine's sockets meanwhile.
        """
        llm.shutdown(timeout=timeout)
        _close_context(llm)

    @staticmethod
    def facts(llm: Any) -> SimpleNamespace:
        """Sizes of a running engine: ``context``, ``vocabulary``, ``cache_tokens``, ``parallel``.

        ``cache_tokens`` is 0 where the version does not tell.
        """
        model = llm.vllm_config.model_config
        cache = llm.vllm_config.cache_config
        blocks = getattr(cache, "num_gpu_blocks", None) or 0
        return SimpleNamespace(
            context=int(model.max_model_len),
            vocabulary=int(model.get_vocab_size()),
            cache_tokens=int(blocks) * int(getattr(cache, "block_size", 0) or 0),
            parallel=int(llm.vllm_config.scheduler_config.max_num_seqs),
        )

    @staticmethod
    def pools(configuration: Any) -> bool:
        """Whether an engine so configured makes vectors instead of text."""
        return str(configuration.model_config.runner_type) == "pooling"

    @staticmethod
    def vectors(configuration: Any, options: EmbeddingOptions) -> VectorSizes | None:
        """How long the vectors of an engine so configured are; ``None``: not known."""
        model = configuration.model_config
        size = getattr(model, "embedding_size", None)
        return vector_sizes(size, options, model.hf_config.to_dict()) if size else None

    @staticmethod
    async def wake(llm: Any) -> tuple[str, ...]:
        """Let the engine listen on this event loop, so that its death is noticed from now on.

        :returns: what it can do: ``generate``, ``embed``, ``classify``, …
        """
        # vLLM's task that hands outputs to requests tells them of an Exception alone: of anything
        # else it would end, and they would wait for ever.
        processor = llm.output_processor
        process = processor.process_outputs

        def contained(*arguments: Any, **options: Any) -> Any:
            with Border(logger, "vLLM: handing outputs over"):
                return process(*arguments, **options)

        processor.process_outputs = contained
        return tuple(map(str, await llm.get_supported_tasks()))

    @staticmethod
    def errored(llm: Any) -> bool:
        """Whether vLLM knows that the engine is dead. Cheap."""
        return bool(llm.errored)

    @staticmethod
    async def abort(llm: Any, request_ids: Sequence[str]) -> None:
        """Stop requests; each ends with the reason ``abort``."""
        await llm.abort(list(request_ids))

    # ── requests ─────────────────────────────────────────────────────────────────────────────

    def sampling(
        self,
        arguments: Mapping[str, Any],
        grammar: str | None = None,
        *,
        detokenize: bool = False,
    ) -> Any:
        """``SamplingParams`` that give only what is new, and stop tokens with their text.

        :param grammar: what the text must match, in Lark; it is known to be a grammar.
        """
        params = dict(arguments)
        if grammar is not None:
            params["structured_outputs"] = self._structured(grammar=grammar)
        return self._sampling_params(
            **params,
            output_kind=self._delta,
            detokenize=detokenize,
            include_stop_str_in_output=True,
            skip_clone=True,
        )

    def generate(
        self,
        llm: Any,
        tokens: list[int],
        sampling: Any,
        request_id: str,
        *,
        turn: int = 0,
        cache_salt: str | None = None,
        lora: Any = None,
    ) -> AsyncGenerator[Any, None]:
        """Outputs of a request, for token ids. Closing the generator aborts the request.

        :param turn: what vLLM calls a priority: the smallest goes first. It never gets another one,
            and whoever waits is overtaken only by those whose turn is earlier.
        :param cache_salt: what becomes part of the hash of the first block, and so of all that
            follow: blocks are found again with the same salt only.
        """
        outputs: AsyncGenerator[Any, None] = llm.generate(
            self._tokens(tokens, cache_salt), sampling, request_id, priority=turn, lora_request=lora
        )
        return outputs

    def encode(self, llm: Any, tokens: list[int], request_id: str) -> AsyncGenerator[Any, None]:
        """Outputs of a text, of which there is one. Cancelling the task aborts the request."""
        outputs: AsyncGenerator[Any, None] = llm.encode(
            self._tokens(tokens, None), self._pooling_params(task="embed"), request_id
        )
        return outputs

    @staticmethod
    def vector(output: Any) -> list[float]:
        """The numbers of an output of :meth:`encode`; of one that was aborted, none."""
        vector: list[float] = output.outputs.data.float().flatten().tolist()
        return vector

    @staticmethod
    def lora(name: str, number: int, path: str) -> Any:
        """An adapter as requests name it."""
        from vllm.lora.request import LoRARequest

        return LoRARequest(lora_name=name, lora_int_id=number, lora_path=path)


def _close_context(llm: Any) -> None:
    """Give back the files of the context of the engine's sockets, which vLLM leaves open.

    Only once all sockets are closed: until then, ending it would wait for them.
    """
    resources = getattr(getattr(llm, "engine_core", None), "resources", None)
    context = getattr(resources, "ctx", None)
    if context is None:
        return
    names = ("output_socket", "input_socket", "first_req_send_socket", "first_req_rcv_socket",
             "stats_update_socket")  # fmt: skip
    sockets = [s for s in (getattr(resources, name, None) for name in names) if s is not None]
    end = time.monotonic() + _SOCKETS_S
    while not all(socket.closed for socket in sockets):
        if time.monotonic() > end:
            return
        time.sleep(0.01)
    context.term()


def _request_errors() -> tuple[type[Exception], ...]:
    """What vLLM raises about a request that it refuses."""
    try:
        from vllm import exceptions
    except ImportError:
        return (ValueError,)
    names = ("VLLMClientError", "VLLMValidationError")
    return (ValueError, *(getattr(exceptions, n) for n in names if hasattr(exceptions, n)))


def _tokens_input() -> Callable[[list[int], str | None], Any]:
    """What makes an input of token ids and a salt for the cache."""
    from vllm import inputs

    make = getattr(inputs, "tokens_input", None) or inputs.TokensPrompt
    return lambda tokens, salt: make(
        prompt_token_ids=tokens, **({} if salt is None else {"cache_salt": salt})
    )


class _Forward(logging.Handler):
    """vLLM's own log, in this process, as engineroom's.

    Tracebacks come as text: their frames have the engine's sockets, which would stay open for as
    long as somebody keeps the record. That an engine has died is told by whoever watches it; that
    it ends when it is unloaded is no news.
    """

    def emit(self, record: logging.LogRecord) -> None:
        level = _LEVELS.get(record.levelno, logging.DEBUG)
        text = record.getMessage()
        if record.exc_info and (kind := record.exc_info[0]) is not None:
            text = f"{text}\n{_FORMATTER.formatException(record.exc_info)}"
            if kind.__name__ == "EngineDeadError":
                level = logging.DEBUG
        logger.log(level, "%s", text)


def _take_over_the_log() -> None:
    """Send what vLLM logs in this process where engineroom's log goes."""
    theirs = logging.getLogger("vllm")
    for handler in list(theirs.handlers):
        theirs.removeHandler(handler)
        handler.close()
    theirs.addHandler(_Forward())
    theirs.propagate = False
    if theirs.level == logging.NOTSET:
        theirs.setLevel(logging.INFO)


@contextmanager
def _imported_quietly() -> Iterator[None]:
    """Meanwhile vLLM sets up no log of its own, which 0.30 does when it is imported: what is said
    until it is taken over would go to the standard output.
    """
    if logging_is_the_users():
        yield
        return
    _take_over_the_log()
    os.environ[_CONFIGURE] = "0"
    try:
        yield
    finally:
        del os.environ[_CONFIGURE]
        _take_over_the_log()


def logging_is_the_users() -> bool:
    """Whether the environment says how vLLM is to log."""
    names = ("VLLM_LOGGING_CONFIG_PATH", _CONFIGURE, "VLLM_LOGGING_LEVEL")
    return any(name in os.environ for name in names)


def _without_compiling(params: Any) -> Any:
    """``SamplingParams`` that check all but the grammar itself.

    vLLM compiles it on the event loop, for a second where it is large, to see whether it is one.
    """
    if (check := getattr(params, _COMPILES, None)) is None:
        return params

    def check_the_rest(self: Any, *args: Any, **kwargs: Any) -> None:
        outputs = self.structured_outputs
        if outputs is None or outputs.grammar is None:
            check(self, *args, **kwargs)
            return
        grammar, outputs.grammar = outputs.grammar, _ANY_GRAMMAR
        try:
            check(self, *args, **kwargs)
        finally:
            outputs.grammar = grammar

    return type(params)(params.__name__, (params,), {_COMPILES: check_the_rest})
