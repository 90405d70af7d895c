"""One load and one unload: variants in turn, memory reserved, measured and given back."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from engineroom.border import Border, get_logger, in_thread, log_failure
from engineroom.config.model import LoadedModel, ModelConfig
from engineroom.errors import (
    ConfigurationError,
    EngineRoomError,
    InferenceError,
    ResourceNotAvailableError,
)
from engineroom.handlers.base import InferenceHandler
from engineroom.handlers.registry import HandlerRegistry
from engineroom.memory.account import Footprint, settled
from engineroom.memory.probe import MemoryProbe
from engineroom.models.candidates import Candidate, find_candidates
from engineroom.models.entry import ModelEntry
from engineroom.models.files import FileStamp, FileWatch, file_stamps
from engineroom.models.memory_queue import MemoryQueue
from engineroom.status import VariantResult
from engineroom.units import format_size

__all__ = ["Loader"]

logger = get_logger("engineroom.loading")

_CHANGED_ATTEMPTS = 2
"""How often a model is loaded whose files are written meanwhile."""


class Loader:
    """Does what the lifecycle decides; keeps account and measurements.

    :param queue: who grants memory, and keeps its account.
    :param probe: how memory is measured.
    """

    def __init__(self, queue: MemoryQueue, probe: MemoryProbe) -> None:
        self.in_thread = in_thread
        """Runs what blocks."""
        self._queue = queue
        self._evictor = queue.evictor
        self._account = queue.evictor.account
        self._probe = probe
        self._handlers: tuple[InferenceHandler, ...] = ()
        """All that have loaded: what a runtime keeps may outlive its models."""
        self._running = self._started = 0  # loads and unloads

    async def candidates(self, entry: ModelEntry, registry: HandlerRegistry) -> list[Candidate]:
        """The model's variants; devices that they need get a budget if they have none yet.

        :raises ResourceNotAvailableError: the system lets nobody look: no file can be opened.
        """
        known, config = dict(entry.known), entry.config

        def look() -> tuple[list[Candidate], dict[str, int | None]]:
            candidates = find_candidates(registry, config, known)
            devices = {device for candidate in candidates for device in candidate.takes}
            new = [device for device in devices if not self._account.knows(device)]
            return candidates, {device: self._probe.capacity(device) for device in new}

        try:
            candidates, budgets = await self.in_thread(look)
        except OSError as error:
            raise ResourceNotAvailableError(
                f"what model {config.model_id!r} needs cannot be found out: {error}; send it again "
                "later",
                model_id=config.model_id,
            ) from error
        for device, budget in budgets.items():
            if not self._account.knows(device):
                # What models of ours hold there already is not free, but it is theirs to share.
                whole = None if budget is None else budget + self._account.taken(device)
                self._account.set_budget(device, whole, detected=True)
        footprints = entry.footprints
        return [
            replace(c, need=footprints.get(c.place, Footprint()).beside_left(c.takes))
            for c in candidates
        ]

    @contextmanager
    def _interval(self) -> Iterator[Callable[[], bool]]:
        """The time of a load or an unload; says whether no other one has overlapped it so far."""
        self._running += 1
        self._started += 1
        alone, mark = self._running == 1, self._started
        try:
            yield lambda: alone and self._started == mark
        finally:
            self._running -= 1

    # ── loading ──────────────────────────────────────────────────────────────────────────────

    async def load(
        self, entry: ModelEntry, candidates: Sequence[Candidate], deadline: float
    ) -> None:
        """Load the first variant that there is room for; the next ones where it fails.

        :param deadline: on the loop's clock, for there to be room.
        :raises EngineRoomError: none could be loaded.
        """
        errors: dict[int, EngineRoomError] = {}
        outcomes = entry.outcomes = [candidate.outcome("not tried") for candidate in candidates]

        def note(candidate: Candidate, result: VariantResult, error: EngineRoomError) -> None:
            errors[candidate.place] = error
            outcomes[candidate.place] = candidate.outcome(result, error.message)

        possible = []
        for candidate in candidates:
            if candidate.error is not None:
                note(candidate, "refused", candidate.error)
            elif not self._evictor.can_ever_fit(entry, candidate.need):
                note(candidate, "refused", self._evictor.refusal(entry, candidate.need))
            else:
                possible.append(candidate)
        while possible:
            chosen = next((c for c in possible if self._queue.fits_now(entry, c.need)), possible[0])
            possible.remove(chosen)
            try:
                await self._load_one(entry, chosen, deadline)
            except EngineRoomError as error:
                note(chosen, "failed", chosen.config.without_secrets(error))
                if not entry.fallback:
                    raise
                if possible:
                    logger.warning(
                        "model %r: %s from %s failed, the next variant is tried: %s",
                        entry.config.model_id,
                        chosen.runtime,
                        chosen.config.source,
                        error.describe(),
                    )
            else:
                outcomes[chosen.place] = chosen.outcome("used")
                entry.variant = chosen.place
                return
        raise _none_left(entry.config, [errors[place] for place in sorted(errors)])

    async def _load_one(self, entry: ModelEntry, candidate: Candidate, deadline: float) -> None:
        await self._queue.acquire(entry, candidate.need, deadline)
        try:
            await self._load_reserved(entry, candidate)
        except BaseException:
            self._account.release(entry)
            raise

    async def _load_reserved(self, entry: ModelEntry, candidate: Candidate) -> None:
        handler, config = candidate.handler, candidate.config
        assert handler is not None
        if handler not in self._handlers:
            self._handlers += (handler,)  # a new one: another thread may read the old one
        devices = {"cpu", *candidate.need}
        model_id = config.model_id
        await typed(
            handler, "import_runtime", model_id, lambda: self.in_thread(handler.import_runtime)
        )
        for attempt in range(1, _CHANGED_ATTEMPTS + 1):
            logger.info("loading model %r with %s from %s", model_id, handler.name, config.source)
            with self._interval() as undisturbed:
                before, mark = await self.in_thread(lambda: self._look(devices, config))
                started = time.perf_counter()
                loaded = await typed(
                    handler, "load_model", model_id, lambda: handler.load_model(config)
                )
                if not isinstance(loaded, LoadedModel):
                    raise InferenceError(
                        f"handler {handler.name!r}: load_model returned {type(loaded).__name__} "
                        "instead of a LoadedModel; mend the plugin"
                    )
                duration = time.perf_counter() - started
                try:
                    after, mark_after = await self.in_thread(lambda: self._look(devices, config))
                except BaseException:
                    await _give_back(handler, loaded)
                    raise
                growth = _difference(before, after) if undisturbed() else {}
            if mark == mark_after:
                break
            logger.warning("model %r: its files were written while it was loaded", model_id)
            await _give_back(handler, loaded)
            if attempt == _CHANGED_ATTEMPTS:
                raise ResourceNotAvailableError(
                    f"the files of model {model_id!r} ({config.source}) are written while it is "
                    "being loaded; wait until they are complete, and send it again",
                    model_id=model_id,
                )
        if loaded.handler_name is None:
            loaded.handler_name = handler.name
        entry.loaded, entry.handler = loaded, handler
        entry.load_duration_s = duration
        entry.files = FileWatch(model_id, config.source, mark)
        entry.files.start()
        self._settle(entry, candidate, loaded, growth)

    def _settle(
        self,
        entry: ModelEntry,
        candidate: Candidate,
        loaded: LoadedModel,
        growth: Mapping[str, int],
    ) -> None:
        """Put what the model takes into the account, in the place of what was reserved."""
        footprint = entry.footprints.setdefault(candidate.place, Footprint())
        for device, amount in footprint.loaded(growth).items():
            self._account.reused(device, amount)
        held = settled(candidate.takes, loaded.memory_bytes, footprint.grown)
        if candidate.need_from == "deployment":
            held = {d: max(held.get(d, 0), n) for d, n in {**held, **candidate.takes}.items()}
        self._account.settle(entry, held)
        entry.known[candidate.place] = held
        for device in held:
            free = self._account.free(device)
            if free is not None and free < 0:
                logger.warning(
                    "model %r takes %s on %s, %s more than there is room for: set its memory: in "
                    "the deployment, or raise the budget",
                    entry.config.model_id,
                    format_size(held[device]),
                    device,
                    format_size(-free),
                )

    # ── unloading ────────────────────────────────────────────────────────────────────────────

    async def unload(self, entry: ModelEntry) -> dict[str, int]:
        """Unload a model that nobody holds, and see what came back.

        :returns: bytes that did not, by device.
        :raises EngineRoomError: the handler failed; what it held is given back in the account,
            except for what was measured to be missing.
        """
        loaded, handler = entry.loaded, entry.handler
        assert loaded is not None and handler is not None
        entry.loaded = entry.handler = None
        if entry.files is not None:
            entry.files.stop()
        held = self._account.holding(entry)
        devices = {"cpu", *held}
        lost: dict[str, int] = {}
        try:
            with self._interval() as undisturbed:
                before = await self.in_thread(lambda: self._used(devices))
                try:
                    await typed(
                        handler,
                        "unload_model",
                        entry.config.model_id,
                        lambda: handler.unload_model(loaded),
                    )
                finally:
                    after = await self.in_thread(lambda: self._used(devices))
                    if undisturbed() and entry.variant is not None:
                        footprint = entry.footprints.get(entry.variant, Footprint())
                        lost = footprint.unloaded(_difference(after, before))
        finally:
            self._account.release(entry, lost)
            for device, amount in lost.items():
                logger.warning(
                    "model %r did not give back %s on %s; it counts as taken",
                    entry.config.model_id,
                    format_size(amount),
                    device,
                )
        return lost

    def _look(
        self, devices: Iterable[str], config: ModelConfig
    ) -> tuple[Mapping[str, int], tuple[FileStamp, ...]]:
        return self._used(devices), file_stamps(config.source)

    def _used(self, devices: Iterable[str]) -> Mapping[str, int]:
        """What is used beside processes that are no model's, whichever runtime they belong to."""
        without: set[int] = set()
        for handler in self._handlers:
            try:
                without.update(handler.runtime_processes())
            except BaseException as error:  # noqa: BLE001 - foreign code
                log_failure(
                    logger,
                    error,
                    "handler %r: runtime_processes failed; what they take counts for the model",
                    handler.name,
                )
        return self._probe.used(devices, without)


async def typed(
    handler: InferenceHandler, method: str, model_id: str, call: Callable[[], Awaitable[Any]]
) -> Any:
    """Call foreign code; whatever it raises comes out typed, with its traceback in the log."""
    with Border(logger, f"handler {handler.name!r}: {method}", model_id):
        return await call()


async def _give_back(handler: InferenceHandler, loaded: LoadedModel) -> None:
    """Unload what nobody got; a failure is logged, because another error is on its way."""
    try:
        await typed(handler, "unload_model", loaded.model_id, lambda: handler.unload_model(loaded))
    except EngineRoomError as error:
        logger.error("giving back model %r failed: %s", loaded.model_id, error.describe())


def _difference(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    return {device: amount - before[device] for device, amount in after.items() if device in before}


def _none_left(config: ModelConfig, errors: Sequence[EngineRoomError]) -> EngineRoomError:
    if len(errors) == 1:
        return errors[0]
    message = (
        f"none of the {len(errors)} variants of model {config.model_id!r} can be loaded: "
        + "; ".join(error.message for error in errors)
    )
    kinds = {type(error) for error in errors}
    kind: type[EngineRoomError] = ConfigurationError
    if len(kinds) == 1:
        kind = kinds.pop()
    elif any(issubclass(k, ResourceNotAvailableError) for k in kinds):
        kind = ResourceNotAvailableError  # another time there may be room
    error = kind(message, model_id=config.model_id)
    error.__cause__ = errors[0]
    return error
