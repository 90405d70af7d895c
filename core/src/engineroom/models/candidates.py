"""What it takes to load a model: its variants, their handlers, their memory. Blocks.

Everything here may read files and import plugins, so the manager calls it in a thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from engineroom.border import get_logger, log_failure, without_frames
from engineroom.config.model import ModelConfig
from engineroom.errors import EngineRoomError
from engineroom.handlers.base import InferenceHandler
from engineroom.handlers.registry import HandlerRegistry
from engineroom.status import VariantOutcome, VariantResult

__all__ = ["Candidate", "find_candidates"]

logger = get_logger("engineroom.survey")

NeedFrom = Literal["deployment", "measured", "estimate", "unknown"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A variant of a model and what it needs.

    :param place: its place among the model's variants, from 0.
    :param config: the model with this variant's source, runtime and options.
    :param handler: what would load it; ``None``: nothing, for the reason in ``error``.
    :param takes: bytes by device; empty where they are not known.
    :param need_from: who says so: the deployment, an earlier load, or the handler's estimate.
    :param need: what has to be free for it: less than ``takes`` where some of that was left behind
        by itself, and is in the account already.
    """

    place: int
    config: ModelConfig
    handler: InferenceHandler | None = None
    takes: Mapping[str, int] = field(default_factory=dict)
    need_from: NeedFrom = "unknown"
    need: Mapping[str, int] = field(default_factory=dict)
    error: EngineRoomError | None = None

    @property
    def source(self) -> str:
        """Where it comes from, as the deployment says it."""
        return self.config.source or ""

    @property
    def runtime(self) -> str | None:
        """The name of what would load it; ``None``: nothing, and the deployment names nothing."""
        return self.config.runtime if self.handler is None else self.handler.name

    def outcome(self, result: VariantResult, reason: str = "") -> VariantOutcome:
        """What became of it."""
        return VariantOutcome(self.source, self.runtime, result, reason)


def find_candidates(
    registry: HandlerRegistry, config: ModelConfig, known: Mapping[int, Mapping[str, int]]
) -> list[Candidate]:
    """Every variant of a model, in order of preference.

    :param known: what variants were seen to hold when they were loaded before, by place.
    """
    return [
        _candidate(registry, place, choice, known.get(place))
        for place, choice in enumerate(config.choices())
    ]


def _candidate(
    registry: HandlerRegistry, place: int, config: ModelConfig, known: Mapping[str, int] | None
) -> Candidate:
    try:
        handler = registry.select_loader(config)
        if config.memory is not None:
            return Candidate(place, config, handler, dict(config.memory), "deployment")
        if known is not None:
            return Candidate(place, config, handler, dict(known), "measured")
        estimate = _estimate(handler, config)
    except EngineRoomError as error:
        return Candidate(place, config, error=without_frames(config.without_secrets(error)))
    if estimate is None:
        return Candidate(place, config, handler)
    return Candidate(place, config, handler, estimate, "estimate")


def _estimate(handler: InferenceHandler, config: ModelConfig) -> dict[str, int] | None:
    """The handler's own; one that fails or makes no sense is logged, and counts for nothing."""
    try:
        estimate: object = handler.estimate_memory(config)
    except EngineRoomError:
        raise  # no such file, a wrong option: the load would say the same
    except BaseException as error:  # noqa: BLE001 - foreign code
        log_failure(
            logger,
            error,
            "handler %r: estimate_memory failed for model %r; its memory is not known",
            handler.name,
            config.model_id,
        )
        return None
    if estimate is None:
        return None
    if isinstance(estimate, Mapping) and all(
        isinstance(d, str) and isinstance(n, int) and not isinstance(n, bool) and n >= 0
        for d, n in estimate.items()
    ):
        return dict(estimate)
    logger.error(
        "handler %r: estimate_memory returned %r for model %r instead of bytes by device",
        handler.name,
        estimate,
        config.model_id,
    )
    return None
