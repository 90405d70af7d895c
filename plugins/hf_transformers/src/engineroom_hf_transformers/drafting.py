"""Drafters for the options ``prompt_lookup`` and ``draft_model``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from engineroom import ConfigurationError
from engineroom.engine import Drafter, DraftRequest, PromptLookup, common_prefix
from engineroom_hf_transformers.attention import Span

if TYPE_CHECKING:
    from engineroom_hf_transformers.loading import Parts
    from engineroom_hf_transformers.model import Forward
    from engineroom_hf_transformers.options import HfTransformersOptions

__all__ = ["DraftModel", "make_drafter"]


def make_drafter(parts: Parts, options: HfTransformersOptions, most: int) -> Drafter | None:
    """What the options ask for.

    :param most: tokens of a step.
    """
    if options.prompt_lookup:
        return PromptLookup()
    if parts.draft is not None:
        from engineroom_hf_transformers.model import forward_of, why_not_driven

        if why := why_not_driven(parts.draft, options):
            raise ConfigurationError(f"draft_model: this model cannot propose tokens: {why}")
        return DraftModel(forward_of(parts.draft, options), most)
    return None


class DraftModel(Drafter):
    """A smaller model that writes ahead, always the likeliest token.

    :param most: tokens that it reads in a step; a longer beginning is read over several, in
        which it proposes nothing.
    """

    def __init__(self, forward: Forward, most: int) -> None:
        self._forward = forward
        self._most = most
        self._content: dict[int, list[int]] = {}
        """Slot → tokens in the draft's own cache."""
        self._scopes: dict[int, str] = {}
        """Slot → the cache scope in which they were read."""

    @property
    def nbytes(self) -> int:
        """See :class:`Drafter`."""
        return self._forward.cache.nbytes

    def propose(self, requests: Sequence[DraftRequest]) -> dict[int, list[int]]:
        """See :class:`Drafter`. Beyond its own context it proposes nothing."""
        room = self._forward.cache.length
        requests = [request for request in requests if len(request.tokens) + request.most <= room]
        proposals = {slot: [first] for slot, first in self._read(requests).items()}
        counts = {request.sequence: request.most for request in requests}
        while going := sorted(s for s, tokens in proposals.items() if len(tokens) < counts[s]):
            spans = [Span(row, slot, len(self._content[slot]), 1) for row, slot in enumerate(going)]
            last = [proposals[slot][-1] for slot in going]
            logits = self._forward(last, spans, [], range(len(going)))
            for slot, token, written in zip(
                going, logits.argmax(dim=-1).tolist(), last, strict=True
            ):
                self._content[slot].append(written)
                proposals[slot].append(token)
        return proposals

    def _read(self, requests: Sequence[DraftRequest]) -> dict[int, int]:
        """Read what is new of each request; the first proposals of those that are through."""
        spans: list[Span] = []
        packed: list[int] = []
        through: list[tuple[int, int]] = []
        read: dict[int, list[int]] = {}
        for slot, tokens, _, scope in requests:
            if self._scopes.get(slot) != scope:
                self._scopes[slot] = scope
                self._content.pop(slot, None)
            content = self._content.get(slot, [])
            start = min(common_prefix(content, tokens), len(tokens) - 1)
            count = min(len(tokens) - start, self._most - len(packed))
            if count <= 0:
                continue
            spans.append(Span(len(packed), slot, start, count))
            packed += tokens[start : start + count]
            # Until the step is through, the cache has no more than what is kept of it.
            self._content[slot] = content[:start]
            read[slot] = list(tokens[: start + count])
            if start + count == len(tokens):
                through.append((slot, len(packed) - 1))
        if not packed:
            return {}
        logits = self._forward(packed, [], spans, [place for _, place in through])
        self._content.update(read)
        chosen = logits.argmax(dim=-1).tolist() if through else []
        return {slot: token for (slot, _), token in zip(through, chosen, strict=True)}

    # Nothing is forgotten: what a slot has stays, another request of the scope may begin alike.

    def close(self) -> None:
        """See :class:`Drafter`."""
        self._forward.close()
        self._content.clear()
