"""What a row of the corpus is: a name, the routes that it goes to, and what is sent there.

Sizes scale, so that a small corpus and the whole one come out of the same rows.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from hostile_wire import Answer, post

CANARY: Final = "quetzalcoatlus"
"""In every prompt of the corpus; the server's log must not have it."""


@dataclass(frozen=True)
class Sizes:
    """How large the requests of the corpus are.

    :param body: bytes of a large body; the server takes 4 MiB.
    :param many: items of what is counted rather than weighed, and worked on.
    :param often: connections and cancellations of a row.
    :param patience_s: after so long a client goes away.
    """

    body: int
    many: int
    often: int
    patience_s: float


SMALL: Final = Sizes(body=400_000, many=160, often=30, patience_s=0.35)
WHOLE: Final = Sizes(body=3_900_000, many=2048, often=300, patience_s=4.0)

Visit: TypeAlias = Callable[[int], Awaitable[list[Answer]]]
"""Goes to a port and comes back with the answers, those that there were."""


@dataclass(frozen=True)
class Api:
    """A route that takes a JSON body, and how to say things to it.

    :param texts: JSON with ``%s`` where a text stands, quotes included, by name of the field.
    :param lists: JSON with ``%s`` where items of a list stand, by name of the field.
    :param objects: JSON with ``%s`` where members of an object stand.
    :param numbers: JSON with ``%s`` where a number stands.
    """

    name: str
    path: str
    texts: Mapping[str, str]
    lists: Mapping[str, str]
    objects: Mapping[str, str]
    numbers: Mapping[str, str]

    @property
    def prompt(self) -> str:
        """The first of ``texts``, which the model reads."""
        return next(iter(self.texts.values()))


@dataclass(frozen=True)
class Row:
    """One kind of hostile request.

    :param build: makes what is sent to a route: bodies, each a request of its own, or a visit.
    :param apis: where it goes; none: it says itself where.
    :param small: it is in the small corpus, too.
    :param patience_s: how long a client waits for the answer, where that is what may hold the loop.
    """

    name: str
    build: Callable[[Any, Sizes], bytes | Visit]
    apis: tuple[Api, ...] = ()
    small: bool = False
    patience_s: float | None = None

    def visits(self, sizes: Sizes) -> Iterator[tuple[str, Callable[[], Visit]]]:
        """Each route's name, and what makes its visit when it is needed: bodies are large."""
        if not self.apis:
            yield "", lambda: self._visit(None, sizes)
        for api in self.apis:
            yield api.name, lambda api=api: self._visit(api, sizes)

    def _visit(self, api: Api | None, sizes: Sizes) -> Visit:
        built = self.build(api, sizes)
        if not isinstance(built, bytes):
            return built
        assert api is not None
        return post(api.path, built, patience_s=self.patience_s or sizes.patience_s)


def rows(
    apis: tuple[Api, ...],
    table: Mapping[str, Callable[[Any, Sizes], bytes | Visit]],
    *,
    small: bool | Collection[str] = False,
    patience_s: float | None = None,
) -> Iterator[Row]:
    """Rows that go to the same routes.

    :param table: their names, and what builds them.
    :param small: which of them are in the small corpus.
    """
    for name, build in table.items():
        is_small = small if isinstance(small, bool) else name in small
        yield Row(name, build, apis, small=is_small, patience_s=patience_s)


def quoted(text: str) -> str:
    return json.dumps(text)


def repeated(item: str, size: int, separator: str = ",") -> str:
    """The item as often as fits into so many bytes."""
    count = max(1, size // (len(item) + len(separator)))
    return separator.join([item] * count)


def joined(items: Iterable[str]) -> str:
    return ",".join(items)


def body(template: str, hole: str) -> bytes:
    """:param hole: what stands at the template's ``%s``."""
    return template.replace("%s", hole, 1).encode("utf-8", "surrogatepass")


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()
