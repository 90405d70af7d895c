"""Bodies that are right in their form and ask for much: long texts, many messages, many answers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Final

from corpus_apis import (
    CHAT,
    COMPLETIONS,
    CONVERSES,
    DETOKENIZE,
    EMBEDDINGS,
    INFERENCE,
    MESSAGES,
    RERANK,
    RESPONSES,
    SCORE,
    TALKS,
    TOKENIZE,
)
from corpus_base import (
    CANARY,
    WHOLE,
    Api,
    Row,
    Sizes,
    Visit,
    as_json,
    body,
    joined,
    quoted,
    repeated,
    rows,
)
from hostile_models import LETTERS, REFUSE, SLOWLY, SPECIAL, vocabulary
from hostile_wire import at_once, head


@lru_cache(2)
def _words(size: int) -> str:
    draw = random.Random(1)
    words: list[str] = []
    left = size
    while left > 0:
        words.append("".join(draw.choices(LETTERS, k=draw.randrange(2, 11))))
        left -= len(words[-1]) + 1
    return " ".join(words)


TEXTS: Final[dict[str, Callable[[int], str]]] = {
    "random words": _words,
    "one word": lambda size: "word" * (size // 4),
    "one letter": lambda size: "a" * size,
    "two letters in turn": lambda size: "ab" * (size // 2),
    "spaces": lambda size: " " * size,
    "line breaks": lambda size: "\n" * (size // 2),  # two bytes each, once they are JSON
    "spaces and letters in turn": lambda size: " a" * (size // 2),
    "digits": lambda size: "1" * size,
    "punctuation": lambda size: "!?.,;:" * (size // 6),
    "capitals": lambda size: "QX" * (size // 2),
    "special tokens": lambda size: "".join(SPECIAL) * (size // 28),
    "one special token": lambda size: "<|end|>" * (size // 7),
    "special tokens that are nearly there": lambda size: "<|end|" * (size // 6),
    "openings of special tokens": lambda size: "<" * size,
    "emoji": lambda size: "👩‍👩‍👧🦜" * (size // 26),
    "CJK": lambda size: "你好世界" * (size // 12),
    "CJK of all kinds": lambda size: "".join(chr(0x4E00 + i % 20_000) for i in range(size // 3)),
    "combining marks": lambda size: "a" + "\u0301" * (size // 2),
    "private characters": lambda size: "\ue000" * (size // 3),
    "NUL": lambda size: "\0" * (size // 6),
    "line separators": lambda size: "\u2028" * (size // 3),
}  # fmt: skip
LENGTHS: Final[dict[str, Callable[[Sizes], int]]] = {
    "all that fits": lambda sizes: sizes.body,
    "a quarter of it": lambda sizes: sizes.body // 4,
    "8,192 characters": lambda _: 8192,
    "60 kB": lambda _: 60_000,
}
SMALL_TEXTS: Final = frozenset({"random words", "one letter", "special tokens"})


def _prompts() -> Iterator[Row]:
    for what, text in TEXTS.items():
        for length, size in LENGTHS.items():
            small = length == "all that fits" and what in SMALL_TEXTS

            def build(
                api: Api,
                sizes: Sizes,
                text: Callable[[int], str] = text,
                size: Callable[[Sizes], int] = size,
            ) -> bytes:
                return body(api.prompt, _quoted(f"{CANARY} {text(size(sizes))}"))

            name = f"a prompt of {what}, {length}"
            yield Row(name, build, (*TALKS, EMBEDDINGS), small=small)
            yield Row(name, build, (RERANK, TOKENIZE))


def _quoted(text: str) -> str:
    """As clients in other languages write JSON: only what must be escaped is."""
    return json.dumps(text, ensure_ascii=False)


def _in_every_text(api: Api, sizes: Sizes) -> bytes:
    """The text in each of ten messages."""
    text = quoted(_words(sizes.body // 10 - 100))
    return body(
        api.lists["input" if api is RESPONSES else "messages"], repeated(_message(text), sizes.body)
    )


def _message(content: str, role: str = "user") -> str:
    return f'{{"role":"{role}","content":{content}}}'


def _messages(count: Callable[[Sizes], int], content: Callable[[int], str]) -> Callable[..., bytes]:
    def build(api: Api, sizes: Sizes) -> bytes:
        roles = ("user", "assistant")
        items = (_message(content(i), roles[i % 2]) for i in range(count(sizes)))
        return body(api.lists["input" if api is RESPONSES else "messages"], joined(items))

    return build


def _parts(part: str) -> Callable[[Api, Sizes], bytes]:
    def build(api: Api, sizes: Sizes) -> bytes:
        kind = "input_text" if api is RESPONSES else "text"
        return body(api.lists["content"], repeated(part.replace("text", kind, 1), sizes.body))

    return build


PART: Final = '{"type":"text","text":"a"}'


# ── parameters ───────────────────────────────────────────────────────────────────────────────


def _bias(members: Callable[[Sizes], str], **more: Any) -> Callable[[Api, Sizes], bytes]:
    def build(api: Api, sizes: Sizes) -> bytes:
        fields = "".join(f',"{name}":{value}' for name, value in more.items())
        template = api.objects["logit_bias"]
        return body(
            template[:-1] + fields + "}" if api is not INFERENCE else template, members(sizes)
        )

    return build


def _vocabulary(_: Sizes) -> str:
    return joined(f'"{i}":-1' for i in range(len(vocabulary()[0])))


BIASES: Final[dict[str, tuple[Callable[[Sizes], str], dict[str, Any]]]] = {
    "the whole vocabulary": (_vocabulary, {}),
    "the whole vocabulary, n: 32": (_vocabulary, {"n": 32}),
    "as many as fit": (lambda s: joined(f'"{i}":1' for i in range(s.body // 11)), {}),
    "ids that there are not, n: 32": (
        lambda s: joined(f'"{i + 10**6}":1' for i in range(s.body // 13)), {"n": 32},
    ),
    "one id over and over": (lambda s: repeated('"7":1', s.body), {}),
    "one id in many ways": (
        lambda s: joined(f'"{"0" * (i % 400)}7":1' for i in range(s.body // 207)), {},
    ),
    "ids that are none": (lambda s: repeated('"x":1', s.body), {}),
    "a giant id": (lambda s: f'"{"9" * s.body}":1', {}),
    "values that are none": (lambda s: joined(f'"{i}":"x"' for i in range(s.body // 13)), {}),
    "negative ids": (lambda s: joined(f'"-{i}":1' for i in range(s.body // 13)), {}),
}  # fmt: skip


def _stops(items: Callable[[Sizes], list[str]]) -> Callable[[Api, Sizes], bytes]:
    def build(api: Api, sizes: Sizes) -> bytes:
        field = "stop_sequences" if "stop_sequences" in api.lists else "stop"
        text = body(api.lists[field], joined(map(quoted, items(sizes)))).decode()
        return text.replace('tokens":4', 'tokens":200', 1).encode()

    return build


STOPS: Final[dict[str, Callable[[Sizes], list[str]]]] = {
    "64 of 256 characters": lambda _: [" " + LETTERS[i % 26] + "x" * 254 for i in range(64)],
    "one of 16,000 characters": lambda _: [_words(16_000)],
    "one as large as fits": lambda sizes: [_words(sizes.body)],
    "many that nearly match": lambda _: [
        " " + a + b for a in "abcdefgh" for b in "\0\1\2\3\4\5\6\7"
    ],
    "each a beginning of the next": lambda _: ["a" * i for i in range(1, 65)],
    "16,000 of a character": lambda _: [chr(0x4E00 + i) for i in range(16_000)],
    "as many as fit": lambda sizes: [" zzz"] * (sizes.body // 8),
}


def _asking(tokens: int = 400, **fields: Any) -> Callable[[Api, Sizes], bytes]:
    """A right request with these fields. :param tokens: most of an answer in the whole corpus."""

    def build(api: Api, sizes: Sizes) -> bytes:
        most = max(1, tokens * sizes.many // WHOLE.many)
        if api is INFERENCE:
            params = {"max_new_tokens": most, **fields}
            return as_json({"model_id": "m", "prompt": CANARY, "params": params})
        messages = {"messages": [{"role": "user", "content": CANARY}]}
        place = {"prompt": CANARY} if api is COMPLETIONS else messages
        return as_json({"model": "m", "max_tokens": most, **place, **fields})

    return build


def _prompts_of(
    items: Callable[[Sizes], str], field: str, **fields: Any
) -> Callable[[Api, Sizes], bytes]:
    def build(api: Api, sizes: Sizes) -> bytes:
        more = "".join(f',"{name}":{value}' for name, value in fields.items())
        return body(api.lists[field][:-1] + more + "}", items(sizes))

    return build


def _inputs(text: Callable[[Sizes], str], count: int | None = None) -> Callable[..., bytes]:
    """:param count: of the texts; ``None``: as many as are worked on."""
    return lambda api, sizes: body(
        api.lists["input"], joined([quoted(text(sizes))] * (count or _texts(sizes)))
    )


def _texts(sizes: Sizes) -> int:
    return min(2048, 2 * sizes.many)


def _by_template(text: Callable[[Sizes], str], count: int = 1) -> Callable[[Api, Sizes], Visit]:
    """A message to the model whose template does what it is told, so often at one time."""

    def build(api: Api, sizes: Sizes) -> Visit:
        template = api.texts["content"].replace('":"m"', '":"slow"', 1)
        data = body(template, quoted(text(sizes)))
        request = head("POST", api.path, len(data)) + data
        return at_once(*[request] * count, patience_s=4 * sizes.patience_s)

    return build


def _in_time(seconds: str) -> Callable[[Api, Sizes], bytes]:
    return lambda api, _: body(api.prompt[:-1] + f',"timeout_s":{seconds}}}', quoted(CANARY))


ANSWERS: Final[dict[str, Callable[[Api, Sizes], bytes]]] = {
    "32 answers": _asking(n=32),
    "32 answers in a stream": _asking(n=32, stream=True),
    "33 answers": _asking(n=33),
    "a milliard of answers": _asking(n=10**9),
    "beams": _asking(50, num_beams=8),
    "beams by the thousand": _asking(50, num_beams=10_000),
    "an answer without end": _asking(max_tokens=10**9, ignore_eos=True),
    "32 answers that may not end": _asking(
        50, n=32, min_tokens=50, top_k=10**9, stop=["a"], stream=True
    ),
    "sampling at its widest": _asking(
        50, n=32, temperature=2, top_k=10**9, top_p=0.999, min_p=1e-9, repetition_penalty=1.5
    ),
}  # fmt: skip
LOGPROBS: Final = {"n": 32, "logprobs": True, "top_logprobs": 20}
PROMPTS: Final[dict[str, Callable[[Api, Sizes], bytes]]] = {
    "token ids, as many as fit": _prompts_of(lambda s: repeated("7", s.body), "ids"),
    "token ids, a context of them": _prompts_of(lambda _: joined(["7"] * 16_000), "ids"),
    "token ids that there are not": _prompts_of(lambda s: repeated("2147483647", s.body), "ids"),
    "lists of token ids, as many as fit": _prompts_of(
        lambda s: repeated("[7]", s.body), "lists of ids"
    ),
    "texts to be continued, as many as fit": _prompts_of(
        lambda s: repeated('"x"', s.body), "prompt"
    ),
    "32 long texts": _prompts_of(
        lambda s: joined([quoted(_words(s.body // 33))] * 32), "prompt"
    ),
    "32 texts, 32 answers to each": _prompts_of(lambda _: joined(['"x"'] * 32), "prompt", n=32),
}  # fmt: skip
CONVERSATIONS: Final[dict[str, Callable[[Api, Sizes], bytes]]] = {
    "as many messages as fit": _messages(lambda s: s.body // 32, lambda _: '"x"'),
    "2,048 messages of one letter": _messages(lambda _: 2048, lambda _: '"x"'),
    "500 messages that differ": _messages(lambda _: 500, lambda i: quoted(f"{i} {CANARY}")),
    "2,048 messages of none": _messages(lambda _: 2048, lambda _: '""'),
    "2,048 messages of a special token": _messages(lambda _: 2048, lambda _: '"<|end|>"'),
    "2,049 messages": _messages(lambda _: 2049, lambda i: quoted(str(i))),
    "ten long messages": _in_every_text,
}
VECTORS: Final[dict[str, Callable[[Api, Sizes], bytes]]] = {
    "as many texts of one letter as are taken": _inputs(lambda _: "x"),
    "vectors as base64": lambda api, sizes: body(
        api.lists["input"].replace("[%s]", '[%s],"encoding_format":"base64"'),
        joined(['"x"'] * _texts(sizes)),
    ),
}
LONG_INPUTS: Final[dict[str, Callable[[Api, Sizes], bytes]]] = {
    "as many texts, as long as fits": _inputs(lambda s: _words(s.body // 2100)),
    "100 texts of a context": _inputs(lambda _: _words(6000), 100),
    "2,049 texts": _inputs(lambda _: "x", 2049),
    "token ids, as many as fit": lambda api, sizes: body(
        api.lists["input"], repeated("7", sizes.body)
    ),
    "lists of token ids, as many as fit": lambda api, sizes: body(
        api.lists["input"], joined([f"[{repeated('7', sizes.body // 2100)}]"] * _texts(sizes))
    ),
}
RANKED: Final[dict[str, Callable[[Api, Sizes], bytes]]] = {
    "as many documents of one letter as are taken": lambda api, sizes: body(
        api.lists["documents"], joined(['"x"'] * _texts(sizes))
    ),
    "as many documents, as long as fits": lambda api, sizes: body(
        api.lists["documents"], joined([quoted(_words(sizes.body // 2100))] * _texts(sizes))
    ),
    "as many documents as fit": lambda api, sizes: body(
        api.lists["documents"], repeated('"x"', sizes.body)
    ),
    "documents that are empty": lambda api, sizes: body(
        api.lists["documents"], repeated('""', sizes.body)
    ),
    "2,049 documents": lambda api, _: body(api.lists["documents"], joined(['"x"'] * 2049)),
    "halves of surrogate pairs": lambda api, _: body(
        api.lists["documents"], joined(['"\\ud800"'] * 2048)
    ),
}
LONG_QUERIES: Final[dict[str, Callable[[Api, Sizes], bytes]]] = {
    "a long query for as many documents as are taken": lambda _, sizes: as_json(
        {"model": "r", "query": _words(sizes.body // 2), "documents": ["x"] * _texts(sizes)}
    ),
    "a query of a context for as many documents as are taken": lambda _, sizes: as_json(
        {"model": "r", "query": _words(6000), "documents": ["x"] * _texts(sizes)}
    ),
}
TOKENS: Final[dict[str, Callable[[Api, Sizes], bytes]]] = {
    "token ids, as many as fit": lambda api, sizes: body(
        api.lists["tokens"], repeated("7", sizes.body)
    ),
    "token ids that are none, as many as fit": lambda api, sizes: body(
        api.lists["tokens"], repeated("2147483647", sizes.body)
    ),
    "special tokens, as many as fit": lambda api, sizes: body(
        api.lists["tokens"], repeated("1", sizes.body)
    ),
}
PATIENT_S: Final = 60.0
"""It is the end of these answers that takes long to write."""
ROWS: Final = (
    *_prompts(),
    *rows(CONVERSES, CONVERSATIONS, small=list(CONVERSATIONS)[:3]),
    *rows(
        (CHAT, RESPONSES, MESSAGES),
        {
            "one message in as many parts as fit": _parts(PART),
            "parts that are empty": _parts(PART.replace('"a"', '""')),
        },
        small={"one message in as many parts as fit"},
    ),
    *rows((CHAT, INFERENCE, MESSAGES), {"a slow template": _by_template(lambda _: SLOWLY)}),
    *rows((CHAT,), {"a crowd at a slow template": _by_template(lambda _: SLOWLY, 8)}, small=True),
    *rows(
        (CHAT, INFERENCE),
        {
            f"a template that says {what} back": _by_template(
                lambda s, text=text: REFUSE + text * (s.body // len(text))
            )
            for what, text in {"paths": "/a", "half of paths": "~/", "dots": "C:\\."}.items()
        },
        small={"a template that says paths back"},
    ),
    *rows(TALKS, {"no time at all": _in_time("1e-9"), "all the time": _in_time("1e300")}),
    *rows(
        (CHAT, COMPLETIONS, INFERENCE),
        {f"logit_bias: {what}": _bias(of, **more) for what, (of, more) in BIASES.items()},
        small={f"logit_bias: {what}" for what in list(BIASES)[:3]},
    ),
    *rows(
        (RESPONSES, MESSAGES),
        {f"logit_bias: {what}": _bias(of) for what, (of, more) in BIASES.items() if not more},
    ),
    *rows(
        (CHAT, COMPLETIONS, MESSAGES, INFERENCE),
        {f"stop sequences: {what}": _stops(stops) for what, stops in STOPS.items()},
        small={f"stop sequences: {what}" for what in list(STOPS)[:2]},
    ),
    *rows(
        (CHAT, COMPLETIONS),
        ANSWERS,
        small={"32 answers", "32 answers in a stream", "beams", "an answer without end"},
    ),
    *rows((CHAT,), {"log probabilities": _asking(**LOGPROBS)}, small=True, patience_s=PATIENT_S),
    *rows((CHAT,), {"log probabilities in streams": _asking(**LOGPROBS, stream=True)}),
    *rows(
        (COMPLETIONS,),
        {"log probabilities": _asking(n=32, logprobs=20)},
        small=True,
        patience_s=PATIENT_S,
    ),
    *rows(
        (INFERENCE,),
        {"log probabilities": _asking(8000, logprobs=20)},
        small=True,
        patience_s=PATIENT_S,
    ),
    *rows((COMPLETIONS,), PROMPTS, small=[name for name in PROMPTS if "fit" in name]),
    *rows(
        (INFERENCE,),
        {"token ids": _prompts_of(lambda s: repeated("7", s.body), "prompt_token_ids")},
        small=True,
    ),
    *rows((EMBEDDINGS,), VECTORS, small=True, patience_s=PATIENT_S),
    *rows((EMBEDDINGS,), LONG_INPUTS, small=list(LONG_INPUTS)[:1]),
    *rows((RERANK,), RANKED, small=list(RANKED)[1:2]),
    *rows((SCORE,), RANKED),
    *rows((RERANK,), LONG_QUERIES, small=list(LONG_QUERIES)[1:]),
    *rows((DETOKENIZE,), TOKENS, small=list(TOKENS)[:1]),
)
