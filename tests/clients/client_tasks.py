"""What every client asks: a tool with few answers, and a form with few values.

A model of 135 million parameters says nothing clever; that it says what fits is the server's doing.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

CITIES = ("Paris", "Rome", "Oslo")
ASK = "How is the weather in Paris?"
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": list(CITIES)},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
FUNCTION: dict[str, Any] = {
    "name": "weather",
    "description": "How the weather is in a city",
    "parameters": PARAMETERS,
}
OTHER: dict[str, Any] = {
    "name": "time_in",
    "description": "What time it is in a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": list(CITIES)}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
RESULT = "sunny, 21 degrees"


class Weather(BaseModel):
    """How the weather is."""

    model_config = ConfigDict(extra="forbid")  # else a schema lets more fields follow
    city: Literal["Paris", "Rome", "Oslo"]
    sunny: bool
    degrees: Literal[0, 10, 20, 30]


class Place(BaseModel):
    """Where it is."""

    model_config = ConfigDict(extra="forbid")
    city: Literal["Paris", "Rome", "Oslo"]


def fits(name: str, arguments: dict[str, Any]) -> bool:
    """Whether a call is one that the tools allow."""
    if arguments.get("city") not in CITIES:
        return False
    if name == "weather":
        return set(arguments) == {"city", "days"} and 1 <= arguments["days"] <= 9
    return name == "time_in" and set(arguments) == {"city"}
