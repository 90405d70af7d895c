"""Checks of the parameters whose effect is on the choice of a token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engineroom.schemas import InferenceRequest, InferenceResponse, TokenLogprob
from engineroom.testing.conformance.base import Checks, check
from engineroom.testing.conformance.bench import again, said
from engineroom.testing.conformance.kit import Kit
from engineroom.testing.conformance.outcomes import broken, same, skip
from engineroom.testing.conformance.ties import LEAST_BOUND, MOST_BOUND

__all__ = ["ParameterChecks"]

_SEEDS = (1, 2, 3, 4)


def _hot(kit: Kit) -> dict[str, Any]:
    """Parameters that make the text vary, if the handler has any."""
    return {"temperature": 1.8} if kit.honours("temperature") else {}


async def _is_greedy(kit: Kit, params: Mapping[str, Any]) -> None:
    await kit.need_determinism()
    plain = (await kit.plain(n=16)).generated_text
    request = kit.request(params=params)
    for _ in range(3):
        same(f"infer({said(request)})", "the likeliest text", plain, await kit.text(request))


def _greedy_with(rule: str, **params: Any) -> Callable[..., None]:
    """With this parameter the text is the likeliest, however hot it is."""

    async def body(_: object, kit: Kit) -> None:
        kit.need(*params)
        await _is_greedy(kit, {**_hot(kit), **params})

    return check(rule=rule)(body)


def _penalty(name: str, value: float, *, counts_prompt: bool = False) -> Callable[..., None]:
    """A penalty has an effect, but none yet on the first token unless the prompt counts."""

    async def body(_: object, kit: Kit) -> None:
        await _has_effect(kit, name, value)
        if not counts_prompt:
            await _spares_the_first_token(kit, name, value)

    return check(rule=name.replace("_", "-"))(body)


class ParameterChecks(Checks):
    """Sampling and penalties."""

    @check()
    async def test_none_is_neutral(self, kit: Kit) -> None:
        neutral: dict[str, Any] = {
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "repetition_penalty": 1.0,
            "do_sample": True,
            "num_beams": 1,
            "early_stopping": False,
            "min_p": 0.0,
            "min_tokens": 0,
            "ignore_eos": False,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "logit_bias": {},
        }
        fixed: dict[str, Any] = {}
        if not await kit.can_seed():
            await kit.need_determinism()
            fixed = kit.greedy()
        names = [name for name in neutral if kit.honours(name) and name not in fixed]
        for seed in _SEEDS[: 1 if fixed else 3]:
            base = fixed or {"seed": seed}
            none = kit.request(params={**base, **dict.fromkeys(names)})
            plain = kit.request(params={**base, **{name: neutral[name] for name in names}})
            texts = await kit.text(plain), await kit.text(none)
            same(f"infer({said(none)})", "the text for the neutral values", *texts)

    test_temperature_zero = _greedy_with("temperature-zero", temperature=0.0)

    @check()
    async def test_temperature(self, kit: Kit) -> None:
        kit.need("temperature")
        if not await kit.has_choice():
            skip("the model says the same at every temperature: it leaves no choice")
        await _is_greedy(kit, {"temperature": 1e-6})
        plain = (await kit.plain(n=16)).generated_text
        request = kit.request(params={"temperature": 2.0})
        for _ in range(6):
            if await kit.text(request) != plain:
                return
        broken(
            did=f"infer({said(request)}), six times",
            expected="other texts than the greedy one: the model wavers",
            saw=f"{plain!r} each time",
        )

    test_do_sample = _greedy_with("do-sample", do_sample=False)

    @check()
    async def test_seed(self, kit: Kit) -> None:
        kit.need("seed")
        for seed, heat in ((7, {}), (2**63 - 1, _hot(kit))):
            request = kit.seeded(seed, **heat)
            first = await kit.text(request)
            for _ in range(2):
                same(
                    f"infer({said(request)}) again", "the same text", first, await kit.text(request)
                )
        if await kit.has_choice():
            texts = [await kit.sampled(seed, **_hot(kit)) for seed in range(20, 26)]
            if len(set(texts)) == 1:
                broken(
                    did="infer with six different seeds",
                    expected="different texts",
                    saw=f"{texts[0]!r} each time",
                )

    @check()
    async def test_seed_beside_neighbours(self, kit: Kit) -> None:
        kit.need("seed")
        if not await kit.can_seed():
            skip("not checked: a seed alone does not make a text again")

        async def beside(request: InferenceRequest) -> InferenceResponse:
            hot = kit.request(kit.prompts[1], 24, params=_hot(kit))
            neighbours = [kit.spawn(kit.bench.infer(hot)) for _ in range(3)]
            answer = await kit.bench.answer(again(request))
            for neighbour in neighbours:
                await kit.within(neighbour, "infer, unseeded")
            return answer

        did = "infer(seed=5) beside three unseeded requests"
        await kit.unchanged(did, "the text that it has alone", kit.seeded(5), beside)

    test_top_k = _greedy_with("top-k", top_k=1)
    test_top_p = _greedy_with("top-p", top_p=1e-6)
    test_min_p = _greedy_with("min-p", min_p=1.0)
    test_repetition_penalty = _penalty("repetition_penalty", 20.0, counts_prompt=True)
    test_presence_penalty = _penalty("presence_penalty", 2.0)
    test_frequency_penalty = _penalty("frequency_penalty", 2.0)

    @check()
    async def test_logit_bias(self, kit: Kit) -> None:
        kit.need("logit_bias")
        if not kit.honours("logprobs"):
            skip("token ids are not known: capabilities() does not claim logprobs")
        params = {"logprobs": 3}
        response = await kit.bench.answer(kit.likely(n=1, params=params))
        if not response.logprobs or len(response.logprobs[0].top) < 2:
            skip("token ids are not known: no logprobs came")
        likeliest = response.logprobs[0].token_id
        other = next(i for i, _, _ in response.logprobs[0].top if i != likeliest)
        for token, bias, present in ((likeliest, -100.0, False), (other, 100.0, True)):
            request = kit.likely(n=4, params={**params, "logit_bias": {token: bias}})
            answer = await kit.bench.answer(request)
            first = answer.logprobs[0].token_id if answer.logprobs else None
            if (first == token) is not present:
                broken(
                    did=f"infer({said(request)})",
                    expected=f"that the first token is {'' if present else 'not '}{token}",
                    saw=f"token {first}",
                )

    @check()
    async def test_logprobs(self, kit: Kit) -> None:
        kit.need("logprobs")
        for count in (0, 3):
            for did, response in await kit.both(kit.likely(n=8, params={"logprobs": count})):
                if did.startswith("infer") or response.generated_tokens is not None:
                    _complete(response, count, did)
        if not kit.honours("temperature"):
            return
        firsts = []
        for temperature in (1.0, 2.0):
            request = kit.request(n=1, params={"temperature": temperature, "logprobs": 1})
            answer = await kit.bench.answer(request)
            if answer.logprobs and answer.logprobs[0].top:
                firsts.append(answer.logprobs[0].top[0][2])
        if len(firsts) == 2 and abs(firsts[0] - firsts[1]) > 0.05:
            broken(
                did=f"infer({said(request)})",
                expected="log probabilities as the model gave them, before temperature: "
                f"{firsts[0]:.3f} for the likeliest",
                saw=f"{firsts[1]:.3f}",
            )

    @check()
    async def test_prompt_logprobs(self, kit: Kit) -> None:
        kit.need("prompt_logprobs")
        for count in (0, 2):
            request, tokens = kit.likely(n=2, params={"prompt_logprobs": count}), None
            for did, response in await kit.both(request):
                if did.startswith("infer") or response.prompt_tokens is not None:
                    tokens = tokens or response.prompt_tokens
                    _of_the_prompt(response, tokens, count, did)
        if kit.honours("logprobs"):
            await _as_they_were_generated(kit)


async def _has_effect(kit: Kit, name: str, value: float) -> None:
    """A penalty must change some text, greedy or seeded."""
    kit.need(name)
    await kit.need_determinism()
    if not await kit.has_choice():
        skip("the model says the same whatever is asked: it leaves no choice")
    ways: list[dict[str, Any]] = [kit.greedy()]
    if await kit.can_seed():
        hot = {"temperature": 1.0} if kit.honours("temperature") else {}
        ways += [{"seed": seed, **hot} for seed in _SEEDS]
    for prompt in kit.prompts:
        for way in ways:
            requests = (kit.request(prompt, 32, params=p) for p in (way, {**way, name: value}))
            plain, penalised = [await kit.text(request) for request in requests]
            if plain != penalised:
                return
    broken(
        did=f"infer with {name}={value:g} and without, {len(kit.prompts) * len(ways)} times",
        expected="that it changes a text",
        saw="the same texts",
    )


async def _spares_the_first_token(kit: Kit, name: str, value: float) -> None:
    for prompt in kit.prompts:
        request = kit.likely(prompt, 1, params={name: value})
        plain, penalised = await kit.text(kit.likely(prompt, 1)), await kit.text(request)
        if plain != penalised:
            broken(
                did=f"infer({said(request)})",
                expected=f"{plain!r}, as without: there is no generated token yet, and those "
                "of the prompt do not count",
                saw=repr(penalised),
            )


def _of_the_prompt(response: InferenceResponse, tokens: int | None, count: int, did: str) -> None:
    entries = response.prompt_logprobs or []
    if not entries or len(entries) != tokens:
        broken(
            did=did,
            expected=f"an entry for each of {tokens} tokens of the prompt",
            saw=f"{len(entries)} entries; {response.cached_prompt_tokens} tokens were cached",
        )
    for place, entry in enumerate(entries):
        values = [value for _, _, value in entry.top]
        if place == 0:
            if entry.logprob is not None or values:
                broken(
                    did=did,
                    expected="no log probability of the first token: there is nothing before it",
                    saw=repr(entry),
                )
        elif entry.logprob is None or len(values) != count or values != sorted(values)[::-1]:
            broken(
                did=did,
                expected=f"a log probability and {count} alternatives, the likeliest first",
                saw=repr(entry),
            )


async def _as_they_were_generated(kit: Kit) -> None:
    """A text that is given back as a prompt is as likely as it was when it was generated."""
    first = kit.likely(n=8, params={"logprobs": 0, "prompt_logprobs": 0})
    response = await kit.bench.answer(first)
    wrote = response.logprobs or []
    ids = [entry.token_id for entry in (*(response.prompt_logprobs or ()), *wrote)]
    again: dict[str, Any] = {"params": {**kit.greedy(), "prompt_logprobs": 0}}
    if kit.capabilities.prompt_token_ids:
        again["prompt_token_ids"] = ids
    else:
        again["prompt"] = (first.prompt or "") + (response.generated_text or "")
    second = kit.request(n=1, **again)
    entries = (await kit.bench.answer(second)).prompt_logprobs or []
    if [entry.token_id for entry in entries] != ids:
        return  # the text is read as other tokens; or ids are, which is another rule
    bound = LEAST_BOUND if kit.settings.batch_invariant else MOST_BOUND
    for one, other in zip(wrote, entries[len(ids) - len(wrote) :], strict=True):
        if other.logprob is None or abs(one.logprob - other.logprob) > bound:
            broken(
                did=f"infer({said(second)}), the prompt and what came of it before",
                expected=f"{one.logprob:.3f} for {one.token!r}, as when it was generated",
                saw=f"{other.logprob} for {other.token!r}",
            )


def _complete(response: InferenceResponse, count: int, did: str) -> None:
    entries = response.logprobs
    if entries is None or len(entries) != response.generated_tokens:
        broken(
            did=did,
            expected=f"an entry for each of {response.generated_tokens} tokens",
            saw="none" if entries is None else f"{len(entries)} entries",
        )
    for entry in entries:
        values = [value for _, _, value in entry.top]
        if len(values) != count or values != sorted(values, reverse=True):
            broken(
                did=did, expected=f"{count} alternatives, the likeliest first", saw=repr(entry.top)
            )
        if entry.logprob > 1e-6 or (values and entry.logprob > values[0] + 1e-3):
            broken(
                did=did,
                expected="log probabilities of at most 0, none above the likeliest one's",
                saw=f"{entry.logprob} for token {entry.token_id}, with {entry.top!r}",
            )
    _bytes_of(response, entries, did)


def _bytes_of(response: InferenceResponse, entries: Sequence[TokenLogprob], did: str) -> None:
    """Where a runtime tells the bytes of tokens, the text is made of them."""
    text = response.generated_text or ""
    if any(e.bytes is None or ("\ufffd" not in e.token and e.token not in text) for e in entries):
        return  # it does not; or there are control tokens, which add no text
    written = b"".join(bytes(entry.bytes or ()) for entry in entries).decode("utf-8", "replace")
    if text not in written:
        broken(did=did, expected=f"bytes of the tokens of {text!r}", saw=repr(written))
