"""The routes that take a body, with a JSON text for each place where something hostile can be."""

from __future__ import annotations

from typing import Final

from corpus_base import CANARY, Api


def _of(fields: str, name: str, members: str) -> str:
    """A request with a list of one object. :param members: of the object."""
    return f'{{{fields},"{name}":[{{{members}}}]}}'


_M: Final = '"model":"m","max_tokens":4'
_HI: Final = f'[{{"role":"user","content":"{CANARY}"}}]'


_NUMBERS: Final = (
    "temperature", "top_p", "top_k", "min_p", "seed", "n", "timeout_s", "priority", "num_beams",
    "presence_penalty", "repetition_penalty", "logprobs", "min_tokens", "whatever",
)  # fmt: skip


def _openai(start: str) -> dict[str, dict[str, str]]:
    """What the routes with OpenAI's parameters have alike. :param start: a valid request's."""
    return {
        "texts": {
            "adapter": start + ',"adapter":%s}',
            "user": start + ',"user":%s}',
            "unknown text": start + ',"whatever":%s}',
        },
        "lists": {"unknown list": start + ',"whatever":[%s]}'},
        "objects": {
            "unknown fields": start + ",%s}",
            "unknown object": start + ',"whatever":{%s}}',
            "stream_options": start + ',"stream_options":{%s}}',
        },
        "numbers": {
            name: start + f',"{name}":%s}}'
            for name in _NUMBERS
        },
    }  # fmt: skip


def _with(start: str, **own: dict[str, str]) -> dict[str, dict[str, str]]:
    alike = _openai(start)
    return {kind: {**own.get(kind, {}), **alike[kind]} for kind in alike}


_CHAT: Final = f'{{{_M},"messages":{_HI}'
CHAT: Final = Api(
    "chat",
    "/v1/chat/completions",
    **_with(
        _CHAT,
        texts={
            "content": _of(_M, "messages", '"role":"user","content":%s'),
            "part": _of(_M, "messages", '"role":"user","content":[{"type":"text","text":%s}]'),
            "continued": _of(_M, "messages", '"role":"assistant","content":%s'),
            "refusal": _of(_M, "messages", '"role":"assistant","content":null,"refusal":%s'),
            "thought": _of(
                _M,
                "messages",
                '"role":"assistant","content":[{"type":"thinking","thinking":%s}]',
            ),
            "role": _of(_M, "messages", '"role":%s,"content":"x"'),
            "name": _of(_M, "messages", '"role":"user","content":"x","name":%s'),
            "part's type": _of(_M, "messages", '"role":"user","content":[{"type":%s}]'),
            "model": f'{{"model":%s,"messages":{_HI}}}',
            "stop": _CHAT + ',"stop":%s}',
            "safety_identifier": _CHAT + ',"safety_identifier":%s}',
        },
        lists={
            "messages": f'{{{_M},"messages":[%s]}}',
            "content": _of(_M, "messages", '"role":"user","content":[%s]'),
            "tool_calls": _of(_M, "messages", '"role":"assistant","tool_calls":[%s]'),
            "thoughts": _of(
                _M,
                "messages",
                '"role":"assistant","content":[{"type":"thinking","thinking":[%s]}]',
            ),
            "stop": _CHAT + ',"stop":[%s]}',
            "tools": _CHAT + ',"tools":[%s]}',
            "functions": _CHAT + ',"functions":[%s]}',
            "modalities": _CHAT + ',"modalities":[%s]}',
            "metadata": _CHAT + ',"metadata":{"a":[%s]}}',
        },
        objects={
            "message": _of(_M, "messages", '"role":"user","content":"x",%s'),
            "part": _of(_M, "messages", '"role":"user","content":[{"type":"text","text":"x",%s}]'),
            "metadata": _CHAT + ',"metadata":{%s}}',
            "logit_bias": _CHAT + ',"logit_bias":{%s}}',
            "response_format": _CHAT
            + ',"response_format":{"type":"json_schema","json_schema":{%s}}}',
        },
        numbers={
            "max_tokens": f'{{"model":"m","messages":{_HI},"max_tokens":%s}}',
            "top_logprobs": _CHAT + ',"logprobs":true,"top_logprobs":%s}',
            "logit_bias": _CHAT + ',"logit_bias":{"7":%s}}',
        },
    ),
)

_COMPLETIONS: Final = f'{{{_M},"prompt":"{CANARY}"'
COMPLETIONS: Final = Api(
    "completions",
    "/v1/completions",
    **_with(
        _COMPLETIONS,
        texts={
            "prompt": f'{{{_M},"prompt":%s}}',
            "one of several": f'{{{_M},"prompt":["x",%s]}}',
            "echoed": f'{{{_M},"echo":true,"prompt":%s}}',
            "model": f'{{"model":%s,"prompt":"{CANARY}"}}',
            "stop": _COMPLETIONS + ',"stop":%s}',
        },
        lists={
            "prompt": f'{{{_M},"prompt":[%s]}}',
            "ids": f'{{{_M},"prompt":[1,%s]}}',
            "lists of ids": f'{{{_M},"prompt":[[1],%s]}}',
            "a list of ids": f'{{{_M},"prompt":[[1,%s]]}}',
            "stop": _COMPLETIONS + ',"stop":[%s]}',
        },
        objects={"logit_bias": _COMPLETIONS + ',"logit_bias":{%s}}'},
        numbers={
            "max_tokens": f'{{"model":"m","prompt":"{CANARY}","max_tokens":%s}}',
            "id": f'{{{_M},"prompt":[1,%s]}}',
            "logit_bias": _COMPLETIONS + ',"logit_bias":{"7":%s}}',
        },
    ),
)

_R: Final = '"model":"m","max_output_tokens":4'
_RESPONSES: Final = f'{{{_R},"input":"{CANARY}"'
RESPONSES: Final = Api(
    "responses",
    "/v1/responses",
    **_with(
        _RESPONSES,
        texts={
            "input": f'{{{_R},"input":%s}}',
            "instructions": _RESPONSES + ',"instructions":%s}',
            "content": _of(_R, "input", '"role":"user","content":%s'),
            "part": _of(_R, "input", '"role":"user","content":[{"type":"input_text","text":%s}]'),
            "type": _of(_R, "input", '"type":%s,"role":"user","content":"x"'),
            "model": f'{{"model":%s,"input":"{CANARY}"}}',
        },
        lists={
            "input": f'{{{_R},"input":[%s]}}',
            "content": _of(_R, "input", '"role":"user","content":[%s]'),
            "include": _RESPONSES + ',"include":[%s]}',
            "tools": _RESPONSES + ',"tools":[%s]}',
            "metadata": _RESPONSES + ',"metadata":{"a":[%s]}}',
        },
        objects={
            "item": _of(_R, "input", '"role":"user","content":"x",%s'),
            "metadata": _RESPONSES + ',"metadata":{%s}}',
            "text": _RESPONSES + ',"text":{%s}}',
            "logit_bias": _RESPONSES + ',"logit_bias":{%s}}',
        },
        numbers={"max_output_tokens": f'{{"model":"m","input":"{CANARY}","max_output_tokens":%s}}'},
    ),
)

_MESSAGES: Final = f'{{{_M},"messages":{_HI}'
MESSAGES: Final = Api(
    "messages",
    "/v1/messages",
    **_with(
        _MESSAGES,
        texts={
            "content": _of(_M, "messages", '"role":"user","content":%s'),
            "system": _MESSAGES + ',"system":%s}',
            "system's part": _MESSAGES + ',"system":[{"type":"text","text":%s}]}',
            "model": f'{{"model":%s,"max_tokens":4,"messages":{_HI}}}',
        },
        lists={
            "messages": f'{{{_M},"messages":[%s]}}',
            "content": _of(_M, "messages", '"role":"user","content":[%s]'),
            "system": _MESSAGES + ',"system":[%s]}',
            "stop_sequences": _MESSAGES + ',"stop_sequences":[%s]}',
            "tools": _MESSAGES + ',"tools":[%s]}',
            "mcp_servers": _MESSAGES + ',"mcp_servers":[%s]}',
        },
        objects={
            "message": _of(_M, "messages", '"role":"user","content":"x",%s'),
            "metadata": _MESSAGES + ',"metadata":{%s}}',
            "thinking": _MESSAGES + ',"thinking":{%s}}',
            "logit_bias": _MESSAGES + ',"logit_bias":{%s}}',
        },
        numbers={"max_tokens": f'{{"model":"m","messages":{_HI},"max_tokens":%s}}'},
    ),
)

_COUNTED: Final = f'{{"model":"m","messages":{_HI}'
COUNT_TOKENS: Final = Api(
    "count_tokens",
    "/v1/messages/count_tokens",
    texts={
        "content": _of('"model":"m"', "messages", '"role":"user","content":%s'),
        "system": _COUNTED + ',"system":%s}',
    },
    lists={
        "messages": '{"model":"m","messages":[%s]}',
        "tools": _COUNTED + ',"tools":[%s]}',
    },
    objects={"unknown fields": _COUNTED + ",%s}"},
    numbers={"max_tokens": _COUNTED + ',"max_tokens":%s}'},
)

_E: Final = '"model":"e"'
EMBEDDINGS: Final = Api(
    "embeddings",
    "/v1/embeddings",
    texts={
        "input": f'{{{_E},"input":%s}}',
        "one of several": f'{{{_E},"input":["x",%s]}}',
        "model": f'{{"model":%s,"input":"{CANARY}"}}',
        "format": f'{{{_E},"input":"x","encoding_format":%s}}',
        "user": f'{{{_E},"input":"x","user":%s}}',
    },
    lists={
        "input": f'{{{_E},"input":[%s]}}',
        "ids": f'{{{_E},"input":["x",%s]}}',
        "unknown list": f'{{{_E},"input":"x","whatever":[%s]}}',
    },
    objects={"unknown fields": f'{{{_E},"input":"x",%s}}'},
    numbers={name: f'{{{_E},"input":"x","{name}":%s}}' for name in ("dimensions", "whatever")},
)

_R: Final = '"model":"r"'
RERANK: Final = Api(
    "rerank",
    "/v1/rerank",
    texts={
        "document": f'{{{_R},"query":"x","documents":[%s]}}',
        "document's text": f'{{{_R},"query":"x","documents":[{{"text":%s}}]}}',
        "query": f'{{{_R},"query":%s,"documents":["x","y"]}}',
        "model": f'{{"model":%s,"query":"x","documents":["{CANARY}"]}}',
        "user": f'{{{_R},"query":"x","documents":["x"],"user":%s}}',
    },
    lists={
        "documents": f'{{{_R},"query":"x","documents":[%s]}}',
        "query": f'{{{_R},"query":[%s],"documents":["x"]}}',
    },
    objects={
        "document": f'{{{_R},"query":"x","documents":[{{"text":"x",%s}}]}}',
        "unknown fields": f'{{{_R},"query":"x","documents":["x"],%s}}',
    },
    numbers={
        name: f'{{{_R},"query":"x","documents":["x"],"{name}":%s}}'
        for name in ("top_n", "max_tokens_per_doc")
    },
)
SCORE: Final = Api(
    "score",
    "/v1/score",
    texts={
        "text_2": f'{{{_R},"text_1":"x","text_2":%s}}',
        "queries": f'{{{_R},"queries":[%s],"documents":["x"]}}',
    },
    lists={
        "text_1": f'{{{_R},"text_1":[%s],"text_2":"x"}}',
        "documents": f'{{{_R},"queries":"x","documents":[%s]}}',
    },
    objects={"unknown fields": f'{{{_R},"text_1":"x","text_2":"x",%s}}'},
    numbers={"priority": f'{{{_R},"text_1":"x","text_2":"x","priority":%s}}'},
)

TOKENIZE: Final = Api(
    "tokenize",
    "/tokenize",
    texts={
        "prompt": '{"model":"m","return_token_strs":true,"prompt":%s}',
        "content": '{"model":"m","with_pieces":true,"parse_special":false,"content":%s}',
        "message": _of('"model":"m"', "messages", '"role":"user","content":%s'),
        "model": f'{{"model":%s,"prompt":"{CANARY}"}}',
        "user": '{"model":"m","prompt":"x","user":%s}',
    },
    lists={
        "messages": '{"model":"m","messages":[%s]}',
        "tools": f'{{"model":"m","messages":{_HI},"tools":[%s]}}',
    },
    objects={
        "unknown fields": '{"model":"m","prompt":"x",%s}',
        "template": f'{{"model":"m","messages":{_HI},"chat_template_kwargs":{{%s}}}}',
    },
    numbers={"priority": '{"model":"m","prompt":"x","priority":%s}'},
)
DETOKENIZE: Final = Api(
    "detokenize",
    "/detokenize",
    texts={"user": '{"model":"m","tokens":[7],"user":%s}'},
    lists={"tokens": '{"model":"m","tokens":[%s]}'},
    objects={"unknown fields": '{"model":"m","tokens":[7],%s}'},
    numbers={"priority": '{"model":"m","tokens":[7],"priority":%s}'},
)

_OWN_M: Final = '"model_id":"m","params":{"max_new_tokens":4}'
_OWN: Final = f'{{{_OWN_M},"prompt":"{CANARY}"'
INFERENCE: Final = Api(
    "inference",
    "/v1/inference",
    texts={
        "prompt": f'{{{_OWN_M},"prompt":%s}}',
        "content": _of(_OWN_M, "messages", '"role":"user","content":%s'),
        "name": _of(_OWN_M, "messages", '"role":"user","content":"x","name":%s'),
        "model_id": f'{{"model_id":%s,"prompt":"{CANARY}"}}',
        "request_id": _OWN + ',"request_id":%s}',
        "adapter": _OWN + ',"adapter":%s}',
        "tool_choice": _OWN + ',"tool_choice":%s}',
        "regex": '{"model_id":"m","prompt":"x","params":{"structured_output":{"regex":%s}}}',
    },
    lists={
        "messages": f'{{{_OWN_M},"messages":[%s]}}',
        "tool_calls": _of(_OWN_M, "messages", '"role":"assistant","tool_calls":[%s]'),
        "prompt_token_ids": f'{{{_OWN_M},"prompt_token_ids":[%s]}}',
        "stop_sequences": _OWN + ',"stop_sequences":[%s]}',
        "tools": _OWN + ',"tools":[%s]}',
        "metadata": _OWN + ',"metadata":{"a":[%s]}}',
        "unknown list": _OWN + ',"whatever":[%s]}',
    },
    objects={
        "unknown fields": _OWN + ",%s}",
        "message": _of(_OWN_M, "messages", '"role":"user","content":"x",%s'),
        "params": f'{{"model_id":"m","prompt":"{CANARY}","params":{{%s}}}}',
        "logit_bias": f'{{"model_id":"m","prompt":"{CANARY}","params":{{"logit_bias":{{%s}}}}}}',
        "json_schema": '{"model_id":"m","prompt":"x",'
        '"params":{"structured_output":{"json_schema":{%s}}}}',
        "metadata": _OWN + ',"metadata":{%s}}',
    },
    numbers={
        **{
            name: f'{{"model_id":"m","prompt":"{CANARY}","params":{{"{name}":%s}}}}'
            for name in ("max_new_tokens", "temperature", "seed", "top_k", "num_beams", "logprobs")
        },
        "priority": _OWN + ',"priority":%s}',
        "timeout_s": _OWN + ',"timeout_s":%s}',
        "id": f'{{{_OWN_M},"prompt_token_ids":[%s]}}',
    },
)

_O: Final = '"model":"m","options":{"num_predict":4}'
_OLLAMA: Final = f'{{{_O},"messages":{_HI}'
_OPTIONS: Final = ("temperature", "top_k", "top_p", "seed", "num_predict", "num_ctx", "mirostat")
OLLAMA_CHAT: Final = Api(
    "ollama chat",
    "/api/chat",
    texts={
        "content": _of(_O, "messages", '"role":"user","content":%s'),
        "role": _of(_O, "messages", '"role":%s,"content":"x"'),
        "tool_name": _of(_O, "messages", '"role":"tool","content":"x","tool_name":%s'),
        "model": f'{{"model":%s,"messages":{_HI}}}',
        "keep_alive": _OLLAMA + ',"keep_alive":%s}',
        "format": _OLLAMA + ',"format":%s}',
        "think": _OLLAMA + ',"think":%s}',
    },
    lists={
        "messages": f'{{{_O},"messages":[%s]}}',
        "images": _of(_O, "messages", '"role":"user","content":"x","images":[%s]'),
        "tool_calls": _of(_O, "messages", '"role":"assistant","tool_calls":[%s]'),
        "tools": _OLLAMA + ',"tools":[%s]}',
        "stop": f'{{"model":"m","messages":{_HI},"options":{{"stop":[%s]}}}}',
    },
    objects={
        "message": _of(_O, "messages", '"role":"user","content":"x",%s'),
        "options": f'{{"model":"m","messages":{_HI},"options":{{"num_predict":4,%s}}}}',
        "format": _OLLAMA + ',"format":{%s}}',
        "arguments": _of(
            _O,
            "messages",
            '"role":"assistant","tool_calls":[{"function":{"name":"x","arguments":{%s}}}]',
        ),
    },
    numbers={
        **{
            name: f'{{"model":"m","messages":{_HI},"options":{{"num_predict":4,"{name}":%s}}}}'
            for name in _OPTIONS
        },
        "keep_alive": _OLLAMA + ',"keep_alive":%s}',
        "top_logprobs": _OLLAMA + ',"logprobs":true,"top_logprobs":%s}',
    },
)
OLLAMA_GENERATE: Final = Api(
    "ollama generate",
    "/api/generate",
    texts={
        "prompt": f'{{{_O},"prompt":%s}}',
        "raw prompt": f'{{{_O},"raw":true,"prompt":%s}}',
        "system": f'{{{_O},"prompt":"{CANARY}","system":%s}}',
    },
    lists={"context": f'{{{_O},"prompt":"{CANARY}","context":[%s]}}'},
    objects={"unknown fields": f'{{{_O},"prompt":"{CANARY}",%s}}'},
    numbers={"timeout_s": f'{{{_O},"prompt":"{CANARY}","timeout_s":%s}}'},
)
OLLAMA_EMBED: Final = Api(
    "ollama embed",
    "/api/embed",
    texts={"input": f'{{{_E},"input":%s}}', "one of several": f'{{{_E},"input":["x",%s]}}'},
    lists={"input": f'{{{_E},"input":[%s]}}'},
    objects={"options": f'{{{_E},"input":"x","options":{{%s}}}}'},
    numbers={"dimensions": f'{{{_E},"input":"x","dimensions":%s}}'},
)
OLLAMA_SHOW: Final = Api(
    "ollama show",
    "/api/show",
    texts={"model": '{"model":%s}'},
    lists={"unknown list": '{"model":"m","whatever":[%s]}'},
    objects={"options": '{"model":"m","options":{%s}}'},
    numbers={"unknown number": '{"model":"m","whatever":%s}'},
)

UNLOAD: Final = Api(
    "unload",
    "/v1/admin/models/nobody/unload",
    texts={"unknown text": '{"whatever":%s}'},
    lists={"timeout_s": '{"timeout_s":[%s]}'},
    objects={"unknown fields": "{%s}"},
    numbers={"timeout_s": '{"timeout_s":%s}'},
)
"""Of a model that there is not: what is there stays."""

TALKS: Final = (CHAT, COMPLETIONS, RESPONSES, MESSAGES, INFERENCE, OLLAMA_CHAT)
CONVERSES: Final = (CHAT, RESPONSES, MESSAGES, INFERENCE, OLLAMA_CHAT)
READ_ALIKE: Final = (
    OLLAMA_GENERATE,
    OLLAMA_EMBED,
    OLLAMA_SHOW,
    RERANK,
    SCORE,
    TOKENIZE,
    DETOKENIZE,
)
"""What reads their bodies reads those of others, too: only the whole corpus goes to them."""
EVERY: Final = (*TALKS, COUNT_TOKENS, EMBEDDINGS, UNLOAD, *READ_ALIKE)
