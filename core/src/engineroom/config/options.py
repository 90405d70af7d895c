"""The ``options:`` of a model, checked against a runtime's own schema."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ValidationError

from engineroom.config.mistakes import mistakes
from engineroom.config.model import ModelConfig
from engineroom.config.suggestions import did_you_mean, known_keys
from engineroom.errors import ConfigurationError

__all__ = ["parse_options", "problems"]

_M = TypeVar("_M", bound=BaseModel)


def parse_options(schema: type[_M], config: ModelConfig) -> _M:
    """Check a model's options.

    :param schema: a pydantic model with ``extra="forbid"``.
    :raises ConfigurationError: on one line, all mistakes at once, each with its key; for an
        unknown key the nearest known one.
    """
    try:
        return schema.model_validate(config.options)
    except ValidationError as error:
        raise ConfigurationError(
            f"options of model {config.model_id!r}: {problems(error, config.options, schema)}",
            model_id=config.model_id,
        ) from error


def problems(error: ValidationError, value: object, schema: type[BaseModel] | None = None) -> str:
    """A pydantic error on one line: ``key: what is wrong; key: what is wrong``.

    :param value: what was validated.
    :param schema: where the nearest known key is looked for.
    """
    lines = []
    for mistake in mistakes(error, value):
        key = ".".join(str(part) for part in mistake.loc)
        message = " ".join(mistake.message.split())
        if mistake.kind == "extra_forbidden":
            message = "there is no such key"
            known = known_keys(schema, mistake.raw) if schema is not None else []
            if known:
                message += did_you_mean(str(mistake.loc[-1]), known) or (
                    f"; there are {', '.join(known)}"
                )
        lines.append(f"{key}: {message}" if key else message)
    return "; ".join(lines)
