"""Checks of prompts that come as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from engineroom.field_types import MAX_TOKEN_ID
from engineroom.schemas import InferenceRequest, InferenceResponse
from engineroom.testing.conformance.base import Checks, check
from engineroom.testing.conformance.bench import refused, said
from engineroom.testing.conformance.kit import Kit
from engineroom.testing.conformance.outcomes import broken, skip

__all__ = ["TokenIdChecks"]

_SMALL_IDS: Final = tuple(range(40, 52))
"""Ids that a vocabulary of any size has."""
_READ_BACK: Final = 4
_MOST_FILLED: Final = 1 << 16


class TokenIdChecks(Checks):
    """Token ids instead of a prompt."""

    @check()
    async def test_prompt_token_ids(self, kit: Kit) -> None:
        _need_ids(kit)
        response = await kit.bench.answer(_request(kit, _SMALL_IDS, 4))
        _counted(_request(kit, _SMALL_IDS, 4), response)
        await kit.need_determinism()
        compared = False
        for prompt in kit.prompts:
            ids = self.token_ids(kit.bench.loaded, prompt)
            if ids is None:
                break
            compared = True
            by_text = await kit.plain(prompt)
            request = _request(kit, ids, 24)
            by_ids = await kit.bench.answer(request)
            _counted(request, by_ids)
            texts = [(r.generated_text, r.finish_reason) for r in (by_text, by_ids)]
            if by_text.prompt_tokens not in (None, len(ids)) or texts[0] != texts[1]:
                broken(
                    did=f"infer({said(request)}), the tokens of {prompt!r}",
                    expected=f"the answer to that text: {texts[0]!r} after "
                    f"{by_text.prompt_tokens} tokens of prompt",
                    saw=f"{texts[1]!r} after {len(ids)} tokens of prompt",
                )
        if kit.honours("logprobs"):
            await _goes_on_from_its_own(kit)
        elif not compared:
            skip(
                "which ids the model's own are is not known; write token_ids(loaded_model, text) "
                "in the suite"
            )

    @check()
    async def test_prompt_token_ids_refused(self, kit: Kit) -> None:
        _need_ids(kit)
        cases: list[tuple[str, list[int]]] = [
            ("an id that no vocabulary has", [*_SMALL_IDS, MAX_TOKEN_ID]),
        ]
        context = kit.bench.loaded.max_context_tokens
        if context is not None and context <= _MOST_FILLED:
            cases.append((f"{context + 1} ids for a context of {context}", [40] * (context + 1)))
        for what, ids in cases:
            refused(await kit.bench.infer(_request(kit, ids, 4)), f"infer with {what}")
        await kit.bench.answer(_request(kit, _SMALL_IDS, 4))


def _need_ids(kit: Kit) -> None:
    if not kit.capabilities.prompt_token_ids:
        skip("capabilities() does not claim prompt_token_ids; the service refuses them by name")


def _request(kit: Kit, ids: Sequence[int], n: int, *, tell: bool = False) -> InferenceRequest:
    params = {**kit.greedy(), **({"logprobs": 0} if tell else {})}
    return kit.request(n=n, params=params, prompt_token_ids=list(ids))


def _counted(request: InferenceRequest, response: InferenceResponse) -> None:
    count = len(request.prompt_token_ids or ())
    if response.prompt_tokens not in (None, count):
        broken(
            did=f"infer({said(request)})",
            expected=f"prompt_tokens={count}: nothing is added to them",
            saw=f"prompt_tokens={response.prompt_tokens}",
        )


async def _goes_on_from_its_own(kit: Kit) -> None:
    """A text that is given back in part, by its tokens, goes on as it did."""
    first = _request(kit, _SMALL_IDS, 16, tell=True)
    response = await kit.bench.answer(first)
    wrote = [entry.token_id for entry in response.logprobs or ()]
    if len(wrote) != response.generated_tokens or len(wrote) < 2 * _READ_BACK:
        return  # too short; or logprobs are not complete, which is another rule
    second = _request(kit, [*_SMALL_IDS, *wrote[:_READ_BACK]], 8, tell=True)
    goes_on = [e.token_id for e in (await kit.bench.answer(second)).logprobs or ()]
    followed = wrote[_READ_BACK:][:8]
    if not kit.settings.batch_invariant:  # reading tokens and writing them round differently
        goes_on, followed = goes_on[:1], followed[:1]
    if goes_on[: len(followed)] != followed:
        broken(
            did=f"infer({said(first)}), and again with the first {_READ_BACK} tokens of its answer "
            "behind the prompt's",
            expected=f"the tokens that followed: {followed}",
            saw=repr(goes_on),
        )
