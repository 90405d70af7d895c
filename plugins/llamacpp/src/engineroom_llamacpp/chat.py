"""Conversations into prompts, with the model's own template, in a sandbox.

A template comes with a model file, so from anyone: it is Jinja in the immutable sandbox, as in
transformers, whose names and filters it may use, and with bounds (:mod:`.template_sandbox`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

from engineroom import ChatMessage, ConfigurationError

if TYPE_CHECKING:
    from jinja2.ext import Extension

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
        from jinja2.ext import loopcontrols

        from engineroom_llamacpp.template_sandbox import BoundedEnvironment

        environment = BoundedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _generation()]
        )
        environment.add_filter("tojson", _to_json)
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _strftime_now
        self._tokens = tokens
        self._environment = environment
        try:
            self._template = environment.compiled(source)
        except Exception as error:  # syntax errors of Jinja's, and of the Python it makes
            raise ConfigurationError(f"the chat template is not valid: {error}") from error

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """The prompt for the assistant's next message.

        :raises ConfigurationError: the template refuses these messages (roles in an order that
            the model does not know, most often), or fails.
        """
        plain: list[dict[str, Any]] = [m.model_dump(exclude_none=True) for m in messages]
        roles = " → ".join(message.role for message in messages)
        self._environment.begin()
        try:
            prompt = self._template.render(
                messages=plain,
                add_generation_prompt=True,
                tools=None,  # not there, as opposed to undefined, which is not none
                documents=None,
                **self._tokens,
            )
            prompt.encode()  # a template may write what UTF-8 has no bytes for
        except _RefusedError as error:
            raise ConfigurationError(
                f"the model's chat template refuses these messages: {error} (roles: {roles}); "
                "change their roles or their order"
            ) from error
        except Exception as error:  # it is foreign code, and may fail in any way
            raise ConfigurationError(
                f"the model's chat template fails on these messages (roles: {roles}): "
                f"{type(error).__name__}: {error}; send prompt= instead, or set the option "
                "chat_template"
            ) from error
        return prompt


def _refuse(message: str) -> NoReturn:
    raise _RefusedError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which a prompt is not. Arguments as in transformers.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


@cache
def _generation() -> type[Extension]:
    """The tag that marks, for training, what the assistant wrote; its body is written as it is."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return Generation
