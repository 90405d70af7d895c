"""``engineroom run``: one prompt, one answer."""

from __future__ import annotations

import sys
from enum import StrEnum
from functools import partial
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
from engineroom.cli.answer import answer
from engineroom.cli.answer_writer import CUT_CALL
from engineroom.cli.flags import CONFIG_OPTION, MODEL_ARGUMENT, TEMPERATURE_FLAG, flag
from engineroom.cli.interrupt import run_interruptible
from engineroom.cli.output import CommandError, say, warning_line, write_document
from engineroom.cli.parameters import (
    make_params,
    make_request,
    parse_bias,
    parse_options,
    read_prompt,
)
from engineroom.cli.resolve import resolve, warn_of_quarantined
from engineroom.cli.settings import Settings
from engineroom.cli.stats import stats_line
from engineroom.errors import EngineRoomError
from engineroom.schemas import InferenceResponse

__all__ = ["RUN_EPILOG", "run"]

RUN_EPILOG: Final = """\b
Examples:
  engineroom run ./model.gguf "Why is the sky blue?"
  engineroom run -c deployment.yaml smollm2 "A haiku, please" --greedy
  git diff | engineroom run smollm2 --system "Write a commit message"
  engineroom run hf:owner/name:model.gguf --file question.txt --max-new-tokens none
  engineroom run ./model.gguf "2 + 2 =" --raw -o n_ctx=2048 --json
  engineroom run smollm2 "Invent a person" --schema person.json
  engineroom run smollm2 "Is it raining in Bern?" --tools tools.json --tool-choice required
"""


class OnUnsupportedChoice(StrEnum):
    """What to do about a parameter that the runtime does not honour."""

    ERROR = "error"
    WARN = "warn"


def run(  # one parameter a flag: that is how typer is told of them
    ctx: typer.Context,
    model: Annotated[str, MODEL_ARGUMENT],
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT", help="The prompt; without it or with '-': standard input."
        ),
    ] = None,
    config: Annotated[Path | None, CONFIG_OPTION] = None,
    file: Annotated[
        Path | None, flag("Read the prompt from this file.", "--file", "-f", metavar="FILE")
    ] = None,
    system: Annotated[
        str | None, flag("A system message before the prompt.", "--system", "-s", metavar="TEXT")
    ] = None,
    raw: Annotated[
        bool, flag("Send the prompt as it stands, without the model's chat template.", "--raw")
    ] = False,
    max_new_tokens: Annotated[
        str | None,
        flag(
            "Most tokens to generate, or 'none': until the context is full.  [default: 256]",
            "--max-new-tokens",
            "-n",
            metavar="N|none",
        ),
    ] = None,
    temperature: Annotated[float | None, TEMPERATURE_FLAG] = None,
    top_p: Annotated[
        float | None, flag("Keep the likeliest tokens of this probability, 0 to 1.", "--top-p")
    ] = None,
    top_k: Annotated[int | None, flag("Keep the k likeliest tokens; 0: all.", "--top-k")] = None,
    min_p: Annotated[
        float | None,
        flag("Keep tokens at least this fraction as likely as the likeliest.", "--min-p"),
    ] = None,
    repetition_penalty: Annotated[
        float | None, flag("From 1 (none).", "--repetition-penalty")
    ] = None,
    presence_penalty: Annotated[float | None, flag("-2 to 2.", "--presence-penalty")] = None,
    frequency_penalty: Annotated[float | None, flag("-2 to 2.", "--frequency-penalty")] = None,
    logit_bias: Annotated[
        list[str] | None,
        flag("Add to a token's logit; may be repeated.", "--logit-bias", metavar="TOKEN=BIAS"),
    ] = None,
    seed: Annotated[int | None, flag("The same seed, the same answer.", "--seed")] = None,
    greedy: Annotated[bool, flag("Always take the likeliest token.", "--greedy")] = False,
    num_beams: Annotated[int | None, flag("Beams to search with.", "--num-beams")] = None,
    early_stopping: Annotated[
        bool,
        flag("With beams: end with the first complete candidates.", "--early-stopping"),
    ] = False,
    logprobs: Annotated[
        int | None,
        flag("Report log probabilities with this many alternatives; needs --json.", "--logprobs"),
    ] = None,
    stop: Annotated[
        list[str] | None,
        flag("End before this text; may be repeated.", "--stop", metavar="TEXT"),
    ] = None,
    schema: Annotated[Path | None, SCHEMA_FLAG] = None,
    tools: Annotated[Path | None, TOOLS_FLAG] = None,
    tool_choice: Annotated[str | None, TOOL_CHOICE_FLAG] = None,
    reasoning: Annotated[ReasoningChoice | None, REASONING_FLAG] = None,
    timeout: Annotated[
        float | None,
        flag("Give up after so long, loading included.", "--timeout", metavar="SECONDS"),
    ] = None,
    runtime: Annotated[
        str | None,
        flag(
            "Load the source with this runtime, whatever its format.", "--runtime", metavar="NAME"
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        flag(
            "An option of the runtime for a source, its value in YAML; may be repeated.",
            "--option",
            "-o",
            metavar="KEY=VALUE",
        ),
    ] = None,
    on_unsupported: Annotated[
        OnUnsupportedChoice | None,
        flag(
            "What to do about parameters that the runtime does not honour.  [default: as the "
            "deployment says, or error]",
            "--on-unsupported",
        ),
    ] = None,
    as_json: Annotated[
        bool, flag("Print the final response as one JSON object, nothing else.", "--json")
    ] = False,
    stats: Annotated[
        bool | None,
        flag("Sum up on standard error.  [default: if that is a terminal]", "--stats/--no-stats"),
    ] = None,
) -> None:
    """Answer one prompt; the text is streamed.

    MODEL is looked up in this order: (1) an id or alias of the deployment file; (2) a source:
    hf:owner/name[:file], package:module/file, the path of a file or folder, or whatever else an
    installed runtime takes. A folder that is called like a model is reached as ./name. --runtime
    and --option say how to load a source; for a model, the deployment file says it.

    The prompt goes to the model as a chat message, in the model's own template; --raw sends it
    as it stands. One that begins with a dash goes after --. Ctrl-C stops the work.

    What the model thinks before it answers is shown dimmed on standard error, if that is a
    terminal. Calls of tools follow the text, each as a line of JSON.
    """
    settings: Settings = ctx.obj
    if logprobs is not None and not as_json:
        raise CommandError("--logprobs are shown by --json only; add --json")
    of_templates = {"--system": system, "--tools": tools, "--reasoning": reasoning}
    for name, value in of_templates.items() if raw else ():
        if value is not None:
            raise CommandError(
                f"{name} needs the chat template, and --raw leaves it out; give one of them"
            )
    asked = agent_fields(tools, tool_choice, reasoning)
    params = make_params(
        {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
            "logit_bias": parse_bias(logit_bias or []),
            "seed": seed,
            "do_sample": False if greedy else None,
            "num_beams": num_beams,
            "early_stopping": early_stopping or None,
            "logprobs": logprobs,
            "structured_output": read_schema(schema),
        }
    )
    options = parse_options(option or [])
    # Before the prompt is read: what is refused anyway should not wait for standard input.
    build = partial(
        make_request,
        raw=raw,
        system=system,
        params=params,
        stream=not as_json,
        stop_sequences=stop or None,
        timeout_s=timeout,
        on_unsupported=on_unsupported.value if on_unsupported is not None else None,
    )
    build("model", "", **asked.given())
    try:
        target = resolve(model, config, runtime, options)
        warn_of_quarantined(target.registry)
        request = build(target.model_id, read_prompt(prompt, file, raw=raw), **asked.given())
        response = run_interruptible(
            lambda: answer(target, request, show_progress=not settings.logging)
        )
    except EngineRoomError as error:
        if as_json:
            write_document(_failure(model, error).model_dump_json())
        raise
    for warning in response.warnings:
        warning_line(warning)
    if response.cut_call:
        warning_line(CUT_CALL.format("--max-new-tokens"))
    if as_json:
        write_document(response.model_dump_json())
    if (failure := _error_of(response)) is not None:
        raise failure
    if stats or (stats is None and not as_json and sys.stderr.isatty()):
        say(stats_line(response))


def _failure(model: str, error: EngineRoomError) -> InferenceResponse:
    """The response to a request that never came to be."""
    response = InferenceResponse(
        request_id=error.request_id or "", model_id=model, finish_reason="error"
    )
    response.record_error(error)
    return response


def _error_of(response: InferenceResponse) -> EngineRoomError | None:
    """What made the request fail, as it was raised: with its lines and its traceback."""
    try:
        response.raise_for_error()
    except EngineRoomError as error:
        return error.__cause__ if isinstance(error.__cause__, EngineRoomError) else error
    return None
