"""The suite that a plugin's tests derive from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import pytest

from engineroom.testing.conformance.base import explain
from engineroom.testing.conformance.calls import CallChecks
from engineroom.testing.conformance.cancellation import CancellationChecks
from engineroom.testing.conformance.chat import ChatChecks
from engineroom.testing.conformance.concurrency import ConcurrencyChecks
from engineroom.testing.conformance.discovery import DiscoveryChecks
from engineroom.testing.conformance.embeddings import EmbeddingChecks
from engineroom.testing.conformance.faults import FaultChecks
from engineroom.testing.conformance.forms import FormChecks
from engineroom.testing.conformance.grammars import GrammarChecks
from engineroom.testing.conformance.hygiene import HygieneChecks
from engineroom.testing.conformance.limits import LimitChecks
from engineroom.testing.conformance.outcomes import BrokenRuleError
from engineroom.testing.conformance.overriding import reason_of
from engineroom.testing.conformance.parameters import ParameterChecks
from engineroom.testing.conformance.ranking import RankingChecks
from engineroom.testing.conformance.text import TextChecks
from engineroom.testing.conformance.thoughts import ReasoningChecks
from engineroom.testing.conformance.token_ids import TokenIdChecks

__all__ = ["CHECKS", "HandlerConformance"]


# pytest collects the checks of the last base first.
class HandlerConformance(
    HygieneChecks,
    EmbeddingChecks,
    RankingChecks,
    ReasoningChecks,
    ChatChecks,
    TokenIdChecks,
    FaultChecks,
    CancellationChecks,
    ConcurrencyChecks,
    GrammarChecks,
    CallChecks,
    FormChecks,
    LimitChecks,
    ParameterChecks,
    TextChecks,
    DiscoveryChecks,
):
    """Everything that engineroom asks of a handler, as tests.

    .. code-block:: python

        class TestMyHandler(HandlerConformance):
            handler_class = MyHandler

            @pytest.fixture(scope="class")
            def model_config(self, tmp_path_factory):
                return ModelConfig(model_id="tiny", source=..., options={...})

    One model is loaded for the class; a few checks load one of their own. What the handler can
    do is read from its ``capabilities()``; a check that does not apply is skipped with its
    reason. Each failure says which rule is broken and where that is explained.

    What a suite may set:

    ``handler_class`` or ``handler_name``
        the handler's class, or the name under which it is installed.
    ``prompt``
        a prompt that the model continues with a text of some length.
    ``timeout_s``
        seconds for one answer, one chunk or one load; what takes longer hangs. Real models need
        more than the toys that the default is for.
    ``max_stall_s``
        seconds for which the event loop may be held up at most.
    ``load_cycles``
        how often the model is loaded and unloaded to see what stays.
    ``batch_invariant``
        ``False`` where other requests in the batch change the last digits of a logit (quantised
        or half-precision weights): a greedy text beside others may then part from the one alone
        where log probabilities tell a near tie, by the noise that company makes here. Without
        log probabilities beginnings are compared. Texts are tried up to four times.
    ``exclusive``
        ``True`` where two models at once do not fit: the shared one is unloaded meanwhile.
    ``queue_options``
        options with which one request runs and one waits; ``None``: there is no queue.
    ``runtime_modules``
        modules that importing the plugin must not import, besides the well-known runtimes.

    Methods to override: ``make_handler()``, ``render_chat(loaded_model, messages)``,
    ``token_ids(loaded_model, text)``. The fixture ``embedding_config`` names a model that makes
    embeddings, where ``model_config`` makes none, and ``ranking_config`` one that ranks
    documents. A check that is replaced is marked with
    ``@overrides("the reason")``.
    """

    def test_overrides(self) -> None:
        """No check is replaced without a reason."""
        replaced = [
            name
            for name, function in CHECKS.items()
            if (own := getattr(type(self), name, None)) is not function and not reason_of(own)
        ]
        if replaced:
            error = BrokenRuleError(
                did=f"looked at {type(self).__qualname__}",
                expected='@overrides("the reason") on each check that it replaces',
                saw=f"no reason on {', '.join(replaced)}",
            )
            pytest.fail(explain("overrides", error), pytrace=False)


CHECKS: Final[dict[str, Callable[..., Any]]] = {
    name: function
    for base in reversed(HandlerConformance.__mro__)
    for name, function in vars(base).items()
    if name.startswith("test_")
}
"""Every check by the name of its method, in the order in which they are run."""
