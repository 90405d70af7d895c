"""The rules that a handler keeps: one for each check. Needs no pytest.

``test_some_rule`` checks the rule ``some-rule``, whose paragraph is
``docs/plugin-rules.md#rule-some-rule``. Here is what each rule says, not how it is checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from engineroom.testing.conformance.rules.answers import CHAT, PARAMETERS, TEXT, TOKEN_IDS
from engineroom.testing.conformance.rules.concurrency import CANCELLATION, CONCURRENCY, FAULTS
from engineroom.testing.conformance.rules.handlers import (
    DISCOVERY,
    EMBEDDINGS,
    HYGIENE,
    RANKING,
)
from engineroom.testing.conformance.rules.rule import PAGE, Rule, rule_page

__all__ = ["PAGE", "RULES", "Rule", "rule_page"]

RULES: Final[Mapping[str, Rule]] = {
    **DISCOVERY,
    **TEXT,
    **PARAMETERS,
    **CONCURRENCY,
    **CANCELLATION,
    **FAULTS,
    **CHAT,
    **TOKEN_IDS,
    **EMBEDDINGS,
    **RANKING,
    **HYGIENE,
}
"""Every rule, by its id."""
