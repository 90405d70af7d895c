"""``engineroom chat``: a conversation in the terminal, in process or with a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from engineroom.cli.agent_flags import (
    REASONING_FLAG,
    SCHEMA_FLAG,
    TOOL_CHOICE_FLAG,
    TOOLS_FLAG,
    ReasoningChoice,
    agent_fields,
    read_schema,
)
from engineroom.cli.chat_session import ChatSession
from engineroom.cli.chat_talkers import LocalTalker, ServerTalker, Talker
from engineroom.cli.flags import CONFIG_OPTION, OPTION_FLAG, RUNTIME_FLAG, TEMPERATURE_FLAG, flag
from engineroom.cli.output import CommandError
from engineroom.cli.parameters import make_params, make_request, parse_options
from engineroom.cli.resolve import resolve, warn_of_quarantined

__all__ = ["CHAT_EPILOG", "chat"]

CHAT_EPILOG: Final = """\b
Examples:
  engineroom chat ./model.gguf
  engineroom chat -c deployment.yaml smollm2 --system "Answer briefly."
  engineroom chat --url http://127.0.0.1:8000 default
  engineroom chat smollm2 --tools tools.json

\b
In the conversation:
  /help                 what there is
  /model NAME           talk to another model; the conversation goes on
  /system TEXT          set the system message; without TEXT: take it out
  /params KEY=VALUE …   set parameters; without: show them
  /new                  begin anew
  /save FILE            write the conversation as JSON
  /quit                 leave, as Ctrl-D does

\b
A line that ends with a backslash goes on in the next one; lines between two lines of
\"\"\" are one message. Ctrl-C stops the answer, and not the conversation. With --tools you are
the tools: each call is shown, and the next message is what it returns.
"""


def chat(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A model of the deployment, or a source; with --url, a model of the server.",
        ),
    ] = None,
    config: Annotated[Path | None, CONFIG_OPTION] = None,
    url: Annotated[
        str | None, flag("Talk to the server at this URL.", "--url", metavar="URL")
    ] = None,
    key: Annotated[
        str | None,
        flag("The server's API key.", "--key", metavar="KEY", envvar="ENGINEROOM_API_KEY"),
    ] = None,
    system: Annotated[str | None, flag("A system message.", "--system", "-s")] = None,
    max_new_tokens: Annotated[
        str | None,
        flag(
            "Most tokens of an answer, or 'none'.  [default: 1024]",
            "--max-new-tokens",
            "-n",
            metavar="N|none",
        ),
    ] = None,
    temperature: Annotated[float | None, TEMPERATURE_FLAG] = None,
    seed: Annotated[int | None, flag("The same seed, the same answer.", "--seed")] = None,
    schema: Annotated[Path | None, SCHEMA_FLAG] = None,
    tools: Annotated[Path | None, TOOLS_FLAG] = None,
    tool_choice: Annotated[str | None, TOOL_CHOICE_FLAG] = None,
    reasoning: Annotated[ReasoningChoice | None, REASONING_FLAG] = None,
    runtime: Annotated[str | None, RUNTIME_FLAG] = None,
    option: Annotated[list[str] | None, OPTION_FLAG] = None,
) -> None:
    """Talk with a model. The answers are streamed, and what was said is remembered."""
    params = {
        "max_new_tokens": max_new_tokens or "1024",
        "temperature": temperature,
        "seed": seed,
        "structured_output": read_schema(schema),
    }
    asked = agent_fields(tools, tool_choice, reasoning)
    # What is wrong is told before anything is loaded.
    make_request("model", "", raw=False, system=system, params=make_params(params), **asked.given())
    talker: Talker
    if url is not None:
        if config is not None or runtime is not None or option:
            raise CommandError("--config, --runtime and --option do not go with --url")
        talker = ServerTalker(url, key)
        model = model or "default"
    else:
        if model is None:
            raise CommandError("give a MODEL, or a server with --url URL")
        options = parse_options(option or [])
        target = resolve(model, config, runtime, options)
        warn_of_quarantined(target.registry)
        talker = LocalTalker(target)
        model = target.model_id
    with talker:
        ChatSession(talker, model, system, params, asked).run()
