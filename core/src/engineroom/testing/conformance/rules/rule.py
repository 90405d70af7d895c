"""What a rule is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["PAGE", "Rule", "rule_page"]

PAGE: Final = "docs/plugin-rules.md"


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule.

    :param title: what it is about, in a few words.
    :param text: what a handler does, in one sentence.
    """

    title: str
    text: str


def rule_page(rule_id: str) -> str:
    """Where the rule is explained."""
    return f"{PAGE}#rule-{rule_id}"
