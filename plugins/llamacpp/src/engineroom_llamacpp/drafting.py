"""Drafters for the options ``prompt_lookup`` and ``draft_model``."""

from __future__ import annotations

from collections.abc import Sequence

from engineroom.engine import Drafter, DraftRequest, PromptLookup, common_prefix
from engineroom_llamacpp.context import LlamaContext
from engineroom_llamacpp.model import LlamaModel
from engineroom_llamacpp.options import LlamaCppOptions

__all__ = ["DraftModel", "make_drafter"]


def make_drafter(draft: LlamaModel | None, options: LlamaCppOptions, n_ctx: int) -> Drafter | None:
    """What the options ask for.

    :param draft: the draft model, which the drafter closes.
    :param n_ctx: cells that the draft's cache is to have.
    """
    if options.prompt_lookup:
        return PromptLookup()
    return None if draft is None else DraftModel(draft, options, n_ctx)


class DraftModel(Drafter):
    """A smaller model that writes ahead, always the likeliest token.

    :param model: it; closed with the drafter.
    :param n_ctx: cells of its cache. Beginnings are not shared there: where what the requests
        have together is more, the last ones get no proposals.
    """

    def __init__(self, model: LlamaModel, options: LlamaCppOptions, n_ctx: int) -> None:
        self._model = model
        update = {
            "n_ctx": n_ctx,
            "kv_unified": True,
            "lora": [],
            "rope_freq_base": None,
            "rope_freq_scale": None,
        }
        self._context = LlamaContext(model, options.model_copy(update=update))
        self._longest = model.n_ctx_train or n_ctx
        self._content: dict[int, list[int]] = {}
        """Sequence → tokens in the draft's own cache."""

    def propose(self, requests: Sequence[DraftRequest]) -> dict[int, list[int]]:
        """See :class:`Drafter`. Beyond what it was trained for it proposes nothing."""
        requests = self._that_fit(requests)
        proposals = self._read(requests)
        counts = {request.sequence: request.most for request in requests}
        context = self._context
        while going := [s for s, tokens in proposals.items() if len(tokens) < counts[s]]:
            context.begin()
            rows = [
                context.add(sequence, len(self._content[sequence]), proposals[sequence][-1:], 1)
                for sequence in going
            ]
            if context.decode():
                self._forget_all()
                return {}
            for sequence, row in zip(going, rows, strict=True):
                self._content[sequence].append(proposals[sequence][-1])
                proposals[sequence].append(int(context.logits(row).argmax()))
        return proposals

    def _that_fit(self, requests: Sequence[DraftRequest]) -> list[DraftRequest]:
        """Those that there are cells for, beside what others have; these make room if need be."""
        chosen: list[DraftRequest] = []
        room = self._context.n_ctx
        for request in requests:
            size = len(request.tokens) + request.most
            if size <= min(room, self._longest):
                chosen.append(request)
                room -= size
        kept = {request.sequence for request in chosen}
        for sequence in [sequence for sequence in self._content if sequence not in kept]:
            if len(self._content[sequence]) <= room:
                room -= len(self._content[sequence])
            else:
                self.forget(sequence)
        return chosen

    def _read(self, requests: Sequence[DraftRequest]) -> dict[int, list[int]]:
        """Read what is new of each request; the first proposals of those that are through."""
        context = self._context
        context.begin()
        budget = context.n_batch
        through: list[tuple[int, int]] = []
        read: dict[int, list[int]] = {}
        for sequence, tokens, *_ in requests:
            content = self._content.get(sequence, [])
            start = min(common_prefix(content, tokens), len(tokens) - 1)
            count = min(len(tokens) - start, budget)
            if count < 1:
                continue
            budget -= count
            if start < len(content):
                context.forget(sequence, start)
                del content[start:]
            done = start + count == len(tokens)
            row = context.add(sequence, start, tokens[start : start + count], int(done))
            read[sequence] = list(tokens[: start + count])
            if done:
                through.append((sequence, row))
        if not read:
            return {}
        if context.decode():
            self._forget_all()
            return {}
        self._content.update(read)
        return {sequence: [int(context.logits(row).argmax())] for sequence, row in through}

    def _forget_all(self) -> None:
        """A step failed or was aborted: what is in the cache is not known."""
        self._context.clear()
        self._content.clear()

    def forget(self, sequence: int) -> None:
        """See :class:`Drafter`."""
        if self._content.pop(sequence, None) is not None:
            self._context.forget(sequence)

    def interrupt(self, on: bool) -> None:
        """See :class:`Drafter`."""
        self._context.abort.set(on)

    def close(self) -> None:
        """See :class:`Drafter`."""
        self._context.close()
        self._model.close()
