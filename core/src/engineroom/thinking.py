"""Whether a model is to think, and how hard, where a request says it in more than one place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

__all__ = ["EFFORTS", "REASONING_NAMES", "contradictions", "told_to_template"]

EFFORTS: Final[Mapping[str, bool | str]] = {"none": False, "xhigh": "high", "max": "high"}
"""Words for efforts that requests have no word of their own for."""
REASONING_NAMES: Final = ("enable_thinking", "thinking", "reasoning_effort")
"""By which templates are told whether the model is to reason, and how hard."""


def told_to_template(template_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """What names for the template say of it: the name → ``True``, ``False`` or an effort."""
    told: dict[str, Any] = {}
    for name in REASONING_NAMES:
        value = (template_args or {}).get(name)
        if name == "reasoning_effort":
            if value is not None:
                told[name] = EFFORTS.get(value, value) if isinstance(value, str) else value
        elif isinstance(value, int):
            told[name] = bool(value)
    return told


def contradictions(wishes: Mapping[str, Any], others: Mapping[str, Any]) -> list[str]:
    """Names of a wish and of another one that it contradicts; none, where they agree.

    :param wishes: ``True``, ``False`` or an effort by name; ``None``: nothing is wished.
    """
    for name, wish in wishes.items():
        for other, value in others.items():
            if wish is not None and value is not None and _differ(wish, value):
                return [name, other]
    return []


def _differ(wish: Any, other: Any) -> bool:
    if wish is False or other is False:
        return wish is not other
    if wish is True or other is True:  # that it thinks at all is no contradiction to how hard
        return False
    return bool(_in_template(wish) != _in_template(other))


def _in_template(effort: Any) -> Any:
    """Templates have no ``minimal``."""
    return "low" if effort == "minimal" else effort
