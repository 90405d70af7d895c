"""The conversation of ``engineroom chat``: lines in, answers out, and what ``/`` does."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from engineroom.cli.agent_flags import AgentFields
from engineroom.cli.answer_writer import CUT_CALL, AnswerWriter
from engineroom.cli.chat_talkers import Talker
from engineroom.cli.output import CommandError, error_line, say, warning_line, write
from engineroom.cli.parameters import make_params, parse_options
from engineroom.config.suggestions import did_you_mean
from engineroom.errors import EngineRoomError
from engineroom.printable import printable
from engineroom.schemas import ChatMessage, GenerationParams

__all__ = ["ChatSession"]

_PROMPT: Final = "> "
_MORE: Final = ". "
_FENCE: Final = '"""'
_LEAVE: Final = ("/quit", "/exit")
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
    :param asked: tools and reasoning of every answer.
    """

    def __init__(
        self,
        talker: Talker,
        model: str,
        system: str | None,
        params: Mapping[str, Any],
        asked: AgentFields,
    ) -> None:
        self._talker = talker
        self._model = model
        self._system = system
        self._chosen = {name: value for name, value in params.items() if value is not None}
        self._asked = asked
        self._said: list[ChatMessage] = []
        self._left = False
        self._lines = _Lines()
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
        while (text := self._message(_PROMPT)) is not None:
            if text.strip() in _LEAVE:
                return
            try:
                self._take(text)
                if self._left:
                    return
            except KeyboardInterrupt:  # between one thing and the next
                write("\n")

    def _take(self, text: str) -> None:
        if text.startswith("/") and "\n" not in text:
            self._command(text)
        elif text.strip():
            self._ask(text)

    # ── input ────────────────────────────────────────────────────────────────────────────────

    def _message(self, prompt: str) -> str | None:
        """The next message, of one line or more; ``None`` at the end."""
        try:
            first = self._lines.read(prompt)
            if first is None or (not first.endswith("\\") and first.strip() != _FENCE):
                return first
            return "\n".join(_rest(first, self._lines))
        except KeyboardInterrupt:  # forgets the line, as shells do
            write("\n")
            return ""

    # ── output ───────────────────────────────────────────────────────────────────────────────

    def _ask(self, text: str) -> None:
        try:
            question = ChatMessage(role="user", content=text)
        except ValidationError:
            error_line("the line is not valid text; check its encoding")
            return
        turn: list[ChatMessage] = [question]
        asked = self._asked
        while (answer := self._answer([*self._said, *turn], asked)) is not None:
            turn.append(answer)
            asked = self._asked.after_results()
            if not answer.tool_calls:
                break
            if (results := self._results(answer)) is None:
                return  # a call without its result is no conversation that a model knows
            turn += results
        # A question that was not answered is not part of it: it can be asked again.
        self._said += turn if answer is not None else []

    def _answer(self, said: list[ChatMessage], asked: AgentFields) -> ChatMessage | None:
        """Show the answer; ``None``: there was none."""
        if self._system is not None:
            said.insert(0, ChatMessage(role="system", content=self._system))
        writer = AnswerWriter()
        stopped = False
        answer = self._talker.answer(self._model, said, self._params(), asked)
        try:
            for chunk in answer:
                writer.write(chunk)
        except KeyboardInterrupt:
            stopped = True
        except EngineRoomError as error:
            writer.end_line()
            error_line(error)
            return None
        finally:
            with suppress(KeyboardInterrupt):
                answer.close()
        calls = [] if stopped else writer.calls
        writer.end_line(asked=False)
        if writer.content or not calls:
            write("\n")
        if stopped:
            say("(stopped)")
        elif writer.cut_call:
            warning_line(CUT_CALL.format("/params max_new_tokens=N"))
        if not (writer.content or calls):
            return None
        return ChatMessage(
            role="assistant",
            content=writer.content or None,
            tool_calls=[call.as_message() for call in calls] or None,
        )

    def _results(self, answer: ChatMessage) -> list[ChatMessage] | None:
        """What the calls return, as whoever is at the keyboard says; ``None``: the turn ended."""
        results = []
        for call in answer.tool_calls or ():
            name = call["function"]["name"]
            say(f"{name}({call['function']['arguments']})")
            if (text := self._result(f"{printable(name)} returns> ")) is None:
                return None
            try:
                result = ChatMessage(role="tool", content=text, tool_call_id=call["id"], name=name)
            except ValidationError:
                error_line("the line is not valid text; check its encoding")
                return None
            results.append(result)
        return results

    def _result(self, prompt: str) -> str | None:
        """The next message that is no command; ``None``: there is none for this turn."""
        while (text := self._message(prompt)) is not None:
            word = text.strip().partition(" ")[0]
            if word in _LEAVE:
                self._left = True
                return None
            if "\n" in text or word not in {f"/{name}" for name in self._commands}:
                return text
            self._command(text.strip())
            if word == "/new":
                return None
        return None

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
        params = self._params()
        shown = params.model_dump(include=set(self._chosen))
        if params.structured_output is not None:
            shown["structured_output"] = params.structured_output.kind
        say(" ".join(f"{name}={value}" for name, value in shown.items()) or "all as they are")

    def _new(self, rest: str) -> None:
        self._said.clear()
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
            "params": self._params().model_dump(include=set(self._chosen), exclude_none=True),
            **self._asked.given(),
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
