"""Conversations into prompts, with the model's own chat template, in a sandbox.

A template comes with a model, so from anyone: it is Jinja in the immutable sandbox, with the names
and filters that it may use in transformers, and with bounds (:mod:`.template_sandbox`). What shape
of messages it walks is tried when it is loaded. Never render on the event loop; a rendering for
which nobody waits any more stops (:func:`.work.check_stopped`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cache
from itertools import product, repeat
from typing import TYPE_CHECKING, Any, Final, NoReturn

from engineroom.errors import ConfigurationError
from engineroom.generation.format_choice import find_format, find_reasoning
from engineroom.generation.tool_formats import GENERIC
from engineroom.generation.traits import ModelTraits
from engineroom.prompts.chat_options import ChatOptions
from engineroom.prompts.messages import for_template
from engineroom.prompts.work import ReadingStoppedError
from engineroom.schemas import ChatMessage
from engineroom.thinking import REASONING_NAMES

if TYPE_CHECKING:
    from jinja2.ext import Extension

__all__ = ["ChatTemplate", "ModelTemplates"]

_PROBE: Final = "90817263545362718"
"""Digits: filters leave them alone."""
_CALLS: Final[list[dict[str, Any]]] = [
    {
        "id": f"call_{_PROBE}_{name}",
        "type": "function",
        "function": {"name": f"probe_{name}", "arguments": json.dumps({"probe": _PROBE})},
    }
    for name in ("one", "two")
]
_SHAPES: Final = ("short_ids", "empty_content", "text_arguments")
"""Of messages with calls, the ones that are tried last first."""
_HELLO: Final = (ChatMessage(role="user", content="a"),)
TAIL: Final = 64
"""Characters of a prompt's end that tell where the answer begins."""
_NO_PARAMETERS: Final = {"type": "object", "properties": {}, "required": []}
_SHOWN_ROLES: Final = 20
"""Of a conversation that is refused."""
_SHOWN: Final = 500
"""Characters of what a template says when it refuses."""


class _RefusedError(Exception):
    """What ``raise_exception`` in a template raises."""


class ChatTemplate:
    """A compiled chat template.

    :param source: the Jinja source.
    :param tokens: special tokens that templates may name, e.g. ``bos_token``.
    :param defaults: more names that it may use, where a request does not say otherwise.
    :raises ConfigurationError: the source is not valid.
    """

    def __init__(
        self, source: str, tokens: Mapping[str, str], defaults: Mapping[str, Any] | None = None
    ) -> None:
        try:
            from jinja2.ext import loopcontrols

            from engineroom.prompts.template_sandbox import BoundedEnvironment
        except ImportError as error:
            raise ConfigurationError(
                f'chat templates need Jinja ({error}); pip install "engineroom[prompts]"'
            ) from error

        environment = BoundedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _generation()]
        )
        environment.add_filter("tojson", _to_json)
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _strftime_now
        self.source = source
        self._tokens = tokens
        self._defaults = dict(defaults or {})
        self._environment = environment
        try:
            self._template = environment.compiled(source)
        except Exception as error:  # syntax errors of Jinja's, and of the Python it makes
            raise ConfigurationError(f"the chat template is not valid: {error}") from error
        self.takes_tools = False
        self.knows_system = True
        self.omits_calls = False
        """It writes nothing of the calls in a message: the model would see results alone."""
        self._shape: dict[str, bool] = {}
        self._endless = False
        try:
            self._probe()
        except OverflowError:
            self._endless = True  # each request is told

    @property
    def parts(self) -> bool:
        """The template walks ``content`` as a list of parts."""
        return self._shape.get("parts", False)

    def conversation(self, messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
        """The messages in the shape that this template walks."""
        return for_template(messages, **self._shape)

    def render(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[dict[str, Any]] | None = None,
        **template_args: Any,
    ) -> str:
        """The prompt for the assistant's next message. Takes seconds at most, on the CPU.

        :param template_args: more names that the template may use.
        :raises ConfigurationError: the template refuses these messages (roles in an order that
            the model does not know, most often), fails, or exceeds the sandbox's bounds.
        """
        return self.write(self.conversation(messages), tools, template_args)

    def write(
        self,
        conversation: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        template_args: Mapping[str, Any] | None = None,
    ) -> str:
        """:meth:`render`, of messages that are in the template's shape already."""
        self._environment.begin()
        return self._write(conversation, {**(template_args or {}), "tools": tools or None})

    def _write(self, conversation: Sequence[dict[str, Any]], more: Mapping[str, Any]) -> str:
        names = {
            **self._tokens,
            "add_generation_prompt": True,
            "documents": None,  # not there, as opposed to undefined, which is not none
            **self._defaults,
            **more,
            "messages": conversation,
        }
        try:
            prompt = self._template.render(names)
            prompt.encode()  # a template may write what UTF-8 has no bytes for
        except ReadingStoppedError:
            raise
        except Exception as error:  # it is foreign code, and may fail in any way
            roles = _roles(conversation)
            why = _short(error)
            if isinstance(error, _RefusedError):
                raise ConfigurationError(
                    f"the model's chat template refuses these messages: {why} (roles: {roles}); "
                    "change their roles or their order"
                ) from error
            raise ConfigurationError(
                f"the model's chat template fails on these messages (roles: {roles}): "
                f"{type(error).__name__}: {why}; send prompt= instead, or set the option "
                "chat_template"
            ) from error
        return prompt

    def tried(
        self, messages: Sequence[ChatMessage], tools: Sequence[dict[str, Any]] | None = None
    ) -> str:
        """What the template makes of a conversation; empty: it refuses it, or takes too long."""
        if self._endless:
            return ""
        self._environment.begin()
        try:
            shape = self._shape | {"single_calls": False}  # how several look is what is tried
            return self._tried(for_template(messages, **shape), tools) or ""
        except OverflowError:
            self._endless = True
            return ""

    def _probe(self) -> None:
        """Try in which shape a message's text, and a call's arguments, get through; in the bounds
        of one rendering.
        """
        self._environment.begin()
        self._shape["parts"] = not self._shows_text() and self._shows_text(parts=True)
        self._try_calls()
        self.takes_tools = self._shows_tools()
        self.knows_system = self._shows_system()

    def _try_calls(self) -> None:
        for results, any_prompt, *flags in product((True, False), *repeat((False, True), 4)):
            shape = self._shape | dict(zip(_SHAPES, flags, strict=True))
            prompt = self._with_calls(shape, _CALLS[:1], results=results)
            empty = shape["empty_content"] and not any_prompt
            if prompt is not None and (not empty or "probe_one" in prompt):
                self._shape = shape
                break
        else:
            return
        if "probe_one" not in (prompt or ""):
            offered = [{"type": "function", "function": {"name": "f", "description": ""}}]
            again = self._with_calls(self._shape, _CALLS[:1], results=results, tools=offered)
            self.omits_calls = "probe_one" not in (again or "")
        together, apart = (self._shows_both_calls(single=single) for single in (False, True))
        self._shape["single_calls"] = apart and not together

    def _shows_both_calls(self, *, single: bool) -> bool:
        prompt = self._with_calls(self._shape | {"single_calls": single}, _CALLS) or ""
        return all(call["function"]["name"] in prompt for call in _CALLS)

    def _with_calls(
        self,
        shape: Mapping[str, bool],
        calls: Sequence[dict[str, Any]],
        *,
        results: bool = True,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> str | None:
        turns = [
            ChatMessage(role="user", content=_PROBE),
            ChatMessage(role="assistant", tool_calls=list(calls)),
        ]
        if results:
            turns += [
                ChatMessage(role="tool", tool_call_id=call["id"], content="a") for call in calls
            ]
        return self._tried(for_template(turns, **shape), tools)

    def _shows_text(self, *, parts: bool = False) -> bool:
        def content(text: str) -> Any:
            return [{"type": "text", "text": text}] if parts else text

        user = {"role": "user", "content": content(_PROBE)}
        system = {"role": "system", "content": content("")}
        return any(_PROBE in (self._tried(turns) or "") for turns in ([user], [system, user]))

    def _shows_tools(self) -> bool:
        function = {"name": f"f{_PROBE}", "description": "", "parameters": _NO_PARAMETERS}
        tool = {"type": "function", "function": function}
        turns = self.conversation([ChatMessage(role="user", content="a")])
        return f"f{_PROBE}" in (self._tried(turns, [tool]) or "")

    def _shows_system(self) -> bool:
        system = ChatMessage(role="system", content=_PROBE)
        turns = self.conversation([system, ChatMessage(role="user", content="a")])
        return _PROBE in (self._tried(turns) or "")

    def _tried(
        self, conversation: list[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None
    ) -> str | None:
        try:
            return self._write(conversation, {"tools": tools})
        except ConfigurationError as error:
            if isinstance(error.__cause__, OverflowError):
                raise error.__cause__ from None
            return None


class ModelTemplates:
    """The chat templates of one model: its own, or the one that an option sets instead.

    :param options: with a Jinja source, or the name of one of the model's own templates; or that
        alone.
    :param own: the model's template, or several by name: ``default``, and ``tool_use``.
    :param tokens: special tokens that templates may name.
    :param warn: told where the model's own template is not valid; the model is usable without.
    :raises ConfigurationError: the template of the option is not valid, or a format is not known.
    """

    def __init__(
        self,
        options: ChatOptions | str | None,
        own: str | Mapping[str, str] | None,
        tokens: Mapping[str, str],
        warn: Callable[[ConfigurationError], None],
    ) -> None:
        if not isinstance(options, ChatOptions):
            options = ChatOptions(chat_template=options)
        option, defaults = options.chat_template, options.chat_template_kwargs
        self._missing = "the model has no chat template"
        self._templates: dict[str, ChatTemplate] = {}
        sources = dict(own) if isinstance(own, Mapping) else {"default": own} if own else {}
        if option is not None:
            sources = {"default": sources.get(option, option)}
        for name, source in sources.items():
            try:
                self._templates[name] = ChatTemplate(source, tokens, defaults)
            except ConfigurationError as error:
                if option is not None:
                    raise
                warn(error)
                self._missing = f"the model has no chat template that can be used: {error.message}"
        self.traits: Final = self._find_traits(options.tool_format, options.reasoning_format)
        """What the model writes beside content, and what its template can be told."""

    def _find_traits(self, tool_format: str | None, reasoning_format: str | None) -> ModelTraits:
        template = self._templates.get("default")
        calling = self._templates.get("tool_use") or template
        source = "" if template is None else template.source
        reasoning = find_reasoning(source, reasoning_format)
        form, native = GENERIC, False
        if calling is not None:
            form = find_format(calling.source, calling.tried, tool_format)
            native = calling.takes_tools and form is not GENERIC
        elif tool_format is not None:
            form = find_format(None, None, tool_format)
        tail = "" if template is None else template.tried(_HELLO)[-TAIL:]
        told = any(name in source for name in REASONING_NAMES)
        return ModelTraits(form, native, reasoning, tail, told)

    def choose(self, tools: Sequence[dict[str, Any]] | None = None) -> ChatTemplate:
        """The template for a conversation, with these tools or without.

        :raises ConfigurationError: there is none.
        """
        template = self._templates.get("tool_use") if tools else None
        template = template or self._templates.get("default")
        if template is None:
            raise ConfigurationError(
                f"{self._missing}; send prompt= instead of messages=, or set the option "
                "chat_template"
            )
        return template


def _roles(conversation: Sequence[Mapping[str, Any]]) -> str:
    """The roles of a conversation, in order; of a long one those of its beginning."""
    roles = [str(message["role"]) for message in conversation[:_SHOWN_ROLES]]
    more = len(conversation) - len(roles)
    return " → ".join(roles) + (f" → … {more} more" if more else "")


def _refuse(message: str) -> NoReturn:
    raise _RefusedError(_short(message))


def _short(message: object) -> str:
    """What a template says, which may be all of a conversation."""
    text = str(message)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


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
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
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
