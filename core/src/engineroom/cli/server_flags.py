"""Flags made of the server's settings: each limit is said once, in ``ServerSettings``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields
from inspect import Parameter
from typing import Annotated, Any, TypeVar, get_origin, get_type_hints

import typer

from engineroom.server.settings import ServerSettings

__all__ = ["settings_of", "with_server_flags"]

_Command = TypeVar("_Command", bound=Callable[..., None])


def with_server_flags(shown_behind: Mapping[str, Sequence[str]]) -> Callable[[_Command], _Command]:
    """Give a command a flag for each of the server's settings, in the place of its ``**flags``.

    :param shown_behind: a setting's name → parameters of the command that ``--help`` shows behind
        it. The command's others come first.
    """

    def extended(command: _Command) -> _Command:
        own = dict(inspect.signature(command, eval_str=True).parameters)
        behind = {name: [own[n] for n in names] for name, names in shown_behind.items()}
        placed = {parameter.name for group in behind.values() for parameter in group}
        parameters = [
            parameter
            for name, parameter in own.items()
            if name not in placed and parameter.kind is not Parameter.VAR_KEYWORD
        ]
        hints = get_type_hints(ServerSettings)
        for setting in fields(ServerSettings):
            if setting.metadata.get("flag"):
                flag = _flag(setting, hints[setting.name])
                parameters += [flag, *behind.get(setting.name, ())]
        command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in parameters]
        )
        return command

    return extended


def settings_of(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that flags were given for, by their fields' names."""
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in flags.items()
        if value is not None
    }


def _flag(setting: Field[Any], kind: Any) -> Parameter:
    """A parameter as typer reads it. Without the flag the setting's own default stands."""
    name = setting.name.removesuffix("_s").removesuffix("_bytes")
    text, default = setting.metadata["text"], setting.default
    absent = None
    if kind is bool:
        absent = False
    elif get_origin(kind) is tuple:
        kind, name = list[str], name.removesuffix("s")
    elif default is not None:
        shown = f"{default:g}" if isinstance(default, float) else default
        text = f"{text}  [default: {shown}]"
    flag = "--" + name.replace("_", "-")
    option = typer.Option(flag, help=text, metavar=setting.metadata["metavar"], show_default=False)
    hint = kind if kind is bool else kind | None
    return Parameter(
        setting.name, Parameter.KEYWORD_ONLY, default=absent, annotation=Annotated[hint, option]
    )
