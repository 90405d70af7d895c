"""Conversations into prompts, with the model's own template, in a sandbox.

A template comes with a model file, so from anyone: it is Jinja in the immutable sandbox, as in
transformers, whose names and filters it may use.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NoReturn

from engineroom import ChatMessage, ConfigurationError

__all__ = ["ChatTemplate"]


class _RefusedError(Exception):
    """What ``raise_exception`` in a template raises."""


class ChatTemplate:
    """A compiled chat template.

    :param source: the Jinja source.
    :param tokens: special tokens that templates may name, e.g. ``bos_token``.
    :raises ConfigurationError: the source is not valid.
    """

    def __init__(self, source: str, tokens: dict[str, str]) -> None:
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _strftime_now
        self._tokens = tokens
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ConfigurationError(f"the chat template is not valid: {error}") from error

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """The prompt for the assistant's next message.

        :raises ConfigurationError: the template refuses these messages (roles in an order that
            the model does not know, most often), or fails.
        """
        from jinja2 import TemplateError

        plain: list[dict[str, Any]] = [m.model_dump(exclude_none=True) for m in messages]
        roles = " → ".join(message.role for message in messages)
        try:
            return self._template.render(messages=plain, add_generation_prompt=True, **self._tokens)
        except _RefusedError as error:
            raise ConfigurationError(
                f"the model's chat template refuses these messages: {error} (roles: {roles}); "
                "change their roles or their order"
            ) from error
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise ConfigurationError(
                f"the model's chat template fails on these messages (roles: {roles}): "
                f"{type(error).__name__}: {error}; send prompt= instead, or set the option "
                "chat_template"
            ) from error


def _refuse(message: str) -> NoReturn:
    raise _RefusedError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    # Jinja's own filter escapes for HTML, which a prompt is not.
    return json.dumps(value, ensure_ascii=False, indent=indent)
