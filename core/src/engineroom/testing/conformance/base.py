"""What all checks stand on: the suite's settings, its fixture, and how a check is run."""

from __future__ import annotations

import asyncio
import functools
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Any, ClassVar, Final, NoReturn

import pytest

from engineroom.config.model import LoadedModel, ModelConfig
from engineroom.errors import ConfigurationError
from engineroom.handlers.base import InferenceHandler
from engineroom.handlers.discovery import HANDLER_GROUP, install_hint, installed_plugins
from engineroom.schemas import ChatMessage
from engineroom.testing.conformance.foundations import FOUNDATIONS, Foundation
from engineroom.testing.conformance.kit import Kit, Settings
from engineroom.testing.conformance.outcomes import (
    BrokenRuleError,
    HungError,
    InapplicableError,
    LoopLostError,
    told,
)
from engineroom.testing.conformance.rules import RULES, rule_page

__all__ = ["Checks", "Session", "check", "explain", "foundation"]

Body = Callable[[Any, Kit], Awaitable[None]]

MAX_HUNG: Final = 3
"""After so many checks that hung, the rest is not tried: each would take its whole time."""


def check(
    needs: Foundation | None = "stream-ends", rule: str = ""
) -> Callable[[Body], Callable[..., None]]:
    """A check of the rule that the method is named for.

    The coroutine becomes a plain test function: no plugin of pytest's takes part.

    :param needs: the last of the foundations without which it makes no sense.
    :param rule: the rule, where one coroutine serves several.
    """

    def wrap(body: Body) -> Callable[..., None]:
        if rule:
            body.__name__ = f"test_{rule.replace('-', '_')}"
        name = body.__name__.removeprefix("test_").replace("_", "-")
        assert name in RULES, name

        @functools.wraps(body)
        def test(self: Any, conformance: Session) -> None:
            conformance.perform(name, needs, lambda kit: body(self, kit))

        test.__signature__ = _SIGNATURE  # type: ignore[attr-defined]
        test.__engineroom_check__ = name  # type: ignore[attr-defined]
        return test

    return wrap


def foundation(rule: Foundation) -> Callable[..., None]:
    """The check of a foundation: that has looked before."""

    async def body(self: Any, kit: Kit) -> None: ...

    return check(rule, rule)(body)


def _shape(self: Any, conformance: Session) -> None: ...


_SIGNATURE: Final = __import__("inspect").signature(_shape)


def explain(rule: str, error: BrokenRuleError) -> str:
    """A broken rule as it is told."""
    return (
        f"{RULES[rule].title}: this rule is broken\n"
        f"  did:      {error.did}\n"
        f"  expected: {error.expected}\n"
        f"  saw:      {error.saw}\n"
        f"  rule:     {RULES[rule].text}\n"
        f"  read:     {rule_page(rule)}"
    )


class Session:
    """The state of one suite: its kit, what of its foundations holds, and what ended it."""

    def __init__(self, suite: Checks, selected: frozenset[str]) -> None:
        self._suite = suite
        self._selected = selected
        self._kit: Kit | None = None
        self._laid: dict[str, BrokenRuleError | InapplicableError | None] = {}
        self._reported: set[str] = set()
        self._lost: str | None = None
        self._hung = 0
        self.config: ModelConfig | None = None
        self.embedding_config: ModelConfig | None = None
        self.ranking_config: ModelConfig | None = None
        self.closed = False

    def perform(
        self, rule: str, needs: Foundation | None, body: Callable[[Kit], Awaitable[None]]
    ) -> None:
        """Run a check; what comes of it is told to pytest."""
        if self._lost is not None:
            pytest.fail(f"not checked: {self._lost}", pytrace=False)
        outcome: BaseException | None = None
        try:
            if needs is not None:
                self._lay_foundations(rule, needs)
            if (foundation := self._laid.get(rule)) is not None:
                raise foundation
            self._run(body)
        except (BrokenRuleError, InapplicableError) as error:
            outcome = error
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - told as a failure
            outcome = _unexpected("ran the check", error)
        # Outside of the except: the kit's own traceback would only be in the way.
        if isinstance(outcome, InapplicableError):
            # All skips are told at this line: the rule tells them apart.
            pytest.skip(f"{rule}: {outcome}")
        if isinstance(outcome, BrokenRuleError):
            self._fail(rule, outcome)

    def _lay_foundations(self, rule: str, needs: Foundation) -> None:
        """Lay the foundations up to ``needs``; skip or fail if one does not hold."""
        names = list(FOUNDATIONS)
        for name in names[: names.index(needs) + 1]:
            if name not in self._laid:
                self._laid[name] = self._try(name)
            outcome = self._laid[name]
            if outcome is None or isinstance(outcome, InapplicableError) or name == rule:
                continue
            # Told once: by its own check, if that is run as well, else by the first without it.
            if f"test_{name.replace('-', '_')}" in self._selected:
                raise InapplicableError(f"not checked: {name} is broken, and this stands on it")
            if name in self._reported:
                pytest.fail(f"not checked: {name} is broken, and this stands on it", pytrace=False)
            self._reported.add(name)
            self._fail(name, outcome)

    def _try(self, name: Foundation) -> BrokenRuleError | InapplicableError | None:
        try:
            if name == "handler-is-valid":
                self._make()
            self._run(FOUNDATIONS[name])
        except LoopLostError:
            raise
        except (BrokenRuleError, InapplicableError) as error:
            return error
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - told by its check
            return _unexpected(name, error)
        return None

    def _make(self) -> None:
        assert self.config is not None
        handler = self._suite.make_handler()
        self._kit = Kit(
            handler,
            self.config,
            self._suite.settings(),
            self.embedding_config,
            self.ranking_config,
        )

    def _run(self, body: Callable[[Kit], Awaitable[None]]) -> None:
        kit = self._kit
        if kit is None:
            raise AssertionError("a check without a handler needs none of the kit")
        limit = 25 * kit.settings.timeout_s

        async def work() -> None:
            try:
                await body(kit)
            finally:
                await kit.clean_up()

        kit.loop.run(work(), limit)

    def _fail(self, rule: str, error: BrokenRuleError) -> NoReturn:
        message = explain(rule, error)
        if isinstance(error, LoopLostError):
            self._lost = f"the event loop was lost in the check of {rule}: {error.saw}"
            message += "\n  The loop is lost: no other check can be run after this one."
        elif isinstance(error, HungError):
            self._hung += 1
            if self._hung >= MAX_HUNG:
                self._lost = f"{self._hung} checks hung before, the last one in {rule}"
        pytest.fail(message, pytrace=False)

    def close(self) -> None:
        """Unload the model and end the loop; whatever fails in it was told by a check."""
        self.closed = True
        kit, self._kit = self._kit, None
        if kit is None:
            return
        if self._lost is None:
            with suppress(Exception, asyncio.CancelledError):
                kit.loop.run(kit.close(), 4 * kit.settings.timeout_s)
        kit.loop.close()


def _unexpected(did: str, error: BaseException) -> BrokenRuleError:
    frames = traceback.extract_tb(error.__traceback__)
    last = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return BrokenRuleError(did=did, expected="no exception", saw=told(error) + last)


_STASH: Final = pytest.StashKey[Session]()


class Checks:
    """The suite without its checks; see :class:`HandlerConformance` for the attributes."""

    # A class-scoped fixture written as a plain method is what a suite's model_config is; pytest
    # 9 warns of it, because attributes set on self are lost. None are set.
    pytestmark = [pytest.mark.filterwarnings("ignore:Class-scoped fixtures defined as instance")]  # noqa: RUF012

    handler_class: ClassVar[type[InferenceHandler] | None] = None
    handler_name: ClassVar[str | None] = None
    prompt: ClassVar[str] = "Once upon a time there was a little engine that could, and it said"
    timeout_s: ClassVar[float] = 30.0
    max_stall_s: ClassVar[float] = 1.0
    load_cycles: ClassVar[int] = 20
    batch_invariant: ClassVar[bool] = True
    exclusive: ClassVar[bool] = False
    queue_options: ClassVar[Mapping[str, Any] | None] = {"n_parallel": 1, "max_queue": 1}
    runtime_modules: ClassVar[tuple[str, ...]] = ()

    def make_handler(self) -> InferenceHandler:
        """The handler under test; override it where the class takes arguments."""
        if self.handler_class is not None:
            return self.handler_class()
        if self.handler_name is None:
            raise ConfigurationError(
                f"{type(self).__name__}: say what is tested: handler_class = MyHandler, or "
                'handler_name = "my_runtime"'
            )
        for record in installed_plugins():
            if (record.group, record.name) == (HANDLER_GROUP, self.handler_name):
                assert record.entry_point is not None
                loaded = record.entry_point.load()
                handler: InferenceHandler = loaded() if isinstance(loaded, type) else loaded
                return handler
        raise ConfigurationError(
            f"handler {self.handler_name!r} is not installed; {install_hint(self.handler_name)}"
        )

    def render_chat(self, loaded_model: LoadedModel, messages: list[ChatMessage]) -> str | None:
        """The messages as the model reads them, for a prompt; ``None``: it cannot be told.

        By default ``loaded_model.tokenizer`` is asked, if it has ``apply_chat_template`` (as
        tokenizers of transformers have) or ``render(messages)``.
        """
        tokenizer = loaded_model.tokenizer
        if hasattr(tokenizer, "apply_chat_template"):
            plain = [m.model_dump(exclude_none=True) for m in messages]
            return str(
                tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
            )
        if hasattr(tokenizer, "render"):
            return str(tokenizer.render(messages))
        return None

    def token_ids(self, loaded_model: LoadedModel, text: str) -> Sequence[int] | None:
        """The tokens of a prompt, with those that the model adds; ``None``: they cannot be told.

        By default ``loaded_model.tokenizer`` is asked, if it has ``encode(text)``, as tokenizers
        of transformers have.
        """
        tokenizer = loaded_model.tokenizer
        return list(tokenizer.encode(text)) if hasattr(tokenizer, "encode") else None

    def settings(self) -> Settings:
        """The class attributes."""
        return Settings(**{field.name: getattr(self, field.name) for field in fields(Settings)})

    @pytest.fixture
    def embedding_config(self) -> ModelConfig | None:
        """A model that is made for embeddings, where ``model_config`` is not; ``None``: it is."""
        return None

    @pytest.fixture
    def ranking_config(self) -> ModelConfig | None:
        """A model that ranks documents, where ``model_config`` does not; ``None``: it does."""
        return None

    @pytest.fixture
    def conformance(
        self,
        request: pytest.FixtureRequest,
        model_config: ModelConfig,
        embedding_config: ModelConfig | None,
        ranking_config: ModelConfig | None,
    ) -> Session:
        """The suite's state: made for its first check, ended with its last."""
        owner = request.node.getparent(pytest.Class)
        assert owner is not None
        session: Session | None = owner.stash.get(_STASH, None)
        if session is None or session.closed:
            selected = frozenset(
                getattr(item, "originalname", item.name)
                for item in request.session.items
                if item.parent is owner
            )
            session = owner.stash[_STASH] = Session(self, selected)
            session.config = model_config
            session.embedding_config = embedding_config
            session.ranking_config = ranking_config
            owner.addfinalizer(session.close)
        return session
