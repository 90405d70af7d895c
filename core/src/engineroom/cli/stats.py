"""The line that sums an answer up. Needs nothing but the response."""

from __future__ import annotations

from engineroom.schemas import InferenceResponse

__all__ = ["stats_line", "tokens_per_second"]


def tokens_per_second(response: InferenceResponse) -> float | None:
    """How fast tokens followed one another, loading and reading the prompt left out.

    Where the time of the first token is not known, or there was only one: tokens by the whole
    time. ``None`` where that is not known either.
    """
    count, total = response.generated_tokens, response.inference_time_ms
    if not count or not total:
        return None
    first = response.time_to_first_token_ms
    if first is not None and count > 1 and total > first:
        return (count - 1) / (total - first) * 1000
    return count / total * 1000


def stats_line(response: InferenceResponse) -> str:
    """``smollm2 · llamacpp · 57 tokens · 41.2 tokens/s · stopped by eos_token``.

    What the response does not tell is left out.
    """
    parts = [response.model_id]
    if response.handler is not None:
        parts.append(response.handler)
    count = response.generated_tokens
    if count is not None:
        parts.append(f"{count} token{'' if count == 1 else 's'}")
    if (speed := tokens_per_second(response)) is not None:
        parts.append(f"{speed:.1f} tokens/s")
    if response.finish_reason is not None:
        sequence = f" {response.stop_sequence!r}" if response.stop_sequence is not None else ""
        parts.append(f"stopped by {response.finish_reason}{sequence}")
    return " · ".join(parts)
