"""What is known on this side of a request that vLLM's engine has."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Running"]


@dataclass(slots=True)
class Running:
    """A request inside of the engine.

    :param tokens: how many it has.
    :param ids: what vLLM calls the parts of it that it works on.
    :param turn: when its turn comes, in milliseconds, whole ones as vLLM has priorities.
    :param tail: how its prompt ends that a chat template wrote.
    """

    tokens: int
    ids: list[str] = field(default_factory=list)
    turn: int = 0
    tail: str | None = None
    prompt: int = 0
    """How many tokens it came with."""
