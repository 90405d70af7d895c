"""Of a value that may be of several kinds, what is wrong by the nearest one is told."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from engineroom.config.mistakes import mistakes


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Text(Strict):
    type: Literal["text"]
    text: str


class Image(Strict):
    type: Literal["image"]
    url: str
    detail: int = 0


class Whole(Strict):
    content: str | list[Text] | None = None
    parts: list[Text | Image] = []
    place: Literal["auto", "none"] | dict[str, int | str] | None = None
    ratio: int | Literal["auto"] = 1
    tagged: Annotated[Text | Image, Field(discriminator="type")] | None = None
    made: Annotated[Text | None, BeforeValidator(lambda v: {"type": v} if v else v)] = None
    keys: dict[str, int] = {}


NO_INTEGER = "Input should be a valid integer, unable to parse string as an integer"
A_DICTIONARY = "a valid dictionary or instance"


def told(value: dict[Any, Any]) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        Whole.model_validate(value)
    return [f"{'.'.join(map(str, m.loc))}: {m.message}" for m in mistakes(caught.value, value)]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"content": 5}, ["content: Input should be a valid string or a valid list"]),
        ({"content": [{"type": "text"}]}, ["content.0.text: Field required"]),
        (
            {"content": [{"type": "image", "text": 3}, 7]},
            [
                "content.0.type: Input should be 'text'",
                "content.0.text: Input should be a valid string",
                "content.1: Input should be a valid dictionary or instance of Text",
            ],
        ),
        (
            {"parts": [{"type": "image", "url": "u", "detail": "x"}, {"type": "text"}]},
            [f"parts.0.detail: {NO_INTEGER}", "parts.1.text: Field required"],
        ),
        (
            {"parts": [3]},
            [f"parts.0: Input should be {A_DICTIONARY} of Text or {A_DICTIONARY} of Image"],
        ),
        (
            {"place": "cpu"},
            ["place: Input should be 'auto' or 'none' or a valid dictionary"],
        ),
        (
            {"place": {"a": [1]}},
            ["place.a: Input should be a valid integer or a valid string"],
        ),
        (
            {"ratio": "half"},
            [f"ratio: {NO_INTEGER} or 'auto'"],
        ),
        ({"tagged": {"type": "text"}}, ["tagged.text.text: Field required"]),
        ({"made": "text"}, ["made.text: Field required"]),
        ({"keys": {3: 1}}, ["keys.3: Input should be a valid string"]),
        (
            {"content": 5, "other": 1, "parts": 3},
            [
                "content: Input should be a valid string or a valid list",
                "parts: Input should be a valid list",
                "other: Extra inputs are not permitted",
            ],
        ),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_one_message_for_each_place(value: dict[Any, Any], said: list[str]) -> None:
    assert told(value) == said


def test_where_it_may_be_any_of_them_each_is_told_by_name() -> None:
    assert told({"parts": [{"kind": "text"}]}) == [
        "parts.0.Text.type: Field required",
        "parts.0.Text.text: Field required",
        "parts.0.Text.kind: Extra inputs are not permitted",
        "parts.0.Image.type: Field required",
        "parts.0.Image.url: Field required",
        "parts.0.Image.kind: Extra inputs are not permitted",
    ]
