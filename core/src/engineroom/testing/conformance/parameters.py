"""Checks of the parameters whose effect is on the choice of a token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engineroom.schemas import InferenceResponse
from engineroom.testing.conformance.base import Checks, check
from engineroom.testing.conformance.bench import said
from engineroom.testing.conformance.kit import Kit
from engineroom.testing.conformance.outcomes import broken, skip

__all__ = ["ParameterChecks"]

_SEEDS = (1, 2, 3, 4)


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
            said_none = {**base, **dict.fromkeys(names)}
            said_neutral = {**base, **{name: neutral[name] for name in names}}
            texts = [
                (await kit.bench.answer(kit.request(params=params))).generated_text
                for params in (said_none, said_neutral)
            ]
            if texts[0] != texts[1]:
                broken(
                    did=f"infer({said(kit.request(params=said_none))})",
                    expected=f"the text for the neutral values, {texts[1]!r}",
                    saw=repr(texts[0]),
                )

    @check()
    async def test_temperature_zero(self, kit: Kit) -> None:
        kit.need("temperature")
        await _is_greedy(kit, {"temperature": 0.0})

    @check()
    async def test_temperature(self, kit: Kit) -> None:
        kit.need("temperature")
        if not await kit.has_choice():
            skip("the model says the same at every temperature: it leaves no choice")
        await _is_greedy(kit, {"temperature": 1e-6})
        plain = (await kit.plain(n=16)).generated_text
        for _ in range(6):
            request = kit.request(params={"temperature": 2.0})
            if (await kit.bench.answer(request)).generated_text != plain:
                return
        broken(
            did=f"infer({said(request)}), six times",
            expected="other texts than the greedy one: the model wavers",
            saw=f"{plain!r} each time",
        )

    @check()
    async def test_do_sample(self, kit: Kit) -> None:
        kit.need("do_sample")
        await _is_greedy(kit, {"do_sample": False, **_hot(kit)})

    @check()
    async def test_seed(self, kit: Kit) -> None:
        kit.need("seed")
        for seed in (7, 2**63 - 1):
            texts = [await kit.sampled(seed) for _ in range(3)]
            if len(set(texts)) > 1:
                broken(
                    did=f"infer(seed={seed}) three times",
                    expected="the same text",
                    saw=" / ".join(map(repr, texts)),
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
        alone = await kit.sampled(5)
        seen = []
        for _ in range(1 if kit.settings.batch_invariant else 4):
            hot = kit.request(kit.prompts[1], 24, params=_hot(kit))
            neighbours = [kit.spawn(kit.bench.infer(hot)) for _ in range(3)]
            text = await kit.sampled(5)
            for neighbour in neighbours:
                await kit.within(neighbour, "infer, unseeded")
            if kit.alike(alone, text):
                return
            seen.append(text)
        broken(
            did="infer(seed=5) beside three unseeded requests",
            expected=f"the text that it has alone, {alone!r}",
            saw=" / ".join(map(repr, seen)),
        )

    @check()
    async def test_top_k(self, kit: Kit) -> None:
        kit.need("top_k")
        await _is_greedy(kit, {"top_k": 1, **_hot(kit)})

    @check()
    async def test_top_p(self, kit: Kit) -> None:
        kit.need("top_p")
        await _is_greedy(kit, {"top_p": 1e-6, **_hot(kit)})

    @check()
    async def test_min_p(self, kit: Kit) -> None:
        kit.need("min_p")
        await _is_greedy(kit, {"min_p": 1.0, **_hot(kit)})

    @check()
    async def test_repetition_penalty(self, kit: Kit) -> None:
        await _has_effect(kit, "repetition_penalty", 20.0)

    @check()
    async def test_presence_penalty(self, kit: Kit) -> None:
        await _has_effect(kit, "presence_penalty", 2.0)
        await _spares_the_first_token(kit, {"presence_penalty": 2.0})

    @check()
    async def test_frequency_penalty(self, kit: Kit) -> None:
        await _has_effect(kit, "frequency_penalty", 2.0)
        await _spares_the_first_token(kit, {"frequency_penalty": 2.0})

    @check()
    async def test_logit_bias(self, kit: Kit) -> None:
        kit.need("logit_bias")
        if not kit.honours("logprobs"):
            skip("token ids are not known: capabilities() does not claim logprobs")
        params = {**kit.greedy(), "logprobs": 3}
        response = await kit.bench.answer(kit.request(n=1, params=params))
        if not response.logprobs or len(response.logprobs[0].top) < 2:
            skip("token ids are not known: no logprobs came")
        likeliest = response.logprobs[0].token_id
        other = next(i for i, _, _ in response.logprobs[0].top if i != likeliest)
        for token, bias, present in ((likeliest, -100.0, False), (other, 100.0, True)):
            biased = {**params, "logit_bias": {token: bias}}
            answer = await kit.bench.answer(kit.request(n=4, params=biased))
            first = answer.logprobs[0].token_id if answer.logprobs else None
            if (first == token) is not present:
                broken(
                    did=f"infer({said(kit.request(n=4, params=biased))})",
                    expected=f"that the first token is {'' if present else 'not '}{token}",
                    saw=f"token {first}",
                )

    @check()
    async def test_logprobs(self, kit: Kit) -> None:
        kit.need("logprobs")
        for count in (0, 3):
            request = kit.request(n=8, params={**kit.greedy(), "logprobs": count})
            response = await kit.bench.answer(request)
            _complete(response, count, f"infer({said(request)})")
            streamed = (await kit.bench.stream(request.model_copy())).response
            if streamed is not None and streamed.generated_tokens is not None:
                _complete(streamed, count, f"stream({said(request)})")
        if not kit.honours("temperature"):
            return
        firsts = {}
        for temperature in (1.0, 2.0):
            request = kit.request(n=1, params={"temperature": temperature, "logprobs": 1})
            answer = await kit.bench.answer(request)
            if answer.logprobs and answer.logprobs[0].top:
                firsts[temperature] = answer.logprobs[0].top[0][2]
        if len(firsts) == 2 and abs(firsts[1.0] - firsts[2.0]) > 0.05:
            broken(
                did=f"infer({said(request)})",
                expected="log probabilities as the model gave them, before temperature: "
                f"{firsts[1.0]:.3f} for the likeliest",
                saw=f"{firsts[2.0]:.3f}",
            )


def _hot(kit: Kit) -> dict[str, Any]:
    """Parameters that make the text vary, if the handler has any."""
    return {"temperature": 1.8} if kit.honours("temperature") else {}


async def _is_greedy(kit: Kit, params: Mapping[str, Any]) -> None:
    await kit.need_determinism()
    plain = (await kit.plain(n=16)).generated_text
    for _ in range(3):
        request = kit.request(params=params)
        text = (await kit.bench.answer(request)).generated_text
        if text != plain:
            broken(
                did=f"infer({said(request)})",
                expected=f"the likeliest text, {plain!r}",
                saw=repr(text),
            )


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
            texts = [
                (await kit.bench.answer(kit.request(prompt, 32, params=p))).generated_text
                for p in (way, {**way, name: value})
            ]
            if texts[0] != texts[1]:
                return
    broken(
        did=f"infer with {name}={value:g} and without, {len(kit.prompts) * len(ways)} times",
        expected="that it changes a text",
        saw="the same texts",
    )


async def _spares_the_first_token(kit: Kit, params: Mapping[str, Any]) -> None:
    for prompt in kit.prompts:
        texts = [
            (await kit.bench.answer(kit.request(prompt, 1, params=p))).generated_text
            for p in (kit.greedy(), {**kit.greedy(), **params})
        ]
        if texts[0] != texts[1]:
            request = kit.request(prompt, 1, params={**kit.greedy(), **params})
            broken(
                did=f"infer({said(request)})",
                expected=f"{texts[0]!r}, as without: there is no generated token yet, and those "
                "of the prompt do not count",
                saw=repr(texts[1]),
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
