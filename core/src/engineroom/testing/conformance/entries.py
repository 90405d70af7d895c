"""What every check of an answer that is more than content asks of its log probabilities."""

from __future__ import annotations

from engineroom.schemas import InferenceRequest, InferenceResponse
from engineroom.testing.conformance.bench import said
from engineroom.testing.conformance.outcomes import broken

__all__ = ["has_all_entries"]


def has_all_entries(request: InferenceRequest, response: InferenceResponse) -> None:
    """:raises BrokenRuleError: there is not one entry for each generated token."""
    if request.params.logprobs is None or response.generated_tokens is None:
        return
    if (count := len(response.logprobs or ())) != response.generated_tokens:
        broken(
            did=f"infer({said(request)})",
            expected=f"a log probability for each of {response.generated_tokens} tokens, be they "
            "content, reasoning or calls",
            saw=f"{count} of them",
        )
