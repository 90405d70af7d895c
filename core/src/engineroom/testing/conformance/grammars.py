"""Checks of grammars that are none, or that grow."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from engineroom.schemas import InferenceRequest, InferenceResponse
from engineroom.testing.conformance.base import Checks, check
from engineroom.testing.conformance.bench import again, is_refusal, said
from engineroom.testing.conformance.kit import Kit
from engineroom.testing.conformance.outcomes import broken

__all__ = ["GrammarChecks"]

_ITSELF: Final = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
_CHAIN: Final = "start: r0\n" + "".join(f'r{i}: r{i + 1} | "{i}"\n' for i in range(400))
_WRONG: Final[dict[str, tuple[Any, ...]]] = {
    "regex": ("(a", "a{9,3}", "[b-a]"),
    "json_schema": ({"type": "no such type"}, _ITSELF),
    "grammar": ("start: (", "start: nowhere"),
}
_GROWING: Final[dict[str, tuple[Any, ...]]] = {
    "regex": ("(x{1000}){1000}", "((a|aa)+)+b"),
    "json_schema": ({"type": "array", "minItems": 100_000, "maxItems": 1_000_000},),
    "grammar": (_CHAIN + 'r400: "x"\n', 'start: start start | "a"\n'),
}


class GrammarChecks(Checks):
    """What others bear of a request's grammar."""

    @check()
    async def test_hostile_grammar_neighbour(self, kit: Kit) -> None:
        kit.need("structured_output")
        hostile = [*_requests(kit, _WRONG), *_requests(kit, _GROWING)]
        wrong = len([*_requests(kit, _WRONG)])
        neighbour = await kit.lengthy()

        async def beside(watched: InferenceRequest) -> InferenceResponse:
            # One after another, so that one runs whenever a grammar fails, however late.
            answers: list[InferenceResponse] = []
            over = asyncio.Event()

            async def neighbours() -> None:
                while not over.is_set():
                    answers.append(await kit.bench.answer(again(watched)))

            running = kit.spawn(neighbours())
            await kit.turns(1)
            for number, request in enumerate(hostile):
                _check(request, await kit.bench.infer(again(request)), wrong=number < wrong)
            over.set()
            await kit.within(running, f"infer({said(watched)})")
            answers.append(await kit.bench.answer(again(watched)))
            return next((a for a in answers if a.generated_text != watched_text), answers[-1])

        watched_text = await kit.text(neighbour)
        did = f"infer({said(neighbour)}) beside and after {len(hostile)} hostile grammars"
        await kit.unchanged(did, "the text that it has alone", neighbour, beside)


def _requests(kit: Kit, values: dict[str, tuple[Any, ...]]) -> list[InferenceRequest]:
    kinds = kit.capabilities.structured_output
    return [
        kit.likely(n=4, params={"structured_output": {kind: value}})
        for kind in filter(kinds.__contains__, values)
        for value in values[kind]
    ]


def _check(request: InferenceRequest, response: InferenceResponse, *, wrong: bool) -> None:
    refused = is_refusal(response)
    if not refused and (wrong or response.error_message is not None):
        broken(
            did=f"infer({said(request)})",
            expected="a ConfigurationError" if wrong else "an answer, or a ConfigurationError",
            saw=f"{response.error_type}: {response.error_message}"
            if response.error_message is not None
            else f"an answer: {response.generated_text!r}",
        )
