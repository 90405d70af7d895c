"""Which handler takes a model, and why each of the others does not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from engineroom.border import get_logger, log_failure, words
from engineroom.config.model import LoadedModel, ModelConfig
from engineroom.handlers.base import HandlerHealth, InferenceHandler
from engineroom.handlers.discovery import HANDLER_GROUP, PluginRecord, install_hint

__all__ = ["DispatchReport", "HandlerVerdict", "ask", "explain", "health_of"]

logger = get_logger("engineroom.registry")

Question: TypeAlias = Literal["can_handle", "can_load"]
Verdict: TypeAlias = Literal[
    "chosen", "yes", "no", "error", "found", "active", "disabled", "not listed", "unavailable",
    "quarantined"
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class HandlerVerdict:
    """What one handler says to one model, and why.

    :param verdict: ``chosen`` (the first that said yes), ``yes`` (it would, but one before it
        did), ``no``, ``error`` (its answer was a defect), or why it was not asked.
    """

    handler: str
    verdict: Verdict
    reason: str


@dataclass(frozen=True, slots=True)
class DispatchReport:
    """Every handler, its verdict and its reason, in the order of consultation.

    :param question: ``can_handle`` for a loaded model, ``can_load`` for one that is not.
    :param chosen: name of the handler that is used; ``None``: there is none.
    :param notes: what became of each of a model's variants, where it was loaded.
    """

    model_id: str
    question: Question
    verdicts: tuple[HandlerVerdict, ...]
    chosen: str | None
    notes: tuple[str, ...] = ()

    @property
    def reasons(self) -> str:
        """Every verdict and its reason on one line; without any handler, what to install."""
        if not self.verdicts:
            return f"none is installed; {install_hint()}"
        return "; ".join(f"{v.handler}: {v.verdict}, {v.reason}" for v in self.verdicts)

    def __str__(self) -> str:
        lines = [f"{self.model_id}: {self.question} → {self.chosen or 'no handler'}"]
        lines += [f"  {v.handler}: {v.verdict} ({v.reason})" for v in self.verdicts]
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)


def explain(
    model: LoadedModel | ModelConfig,
    handlers: Sequence[InferenceHandler],
    plugins: Iterable[PluginRecord] = (),
) -> DispatchReport:
    """Ask every handler, and say which is used and why each of the others is not.

    :param plugins: installed plugins; those that could not be asked end the report.
    """
    question: Question = "can_handle" if isinstance(model, LoadedModel) else "can_load"
    runtime = model.runtime if isinstance(model, ModelConfig) else None
    chosen: str | None = None
    verdicts: list[HandlerVerdict] = []
    for handler in handlers:
        answer, reason = ask(handler, question, model, runtime)
        verdict: Verdict = "no"
        if answer and chosen is None:
            chosen, verdict = handler.name, "chosen"
            if isinstance(model, LoadedModel) and (note := _health_note(handler, model)):
                reason = f"{reason}; {note}"
        elif answer:
            verdict, reason = "yes", f"{reason}, but {chosen!r} comes first"
        elif answer is None:
            verdict = "error"
        verdicts.append(HandlerVerdict(handler.name, verdict, reason))
    asked = {v.handler for v in verdicts}
    verdicts += [
        HandlerVerdict(
            plugin.name, plugin.status, "; ".join(filter(None, (plugin.reason, plugin.remedy)))
        )
        for plugin in plugins
        if plugin.group == HANDLER_GROUP
        and plugin.status not in ("active", "found")
        and plugin.name not in asked
    ]
    return DispatchReport(model.model_id, question, tuple(verdicts), chosen)


def ask(
    handler: InferenceHandler,
    question: Question,
    model: LoadedModel | ModelConfig,
    runtime: str | None = None,
) -> tuple[bool | None, str]:
    """The handler's answer and its reason; ``None`` where the answer is a defect.

    :param runtime: the handler that the model names, which makes asking superfluous.
    """
    if runtime is not None:
        return handler.name == runtime, f"the model names runtime {runtime!r}"
    try:
        answer = getattr(handler, question)(model)
    except BaseException as error:  # noqa: BLE001 - foreign code
        log_failure(logger, error, "handler %r: %s raised; it counts as no", handler.name, question)
        return None, f"{question} raised {words(error)}; mend the plugin"
    if isinstance(answer, bool):
        return answer, f"{question} is {answer}"
    kind = type(answer).__name__
    logger.error(
        "handler %r: %s returned %r instead of True or False; it counts as no",
        handler.name,
        question,
        kind,
    )
    return None, f"{question} returned {kind} instead of a bool; mend the plugin"


def health_of(handler: InferenceHandler, model: LoadedModel) -> HandlerHealth:
    """How the model's engine is doing; one that cannot tell is not well."""
    try:
        health: object = handler.health(model)
    except BaseException as error:  # noqa: BLE001 - foreign code
        log_failure(logger, error, "handler %r: health failed for %r", handler.name, model.model_id)
        return HandlerHealth(ok=False, detail=f"health raised {type(error).__name__}; see the log")
    if isinstance(health, HandlerHealth):
        return health
    kind = type(health).__name__
    return HandlerHealth(ok=False, detail=f"health returned {kind} instead of HandlerHealth")


def _health_note(handler: InferenceHandler, model: LoadedModel) -> str:
    """What the handler has to say of a model that is well."""
    health = health_of(handler, model)
    return health.detail if health.ok else f"it is not well: {health.detail}"
