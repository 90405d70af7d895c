"""Checks of grammars that are none, or that grow."""

from __future__ import annotations

import asyncio
import re
from typing import Any, Final

from engineroom.schemas import InferenceRequest, InferenceResponse
from engineroom.testing.conformance.base import Checks, check
from engineroom.testing.conformance.bench import again, is_refusal, said
from engineroom.testing.conformance.kit import Kit
from engineroom.testing.conformance.outcomes import broken

__all__ = ["GrammarChecks"]

_ITSELF: Final = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
_CHAIN: Final = "start: r0\n" + "".join(f'r{i}: r{i + 1} | "{i}"\n' for i in range(400))
_AMBIGUOUS: Final = f'start: {"s " * 12}\ns: s s | "a"\n'
"""More so with each token, of which it has twelve at least."""
_WRONG: Final[dict[str, tuple[Any, ...]]] = {
    "regex": ("(a", "a{9,3}", "[b-a]"),
    "json_schema": ({"type": "no such type"}, _ITSELF),
    "grammar": ("start: (", "start: nowhere"),
}
_GROWING: Final[dict[str, tuple[Any, ...]]] = {
    "regex": ("(x{1000}){1000}", "((a|aa)+)+b"),
    "json_schema": ({"type": "array", "minItems": 100_000, "maxItems": 1_000_000},),
    "grammar": (_CHAIN + 'r400: "x"\n', 'start: start start | "a"\n', _AMBIGUOUS),
}
_GROWN: Final = 24
"""Tokens for which those that grow may do so."""
_LETTERS: Final = "a" * 40
_FORMS: Final[dict[str, tuple[Any, str]]] = {
    "regex": ("[a-z]{40}", "[a-z]{40}"),
    "grammar": ("start: /[a-z]{40}/\n", "[a-z]{40}"),
    "json_schema": ({"enum": [_LETTERS]}, f'"{_LETTERS}"'),
}
"""Kind → one that is right, and what its texts match."""


class GrammarChecks(Checks):
    """What others bear of a request's grammar."""

    @check()
    async def test_hostile_grammar_neighbour(self, kit: Kit) -> None:
        kit.need("structured_output")
        wrong, growing = _requests(kit, _WRONG), _requests(kit, _GROWING)
        neighbour, form = await kit.lengthy(), _form(kit)

        async def beside(watched: InferenceRequest) -> InferenceResponse:
            # One after another, so that one runs whenever a grammar fails, however late.
            answers: list[InferenceResponse] = []
            over = asyncio.Event()

            async def neighbours() -> None:
                while not over.is_set():
                    answers.append(await kit.bench.answer(again(watched)))

            async def forms() -> None:
                while not over.is_set() and form is not None:
                    _check_form(form, await kit.bench.answer(again(form)))

            async def both() -> None:
                await asyncio.gather(neighbours(), forms())

            running = kit.spawn(both())
            await kit.turns(1)
            for request in wrong:
                _check(request, await kit.bench.infer(again(request)), wrong=True)
            for request in growing:
                _check(request, await kit.bench.infer(again(request)), wrong=False)
            over.set()
            await kit.within(running, f"infer({said(watched)})")
            for request in growing[-1:]:  # with nothing beside it
                _check(request, await kit.bench.infer(again(request)), wrong=False)
            if form is not None:
                _check_form(form, await kit.bench.answer(again(form)))
            answers.append(await kit.bench.answer(again(watched)))
            return next((a for a in answers if a.generated_text != watched_text), answers[-1])

        watched_text = await kit.text(neighbour)
        did = (
            f"infer({said(neighbour)}) beside and after {len([*wrong, *growing])} hostile grammars"
        )
        await kit.unchanged(did, "the text that it has alone", neighbour, beside)


def _requests(kit: Kit, values: dict[str, tuple[Any, ...]]) -> list[InferenceRequest]:
    kinds = kit.capabilities.structured_output
    return [
        kit.likely(n=_GROWN, params={"structured_output": {kind: value}})
        for kind in filter(kinds.__contains__, values)
        for value in values[kind]
    ]


def _form(kit: Kit) -> InferenceRequest | None:
    """A request with a form that is right."""
    for kind in filter(kit.capabilities.structured_output.__contains__, _FORMS):
        return kit.likely(n=48, params={"structured_output": {kind: _FORMS[kind][0]}})
    return None


def _check_form(request: InferenceRequest, response: InferenceResponse) -> None:
    form = request.params.structured_output
    kind = "" if form is None else form.kind
    if not re.fullmatch(_FORMS[kind][1], response.generated_text or ""):
        broken(
            did=f"infer({said(request)}) beside and after hostile grammars",
            expected=f"a text that matches the {kind}",
            saw=repr(response.generated_text),
        )


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
