"""From flags to the contract's schemas, with messages that name the flags."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import ValidationError

from engineroom.cli.output import CommandError
from engineroom.schemas import ChatMessage, GenerationParams, InferenceRequest

__all__ = ["make_params", "make_request", "parse_bias", "parse_options", "read_prompt"]

_FLAGS: Final = {
    "do_sample": "--greedy",
    "stop_sequences": "--stop",
    "timeout_s": "--timeout",
    "structured_output": "--schema",
    "messages": "the prompt",
    "prompt": "the prompt",
}
_MAX_SHOWN: Final = 80


def make_params(flags: Mapping[str, Any]) -> GenerationParams:
    """The parameters of these flags; a flag that is ``None`` was not given.

    :raises CommandError: a value is out of range; every such flag is named.
    """
    values = {name: value for name, value in flags.items() if value is not None}
    limit = values.get("max_new_tokens")
    if isinstance(limit, str):
        values["max_new_tokens"] = _limit(limit)
    try:
        return GenerationParams.model_validate(values)
    except ValidationError as error:
        raise CommandError(_problems(error)) from error


def make_request(
    model_id: str, text: str, *, raw: bool, system: str | None, **fields: Any
) -> InferenceRequest:
    """The request: the text as it stands, or as a message of a conversation.

    :raises CommandError: something about it is refused.
    """
    try:
        if raw:
            return InferenceRequest(model_id=model_id, prompt=text, **fields)
        messages = [] if system is None else [_message("system", system, "--system")]
        messages.append(_message("user", text, "the prompt"))
        return InferenceRequest(model_id=model_id, messages=messages, **fields)
    except ValidationError as error:
        raise CommandError(_problems(error)) from error


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` pairs, their values read as YAML: ``4096``, ``true``, ``[1, 2]``, ``text``.

    :raises CommandError: a pair is no pair, its value no YAML, or a key given twice.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise CommandError(f"--option {pair!r} is not KEY=VALUE; write e.g. -o n_ctx=4096")
        if key in options:
            raise CommandError(f"--option {key} is given twice; give it once")
        try:
            options[key] = YAML(typ="safe", pure=True).load(value)
        except YAMLError as error:
            raise CommandError(
                f"--option {key}: {value!r} is not a YAML value; quote it inside of the "
                f"argument if it is text: -o '{key}=\"…\"'"
            ) from error
    return options


def parse_bias(pairs: Sequence[str]) -> dict[int, float] | None:
    """``TOKEN=BIAS`` pairs; ``None`` for none."""
    try:
        return {int(t): float(b) for t, _, b in (pair.partition("=") for pair in pairs)} or None
    except ValueError as error:
        raise CommandError(
            "--logit-bias takes a token id and a number, as in --logit-bias 42=-100"
        ) from error


def read_prompt(prompt: str | None, file: Path | None, *, raw: bool) -> str:
    """The prompt: the argument, the file's text, or what comes on standard input.

    A chat message loses the line break at its end, which editors and ``echo`` add.

    :raises CommandError: there is none, or more than one, or it is no UTF-8 text.
    """
    if file is not None and prompt is not None:
        raise CommandError("PROMPT and --file were both given; give one of them")
    if prompt not in (None, "-"):
        assert prompt is not None
        return prompt
    if file is not None and str(file) != "-":
        where = f"the file {str(file)!r}"
        try:
            data = file.expanduser().read_bytes()
        except OSError as error:
            raise CommandError(
                f"--file {str(file)!r} cannot be read: {error.strerror}; check the path", 1
            ) from error
    else:
        where = "standard input"
        asked = prompt == "-" or file is not None
        if sys.stdin is None or (sys.stdin.isatty() and not asked):
            raise CommandError(
                "there is no prompt; give it as an argument, with --file FILE, or on standard "
                'input: engineroom run MODEL "Hello", or echo Hello | engineroom run MODEL'
            )
        buffer = getattr(sys.stdin, "buffer", None)
        data = buffer.read() if buffer is not None else sys.stdin.read().encode()
    try:
        text: str = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CommandError(
            f"the prompt in {where} is not UTF-8 text (byte {error.start + 1} of {len(data)}); "
            "convert it, for example with iconv -t UTF-8",
            1,
        ) from error
    if not text.strip():
        raise CommandError(f"the prompt in {where} is empty; there is nothing to answer", 1)
    return text if raw else text.removesuffix("\n").removesuffix("\r")


def _message(role: Literal["system", "user"], text: str, said: str) -> ChatMessage:
    try:
        return ChatMessage(role=role, content=text)
    except ValidationError as error:  # lone surrogates: bytes that the shell could not decode
        raise CommandError(f"{said} is not valid text; check its encoding") from error


def _limit(text: str) -> int | None:
    if text.lower() == "none":
        return None
    try:
        return int(text)
    except ValueError as error:
        raise CommandError(
            f"--max-new-tokens takes a whole number from 0, or 'none' for no limit but the "
            f"context, not {text!r}"
        ) from error


def _problems(error: ValidationError) -> str:
    """All that is refused, on one line, under the names that the command line has."""
    problems: list[str] = []
    for problem in error.errors(include_url=False):
        field = str(problem["loc"][0]) if problem["loc"] else ""
        flag = _FLAGS.get(field, f"--{field.replace('_', '-')}") if field else "the request"
        message = problem["msg"].removeprefix("Value error, ")
        value = problem.get("input")
        shown = f" (it is {value!r})" if isinstance(value, int | float | str) else ""
        if len(shown) > _MAX_SHOWN:
            shown = f"{shown[:_MAX_SHOWN]}…)"
        hint = "; 'none' means no limit" if field == "max_new_tokens" else ""
        problems.append(f"{flag}: {message[:1].lower()}{message[1:]}{shown}{hint}")
    return "; ".join(problems)
