"""Checks of messages."""

from __future__ import annotations

from typing import Any

from engineroom.schemas import ChatMessage
from engineroom.testing.conformance.base import Checks, check
from engineroom.testing.conformance.bench import again, is_refusal, said
from engineroom.testing.conformance.kit import Kit
from engineroom.testing.conformance.outcomes import broken, same, skip
from engineroom.testing.conformance.thoughts import traits_of

__all__ = ["ChatChecks"]

_ODD = (
    ("assistant", "user"),
    ("user", "user"),
    ("tool",),
    ("user", "system"),
    ("user", "assistant"),
    ("developer", "user"),
)


class ChatChecks(Checks):
    """Messages instead of a prompt."""

    @check()
    async def test_chat_template(self, kit: Kit) -> None:
        _need_chat(kit)
        await kit.need_determinism()
        conversations = (
            (("user", "Name three rivers."),),
            (("system", "You answer briefly."), ("user", "Name three rivers.")),
            (("user", "Hello."), ("assistant", "Hello, you."), ("user", "Name three rivers.")),
        )
        compared = 0
        for conversation in conversations:
            messages = [ChatMessage(role=r, content=c) for r, c in conversation]
            try:
                rendered = self.render_chat(kit.bench.loaded, messages)
            except Exception:  # noqa: BLE001, S112 - a template that refuses, in its own words
                continue
            if rendered is None:
                skip(
                    "how messages are rendered is not known; write render_chat(loaded_model, "
                    "messages) in the suite"
                )
            request = kit.likely(messages=messages)
            if traits_of(kit).reasoning is not None:
                skip("the model thinks: of a prompt that is text, nothing tells its thoughts")
            texts = await kit.text(kit.likely(rendered)), await kit.text(request)
            same(f"infer({said(request)}), and with prompt={rendered!r}", "the same text", *texts)
            compared += 1
        if not compared:
            skip("the model's template takes none of the kit's conversations")

    @check()
    async def test_chat_roles(self, kit: Kit) -> None:
        _need_chat(kit)
        for roles in _ODD:
            messages = [ChatMessage(role=r, content=f"I am {r}.") for r in roles]
            request = kit.likely(n=2, messages=messages)
            response = await kit.bench.infer(request)
            if response.error_message is None:
                continue
            if not is_refusal(response):
                broken(
                    did=f"infer({said(request)})",
                    expected="an answer, or a ConfigurationError that says what is wrong with the "
                    "roles",
                    saw=f"{response.error_type}: {response.error_message}",
                )
            words = ("role", "message", "messages", "conversation", *roles)
            if not any(word in response.error_message.lower() for word in words):
                broken(
                    did=f"infer({said(request)})",
                    expected="a message that says what is wrong with the roles",
                    saw=response.error_message,
                )

    @check()
    async def test_continued_message(self, kit: Kit) -> None:
        _need_chat(kit)
        if not kit.capabilities.continue_final_message:
            skip("capabilities() does not claim continue_final_message")
        await kit.need_determinism()
        question = ChatMessage(role="user", content="Name three rivers.")
        begun = ChatMessage(role="assistant", content="Three rivers are the")
        ask: dict[str, Any] = {"messages": [question, begun]}
        request = kit.likely(**ask, continue_final_message=True)
        goes_on = await kit.bench.answer(again(request))
        anew = await kit.bench.answer(kit.likely(**ask, continue_final_message=False))
        read, read_anew = goes_on.prompt_tokens, anew.prompt_tokens
        if read is not None and read_anew is not None and read >= read_anew:
            broken(
                did=f"infer({said(request)}), and with continue_final_message=False",
                expected="a prompt without the end of the message and the beginning of a new one",
                saw=f"{read} tokens of the prompt, and {read_anew}",
            )
        rendered = self.render_chat(kit.bench.loaded, [question])
        if rendered is None or traits_of(kit).reasoning is not None:
            return  # of a prompt that is text, nothing tells its thoughts
        by_hand = kit.likely(f"{rendered}{begun.content}")
        expected = await kit.bench.answer(again(by_hand))
        if expected.prompt_tokens == read:  # some templates begin a message otherwise
            texts = expected.generated_text or "", goes_on.generated_text or ""
            same(f"infer({said(request)}), and with prompt={by_hand.prompt!r}", "the same", *texts)


def _need_chat(kit: Kit) -> None:
    if not kit.capabilities.chat:
        skip("capabilities() does not claim chat; the service refuses messages by name")
