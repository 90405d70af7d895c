"""Items of OpenAI's responses, and the events by which they come to be in a stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import msgspec

from engineroom.generation.deltas import ReasoningDelta, ToolCallDelta
from engineroom.schemas import InferenceResponse, TokenLogprob
from engineroom.server.apis.openai_logprobs import TokenEntry, listed, token_entries
from engineroom.server.apis.tool_fields import is_object
from engineroom.server.http.frames import Answer, dumps, json_text, named_event

__all__ = [
    "FunctionCallItem",
    "ItemStatus",
    "ItemWriter",
    "OutputItem",
    "OutputMessage",
    "ReasoningItem",
]

ItemStatus: TypeAlias = Literal["in_progress", "completed", "incomplete"]


class OutputText(Answer, kw_only=True):
    """A part of a message."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: tuple[Any, ...] = ()
    logprobs: list[TokenEntry] = msgspec.field(default_factory=list)


class OutputMessage(Answer, kw_only=True, tag_field="type", tag="message"):
    """A message."""

    id: str
    role: Literal["assistant"] = "assistant"
    status: ItemStatus
    content: list[OutputText]


class ReasoningText(Answer, kw_only=True):
    """A part of the reasoning."""

    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class ReasoningItem(Answer, kw_only=True, tag_field="type", tag="reasoning"):
    """What the model thought before it answered."""

    id: str
    status: ItemStatus
    summary: tuple[Any, ...] = ()
    content: list[ReasoningText]


class FunctionCallItem(Answer, kw_only=True, tag_field="type", tag="function_call"):
    """A call of one of the tools.

    :param call_id: what its result is sent with.
    """

    id: str
    call_id: str
    name: str
    arguments: str
    status: ItemStatus


OutputItem: TypeAlias = ReasoningItem | OutputMessage | FunctionCallItem
_PREFIXES = {ReasoningItem: "rs", OutputMessage: "msg", FunctionCallItem: "fc"}


class ItemWriter:
    """The items of one response: of a whole answer, or one after another in a stream.

    :param call_id: of the request; the items' ids are made of it.
    """

    def __init__(self, call_id: str) -> None:
        self._call_id = call_id
        self._number = 0
        self._items: list[OutputItem] = []
        self._open: OutputItem | None = None
        self._parts: list[str] = []  # of the open item's text
        self._waiting: list[TokenLogprob] = []  # log probabilities for the next text
        self._told: list[bytes] = []  # and those of the open item, encoded
        self._before = b""

    # ── whole ────────────────────────────────────────────────────────────────────────────────

    def items_of(
        self, response: InferenceResponse, status: ItemStatus, entries: Sequence[bytes] = ()
    ) -> list[OutputItem]:
        """Those of a whole answer: what a stream's last event has.

        :param entries: its log probabilities, encoded; each text has those that come with it, and
            those of what stands before it. The last one has all that are left.
        """
        items: list[OutputItem] = []
        parts, start = response.parts, 0
        ends = [*response.logprobs_of_texts, len(entries)]
        # What is last is as complete as the answer, unless the end cut a call behind it.
        last: ItemStatus = "completed" if response.cut_call else status
        if response.reasoning:
            thought = ReasoningText(text=response.reasoning)
            item_id, ended = self._id(ReasoningItem, 0), "completed" if parts else last
            items.append(ReasoningItem(id=item_id, status=ended, content=[thought]))
        elif not (parts or response.cut_call):
            parts = [""]
        for place, made in enumerate(parts, 1):
            if isinstance(made, str):
                end = ends.pop(0)
                own: Any = listed(entries[start:end])
                text, start = OutputText(text=made, logprobs=own), end
                item_id = self._id(OutputMessage, len(items))
                ended = last if place == len(parts) else "completed"
                items.append(OutputMessage(id=item_id, status=ended, content=[text]))
                continue
            item_id = self._id(FunctionCallItem, len(items))
            items.append(
                FunctionCallItem(
                    id=item_id,
                    call_id=made.id,
                    name=made.name,
                    arguments=made.arguments,
                    status="completed",
                )
            )
        return items

    def _id(self, kind: type[OutputItem], place: int) -> str:
        return f"{_PREFIXES[kind]}_{self._call_id}" + (f"_{place}" if place else "")

    # ── streamed ─────────────────────────────────────────────────────────────────────────────

    def event(self, kind: str, **fields: Any) -> bytes:
        """An event with its number."""
        value = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return named_event(kind, value)

    def message(self) -> bytes:
        """A message begins."""
        begun = self._begin(OutputMessage, OutputText(text=""), content=[])
        kind = "response.output_text.delta"
        delta = dumps({"type": kind, **self._place(), "content_index": 0, "logprobs": []})
        self._before = b'event: %b\ndata: %b,"delta":' % (kind.encode(), delta[:-1])
        return begun

    def frame(self, chunk: str) -> bytes:
        """The events of a chunk."""
        if isinstance(chunk, ReasoningDelta):
            return self._reason(chunk.text)
        if isinstance(chunk, ToolCallDelta):
            return self._call(chunk)
        begun = b""
        if not isinstance(self._open, OutputMessage):
            if not chunk:
                return b""
            begun = self.message()
        self._parts.append(chunk)
        number = self._number
        self._number = number + 1
        return begun + self._before + json_text(chunk) + b',"sequence_number":%d}\n\n' % number

    def with_logprobs(self, chunk: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        """The same; log probabilities go with the next text, for other items have none."""
        self._waiting += logprobs
        if isinstance(chunk, ReasoningDelta | ToolCallDelta):
            return self.frame(chunk)
        begun = b""
        if not isinstance(self._open, OutputMessage):
            if not chunk:
                return b""
            begun = self.message()
        self._parts.append(chunk)
        entries = dumps(token_entries(self._waiting))
        if self._waiting:
            self._told.append(entries[1:-1])
            self._waiting = []
        kind = "response.output_text.delta"
        fields = {**self._place(), "content_index": 0, "delta": chunk}
        fields["logprobs"] = msgspec.Raw(entries)
        return begun + self.event(kind, **fields)

    def end(
        self, response: InferenceResponse, status: ItemStatus
    ) -> tuple[bytes, list[OutputItem]]:
        """The last item ends; with it, all that there are. A call that was cut short is none, nor
        is one that went on as something else.
        """
        known = {made.id for made in response.tool_calls or ()}
        ended = b""
        if isinstance(self._open, FunctionCallItem):
            ended = self._end("completed" if self._open.call_id in known else "incomplete")
        elif self._open is not None:
            ended = self._end("completed" if response.cut_call else status)
        items = [
            item
            for item in self._items
            if not isinstance(item, FunctionCallItem) or item.call_id in known
        ]
        if not items and not response.cut_call:
            ended += self.message() + self._end(status)
            items.append(self._items[-1])
        self._add_waiting(items)
        return ended, items

    def _add_waiting(self, items: list[OutputItem]) -> None:
        """Log probabilities behind the last text go with it, in the final response."""
        places = [n for n, item in enumerate(items) if isinstance(item, OutputMessage)]
        if not (places and self._waiting):
            return
        item = items[places[-1]]
        assert isinstance(item, OutputMessage)
        (part,) = item.content
        told = dumps(part.logprobs)[1:-1]
        own: Any = listed([*filter(None, [told]), *map(dumps, token_entries(self._waiting))])
        part = msgspec.structs.replace(part, logprobs=own)
        items[places[-1]] = msgspec.structs.replace(item, content=[part])

    def _begin(
        self,
        kind: type[OutputItem],
        part: OutputText | ReasoningText | None = None,
        **fields: Any,
    ) -> bytes:
        """What is open ends, and another item begins."""
        ended, place = self._end(self._status()), len(self._items)
        item = kind(id=self._id(kind, place), status="in_progress", **fields)
        self._open, self._parts, self._told = item, [], []
        begun = self.event("response.output_item.added", output_index=place, item=item)
        if part is not None:
            begun += self.event(
                "response.content_part.added", **self._place(), content_index=0, part=part
            )
        return ended + begun

    def _status(self) -> ItemStatus:
        """Of what is open, where something else comes: a call may have turned out to be none."""
        if isinstance(self._open, FunctionCallItem) and not is_object("".join(self._parts)):
            return "incomplete"
        return "completed"

    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open.id, "output_index": len(self._items)}

    def _reason(self, text: str) -> bytes:
        begun = b""
        if not text:
            return b""
        if not isinstance(self._open, ReasoningItem):
            begun = self._begin(ReasoningItem, ReasoningText(text=""), content=[])
        self._parts.append(text)
        fields = {**self._place(), "content_index": 0, "delta": text}
        return begun + self.event("response.reasoning_text.delta", **fields)

    def _call(self, chunk: ToolCallDelta) -> bytes:
        begun = b""
        if chunk.id is not None:
            begun = self._begin(
                FunctionCallItem, call_id=chunk.id, name=chunk.name or "", arguments=""
            )
        if not chunk.arguments:
            return begun
        self._parts.append(chunk.arguments)
        kind = "response.function_call_arguments.delta"
        return begun + self.event(kind, **self._place(), delta=chunk.arguments)

    def _end(self, status: ItemStatus) -> bytes:
        """What is open ends."""
        item, text = self._open, "".join(self._parts)
        if item is None:
            return b""
        place = self._place()
        if isinstance(item, FunctionCallItem):
            done: OutputItem = msgspec.structs.replace(item, arguments=text, status=status)
            kind = "response.function_call_arguments.done"
            ended = self.event(kind, **place, name=item.name, arguments=text)
        else:
            part: Any
            place["content_index"] = 0
            if isinstance(item, ReasoningItem):
                part = ReasoningText(text=text)
                ended = self.event("response.reasoning_text.done", **place, text=text)
            else:
                entries: Any = msgspec.Raw(b"[" + b",".join(self._told) + b"]")
                part = OutputText(text=text, logprobs=entries)
                fields = {**place, "text": text, "logprobs": part.logprobs}
                ended = self.event("response.output_text.done", **fields)
            ended += self.event("response.content_part.done", **place, part=part)
            done = msgspec.structs.replace(item, content=[part], status=status)
        self._items.append(done)
        self._open = None
        index = len(self._items) - 1
        return ended + self.event("response.output_item.done", output_index=index, item=done)
