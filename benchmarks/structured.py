"""Bars of structured output: what it costs to hold answers to a schema.

Greedy, the same fixed prompts and the same number of tokens on both sides: the schemas are of
lists that are longer than what is generated, so that no answer ends early. What counts is the time
of the processor, of all threads together. Each runtime has a process of its own, which answers in
turn with and without schemas; the schemas were compiled before anything is measured, as those of an
agent are from its second request on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

from benchmarks import hf_transformers, llamacpp_sides
from benchmarks.harness import (
    Bars,
    Measurement,
    Settings,
    UnavailableError,
    at_least,
    interleave,
)
from benchmarks.llamacpp import PROMPTS
from benchmarks.service import EIGHT, ServiceSide, checked
from benchmarks.workers import Worker

bar = Bars()

_KINDS: Final[tuple[dict[str, Any], ...]] = (
    {"type": "string", "maxLength": 40},
    {"type": "integer", "minimum": 0, "maximum": 100_000},
    {"enum": ["red", "green", "blue"]},
    {"type": "number"},
    {"type": "string", "pattern": "^[A-Z][a-z]{2,12}$"},
    {"type": "boolean"},
    {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3},
    {"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 20}]},
)


def schemas() -> list[dict[str, Any]]:
    """Eight JSON schemas, of lists of objects that all have other members."""
    made = []
    for first in range(EIGHT):
        members = {
            f"member_{first}_{n}": _KINDS[(first + n) % len(_KINDS)] for n in range(3 + first % 3)
        }
        item = {
            "type": "object",
            "properties": members,
            "required": list(members),
            "additionalProperties": False,
        }
        made.append({"type": "array", "items": item, "minItems": 200})
    return made


class _Held(ServiceSide):
    """A side whose answers may be held to schemas."""

    def cpu(
        self, prompts: Sequence[str], forms: Sequence[dict[str, Any] | None], count: int
    ) -> float:
        """Seconds of the processor for all of them at one time, each with its schema or without."""
        from engineroom import GenerationParams, InferenceRequest, StructuredOutput

        requests = [
            InferenceRequest(
                model_id="smollm2",
                prompt=prompt,
                params=GenerationParams(
                    temperature=0.0,
                    max_new_tokens=count,
                    structured_output=form and StructuredOutput(json_schema=form),
                ),
            )
            for prompt, form in zip(prompts, forms, strict=True)
        ]
        began = time.process_time()
        counts = self.answer_all(requests)
        return checked(time.process_time() - began, counts, count)


class _LlamaCppSide(llamacpp_sides.ForgetfulSide, _Held):
    """On llama.cpp."""


class _TransformersSide(hf_transformers.ForgetfulSide, _Held):
    """On Transformers."""


def _held(
    side: Any, path: Any, what: str, target: float, requests: int, settings: Settings
) -> Measurement:
    count = 32 if settings.quick else 128
    with Worker(side, path) as service:
        prompts = service.call("long_answers", PROMPTS, count)[:requests]
        if len(prompts) < requests:
            raise UnavailableError(f"too few of PROMPTS get an answer of {count} tokens")
        forms = schemas()[:requests]
        free: list[None] = [None] * requests
        service.call("cpu", prompts, forms, count)
        pairs = interleave(
            lambda: float(service.call("cpu", prompts, forms, count)),
            lambda: float(service.call("cpu", prompts, free, count)),
            settings.rounds,
        )
    each = 1000 / (requests * count)
    return Measurement(
        what,
        at_least(target),
        pairs.values(lambda a, b: b / a),
        pairs.discarded,
        f"{each * pairs.median_a():.2f} ms of the processor a token, "
        f"{each * pairs.median_b():.2f} without",
    )


@bar(19)
def json_that_is_valid(settings: Settings) -> Iterator[Measurement]:
    """Tokens a second of the processor with JSON schemas ÷ without any.

    A: one answer with a schema, and eight at once with eight schemas. B: the same prompts and as
    many tokens of free text.
    """
    one = llamacpp_sides.model_path("Q4_0")
    yield _held(_LlamaCppSide, one, "llamacpp JSON ÷ free, 1 request, Q4_0", 0.97, 1, settings)
    yield _held(_LlamaCppSide, one, "llamacpp JSON ÷ free, 8 schemas, Q4_0", 0.9, EIGHT, settings)
    folder = hf_transformers.model_folder()
    yield _held(
        _TransformersSide, folder, "hf JSON ÷ free, 8 schemas, float32", 0.9, EIGHT, settings
    )
