"""Whether the last message of a conversation is continued, in the words of the APIs for it."""

from __future__ import annotations

from collections.abc import Sequence

from engineroom.schemas import ChatMessage
from engineroom.server.http.errors import ApiError

__all__ = ["asked_to_continue"]


def asked_to_continue(
    messages: Sequence[ChatMessage],
    *,
    continue_final_message: bool | None,
    add_generation_prompt: bool | None,
    prefixes: Sequence[int],
) -> bool | None:
    """What a request for a chat says of it; ``None``: nothing.

    :param continue_final_message: vLLM's and transformers' word for it.
    :param add_generation_prompt: their word for the opposite.
    :param prefixes: numbers of the messages that are said to be a prefix of the answer, as
        DeepSeek's and Mistral's APIs call it.
    :raises ApiError: 400: these contradict each other, or there is nothing to be continued.
    """
    words = {
        "continue_final_message": continue_final_message,
        "add_generation_prompt": None
        if add_generation_prompt is None
        else not add_generation_prompt,
        f"messages.{prefixes[0]}.prefix" if prefixes else "prefix": True if prefixes else None,
    }
    said = {name: word for name, word in words.items() if word is not None}
    if len({*said.values()}) > 1:
        names = " and ".join(said)
        raise ApiError(
            400,
            f"{names} contradict each other: the last message is continued, or a new one begins",
            "invalid_value",
            next(iter(said)).partition(".")[0],
        )
    if not any(said.values()):
        return False if said else None
    name, last = next(iter(said)), len(messages) - 1
    if wrong := [number for number in prefixes if number != last]:
        name = f"messages.{wrong[0]}.prefix"
    if wrong or messages[-1].role != "assistant":
        shown = "false" if name == "add_generation_prompt" else "true"
        raise ApiError(
            400,
            f"{name}: {shown} asks for a message to be continued, which can only be the last one, "
            "and only the assistant's",
            "invalid_value",
            name.partition(".")[0],
        )
    if messages[-1].tool_calls:
        raise ApiError(
            400,
            f"{name}: the last message has tool calls, behind which no text goes on; send their "
            "results",
            "invalid_value",
            name.partition(".")[0],
        )
    return True
