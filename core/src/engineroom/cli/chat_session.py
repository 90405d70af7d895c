"""The conversation of ``engineroom chat``: lines in, answers out, and what ``/`` does."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from engineroom.cli.chat_talkers import Talker
from engineroom.cli.chunks import ChunkWriter
from engineroom.cli.output import CommandError, error_line, say, write
from engineroom.cli.parameters import make_params, parse_options
from engineroom.config.suggestions import did_you_mean
from engineroom.errors import EngineRoomError
from engineroom.schemas import ChatMessage, GenerationParams
from engineroom.tools import ToolCall

__all__ = ["ChatSession"]

_PROMPT: Final = "> "
_MORE: Final = ". "
_FENCE: Final = '"""'
_HELP: Final = """\
/model NAME           talk to another model; the conversation goes on
/system TEXT          set the system message; without TEXT: take it out
/params KEY=VALUE …   set parameters, "none" for none; without: show them
/new                  begin anew
/save FILE            write the conversation as JSON
/quit                 leave, as Ctrl-D does
A line that ends with a backslash goes on; lines between two lines of \"\"\" are one message."""


class ChatSession:
    """One conversation.

    :param talker: answers it.
    :param model: the model that it begins with.
    :param system: the system message.
    :param params: parameters that were given, under their names.
    :param tools: that the model may call; their results are lines of the input.
    """

    def __init__(
        self,
        talker: Talker,
        model: str,
        system: str | None,
        params: Mapping[str, Any],
        tools: Sequence[Any] | None = None,
    ) -> None:
        self._talker = talker
        self._tools = tools
        self._called: list[ToolCall] = []  # whose results are to come
        self._model = model
        self._system = system
        self._chosen = {name: value for name, value in params.items() if value is not None}
        self._said: list[ChatMessage] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "help": self._help,
            "model": self._set_model,
            "new": self._new,
            "params": self._set_params,
            "save": self._save,
            "system": self._set_system,
        }

    def run(self) -> None:
        """Talk until the input ends."""
        if sys.stdin is not None and sys.stdin.isatty():
            say(f"{self._model}: /help shows what there is, Ctrl-D leaves")
        lines = _Lines()
        while (text := self._message(lines)) is not None:
            if text.strip() in ("/quit", "/exit"):
                return
            try:
                self._take(text)
            except KeyboardInterrupt:  # between one thing and the next
                write("\n")

    def _take(self, text: str) -> None:
        if text.startswith("/") and "\n" not in text:
            self._command(text)
        elif text.strip():
            self._ask(text)

    # ── input ────────────────────────────────────────────────────────────────────────────────

    def _message(self, lines: _Lines) -> str | None:
        """The next message, of one line or more; ``None`` at the end."""
        try:
            first = lines.read(_PROMPT)
            if first is None or (not first.endswith("\\") and first.strip() != _FENCE):
                return first
            return "\n".join(_rest(first, lines))
        except KeyboardInterrupt:  # forgets the line, as shells do
            write("\n")
            return ""

    # ── output ───────────────────────────────────────────────────────────────────────────────

    def _ask(self, text: str) -> None:
        try:
            question = self._line(text)
        except ValidationError:
            error_line("the line is not valid text; check its encoding")
            return
        if question.role == "tool":
            self._called.pop(0)
            if self._called:
                self._said.append(question)
                self._ask_for_result()
                return
        messages = [*self._said, question]
        if self._system is not None:
            messages.insert(0, ChatMessage(role="system", content=self._system))
        writer = ChunkWriter()
        stopped = False
        answer = self._talker.answer(self._model, messages, self._params(), self._tools)
        try:
            for chunk in answer:
                writer.write(chunk)
        except KeyboardInterrupt:
            stopped = True
        except EngineRoomError as error:
            writer.end_line()
            error_line(error)
            return  # the question is not part of the conversation: it can be asked again
        finally:
            with suppress(KeyboardInterrupt):
                answer.close()
        if stopped:
            write("\n")
            say("(stopped)")
        else:
            writer.write_calls()
        if (said := writer.message()) is not None:
            self._said += [question, said]
            self._called = writer.calls
            if self._called:
                self._ask_for_result()

    def _line(self, text: str) -> ChatMessage:
        """What a line is: the result of a call that waits for one, or what the user says."""
        if not self._called:
            return ChatMessage(role="user", content=text)
        call = self._called[0]
        return ChatMessage(role="tool", content=text, name=call.name, tool_call_id=call.id)

    def _ask_for_result(self) -> None:
        say(f"what does {self._called[0].name} give back?")

    def _params(self) -> GenerationParams:
        return make_params(self._chosen)

    # ── commands ─────────────────────────────────────────────────────────────────────────────

    def _command(self, text: str) -> None:
        name, _, rest = text[1:].strip().partition(" ")
        command = self._commands.get(name)
        if command is None:
            near = did_you_mean(name, list(self._commands)) or "; /help lists them"
            error_line(f"there is no /{name}{near}")
            return
        try:
            command(rest.strip())
        except (EngineRoomError, CommandError, OSError) as error:
            error_line(error if isinstance(error, EngineRoomError) else str(error))

    def _help(self, rest: str) -> None:
        say(_HELP)

    def _set_model(self, rest: str) -> None:
        known = self._talker.models()
        if not rest:
            say("\n".join(f"{'*' if name == self._model else ' '} {name}" for name in known))
        elif rest not in known:
            near = did_you_mean(rest, known) or f" (models: {', '.join(known)})"
            raise CommandError(f"there is no model {rest!r}{near}")
        else:
            self._model = rest
            say(f"model: {rest}")

    def _set_system(self, rest: str) -> None:
        self._system = rest or None
        say(f"system: {rest}" if rest else "no system message")

    def _set_params(self, rest: str) -> None:
        if rest:
            changed = dict(self._chosen)
            for name, value in parse_options(rest.split()).items():
                if name not in GenerationParams.model_fields:
                    near = did_you_mean(name, list(GenerationParams.model_fields))
                    raise CommandError(f"there is no parameter {name!r}{near}")
                changed.pop(name, None)
                if value not in (None, "none") or name == "max_new_tokens":
                    changed[name] = "none" if value is None else value
            make_params(changed)
            self._chosen = changed
        shown = self._params().model_dump(include=set(self._chosen))
        say(" ".join(f"{name}={value}" for name, value in shown.items()) or "all as they are")

    def _new(self, rest: str) -> None:
        self._said.clear()
        self._called.clear()
        say("a new conversation")

    def _save(self, rest: str) -> None:
        if not rest:
            raise CommandError("/save wants the name of a file")
        path = Path(rest).expanduser()
        if path.exists():
            raise CommandError(f"{rest!r} exists; give another name")
        system = [] if self._system is None else [ChatMessage(role="system", content=self._system)]
        saved = {
            "model": self._model,
            "params": self._params().model_dump(include=set(self._chosen)),
            "messages": [m.model_dump(exclude_none=True) for m in [*system, *self._said]],
        }
        text = json.dumps(saved, indent=2, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")
        say(f"saved to {os.fspath(path)}")


def _rest(line: str, lines: _Lines) -> Iterator[str]:
    """The lines of a message that has several."""
    if line.strip() == _FENCE:
        while (line_ := lines.read(_MORE)) is not None and line_.strip() != _FENCE:
            yield line_
        return
    while line.endswith("\\"):
        yield line[:-1]
        line = lines.read(_MORE) or ""
    yield line


class _Lines:
    """Lines of input: with history and editing on a terminal, plain elsewhere."""

    def __init__(self) -> None:
        self._session: Any = None
        self._terminal = sys.stdin is not None and sys.stdin.isatty()
        if self._terminal:
            with suppress(ImportError):
                from prompt_toolkit import PromptSession
                from prompt_toolkit.history import InMemoryHistory

                self._session = PromptSession(history=InMemoryHistory())

    def read(self, prompt: str) -> str | None:
        """The next line without its end; ``None`` after the last one.

        :raises KeyboardInterrupt: Ctrl-C.
        """
        if self._session is not None:
            try:
                return str(self._session.prompt(prompt))
            except EOFError:
                return None
        if sys.stdin is None:
            return None
        if self._terminal:
            write(prompt)
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None
