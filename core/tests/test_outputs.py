"""Content, reasoning and calls in a model's text, whatever the pieces that it comes in."""

import ast
import json
import logging
import sys
from itertools import pairwise

import pytest
from hypothesis import given, settings, strategies as st

from engineroom.generation.call_forms import ReasoningFormat, ToolFormat
from engineroom.generation.literal_scanner import JSON, PYTHON, scan_value
from engineroom.generation.output_events import CallArguments, CallBegin, CallEnd, Content
from engineroom.generation.outputs import OutputParser, read_events, read_output
from engineroom.generation.text_source import CutError, MalformedError, TextSource
from engineroom.generation.tool_formats import GENERIC, REASONING_FORMATS, TOOL_FORMATS

FORMATS = {item.name: item for item in (GENERIC, *TOOL_FORMATS)}
REASONING = {item.name: item for item in REASONING_FORMATS}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "say",
            "parameters": {
                "type": "object",
                "properties": {"t": {"type": "string"}, "n": {"type": "integer"}, "o": {}},
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.ERROR)


def reasoning_of(name):
    """What the models of a format have around their reasoning."""
    return REASONING.get(name, None if name == "harmony" else REASONING["think"])


def parser_of(format_, **options):
    options.setdefault("reasoning", reasoning_of(format_))
    return OutputParser(FORMATS[format_], TOOLS, **options)


def read(format_, text, **options):
    output = read_output(read_events(parser_of(format_, **options), text))
    calls = [(name, json.loads(arguments)) for name, arguments in output.calls]
    return output.content, output.reasoning, calls


def merged(events):
    """Events, with those joined that differ in where their text is cut."""
    joined = []
    for event in events:
        same = joined and type(joined[-1]) is type(event) and hasattr(event, "text")
        if same and event[:-1] == joined[-1][:-1]:
            joined[-1] = joined[-1]._replace(text=joined[-1].text + event.text)
        else:
            joined.append(event)
    return joined


def in_pieces(parser, text, cuts):
    events, places = [], sorted({0, *(cut % (len(text) + 1) for cut in cuts), len(text)})
    for start, end in pairwise(places):
        events += parser.feed(text[start:end])
    return events + parser.finish()


def marks_of(format_: ToolFormat):
    """What a format's texts are made of."""
    form = format_.form
    fields = [getattr(form, name) for name in form.__dataclass_fields__] if form else []
    marks = [format_.begin, format_.end, *format_.section, *format_.ignored, *fields]
    if (reasoning := reasoning_of(format_.name)) is not None:
        marks += [reasoning.begin, reasoning.end]
    marks = [mark for mark in marks if isinstance(mark, str) and mark]
    return [*marks, *(mark.strip() for mark in marks), *(mark[: len(mark) // 2] for mark in marks)]


PARTS = [
    "say", "now", "{", "}", "[", "]", '{"name": "say", "arguments": {', '"t": "x', '"', ":", ", ",
    '"function": ', "'", '"parameters": ', "say(t='x'", ")", "(", "=", "\n", "  ", "word", "é🌸",
    "\\", "\\ud83c", "1", "null", "<", ">", ' name="say"', ' name="t"', ' string="true"',
    "<|start|>assistant", "<|end|>", "<|channel|>analysis", "<|channel|>final", "<|message|>",
    " to=functions.say", "<|call|>", "|",
]  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=40)
@given(data=st.data())
def test_where_a_text_is_cut_makes_no_difference(name, data):
    marks = marks_of(FORMATS[name])
    parts = st.sampled_from(PARTS) | st.sampled_from(marks or PARTS)
    text = "".join(data.draw(st.lists(parts, max_size=25)))
    tail = data.draw(st.sampled_from(["", "<think>\n", "<|start|>assistant"]))
    whole = merged(read_events(parser_of(name, prompt_tail=tail), text))
    cuts = data.draw(st.lists(st.integers(0, 500), max_size=8))
    assert merged(in_pieces(parser_of(name, prompt_tail=tail), text, cuts)) == whole
    assert merged(in_pieces(parser_of(name, prompt_tail=tail), text, range(500))) == whole
    for name_, arguments in read_output(whole).calls:
        assert isinstance(json.loads(arguments), dict), name_


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


def scanned(text, dialect, cuts=()):
    """A value as JSON, and what is left of the text."""
    source, parts = TextSource(), []
    machine = scan_value(source, dialect, parts.append)
    places = sorted({0, *(cut % (len(text) + 1) for cut in cuts), len(text)})
    for start, end in pairwise(places):
        source.feed(text[start:end])
        next(machine, None)
    source.ended = True
    next(machine, None)
    return "".join(parts), source.take(len(text))


@given(VALUES, st.booleans(), st.sampled_from([None, 1]), st.lists(st.integers(0, 99), max_size=5))
def test_json_comes_out_as_it_went_in(value, ascii_only, indent, cuts):
    text = json.dumps([value], ensure_ascii=ascii_only, indent=indent)
    assert scanned(text + ",", JSON, cuts) == (text, ",")


@given(VALUES, st.lists(st.integers(0, 99), max_size=5))
def test_python_comes_out_as_json(value, cuts):
    text, rest = scanned(f"{value!r})", PYTHON, cuts)
    assert json.loads(text) == ast.literal_eval(repr(value)) and rest == ")"


@pytest.mark.parametrize(
    ("text", "json_text"),
    [
        ('"a\nb\tc"', '"a\\nb\\tc"'),
        (r'"\d+\.\w"', r'"\\d+\\.\\w"'),
        (r'"it\'s"', '"it\'s"'),
        (r'"\ud83c\udf78"', r'"\ud83c\udf78"'),
        (r'"\ud83c!"', r'"\ufffd!"'),
        (r'"\udf78\ud83c"', r'"\ufffd\ufffd"'),
        ("[True, None]", "[true, null]"),
        ("[1, 2, ]", "[1, 2]"),
        ("{'a': 'b \"c\"'}", '{"a": "b \\"c\\""}'),
    ],
)
def test_what_no_reader_of_json_takes_is_mended(text, json_text):
    assert scanned(text, JSON) == (json_text, "")
    json.loads(json_text).encode() if isinstance(json.loads(json_text), str) else None


@pytest.mark.parametrize(
    "text", ["[1,,]", "{a: 1}", '{"a" 1}', "[NaN]", "[01]", "[1 2]", "}", "[" * 200, "9" * 2000]
)
def test_what_is_no_json_is_refused(text):
    with pytest.raises(MalformedError):
        scanned(text, JSON)


@pytest.mark.parametrize("text", ["[1, 2", '"a', '{"a":', '"\\', '"\\u00', "[1", ""])
def test_a_value_that_is_cut_is_none(text):
    with pytest.raises(CutError):
        scanned(text, JSON)


CALL = '{"name": "say", "arguments": {"t": "a </tool_call> b"}}'
CALLED = [("say", {"t": "a </tool_call> b"})]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        # A mark in a string is text.
        ("hermes", f"<tool_call>{CALL}</tool_call>", ("", "", CALLED)),
        ("generic", CALL, ("", "", CALLED)),
        (
            "hermes",
            '<tool_call>{"name": "say", "arguments": {"t": "if (x) { return y }"}}</tool_call>',
            ("", "", [("say", {"t": "if (x) { return y }"})]),
        ),
        (
            "mistral-list",
            '[TOOL_CALLS][{"name": "say", "arguments": {"t": "a]b"}}]',
            ("", "", [("say", {"t": "a]b"})]),
        ),
        # What is no call is content, marks and all.
        ("hermes", "Use <tool_call> for a call.", ("Use <tool_call> for a call.", "", [])),
        ("hermes", "<tool_call>{1}</tool_call> x", ("<tool_call>{1}</tool_call> x", "", [])),
        ("qwen3-xml", "Write <tool_call> here: " + "x" * 400, None),
        ("glm", "A <tool_call> is a mark.", ("A <tool_call> is a mark.", "", [])),
        ("llama3-json", '{"capital": "Paris"}', ('{"capital": "Paris"}', "", [])),
        ("llama3-json", '{"name": "Bob", "parameters": {}}', None),
        ("pythonic", "[link](https://a.b)", ("[link](https://a.b)", "", [])),
        ("pythonic", "[print(x=1)]", ("[print(x=1)]", "", [])),
        ("generic", "{", ("{", "", [])),
        ("deepseek-v3.1", "<｜tool▁calls▁begin｜>no call<｜tool▁calls▁end｜>.", None),
        ("harmony", "Just text.", ("Just text.", "", [])),
        # A call that the end of the text cuts is none, and its markup no content.
        ("hermes", 'Hm.\n<tool_call>{"name": "say", "argum', ("Hm.", "", [])),
        ("hermes", "Hm.\n<tool_call>", ("Hm.", "", [])),
        ("mistral", "Hm.[TOOL_CALLS]", ("Hm.", "", [])),
        ("kimi-k2", "Hm.<|tool_calls_section_begin|>", ("Hm.", "", [])),
        # Forms that models take liberties with.
        ("hermes", '<tool_call>{"name": "now"}</tool_call>', ("", "", [("now", {})])),
        (
            "hermes",
            '<tool_call>{"name": "now", "arguments": null}}</tool_call>!',
            ("!", "", [("now", {})]),
        ),
        (
            "hermes",
            '<tool_call>{"name": "say", "arguments": "{\\"t\\": \\"x\\"}"}</tool_call>',
            ("", "", [("say", {"t": "x"})]),
        ),
        (
            "hermes",
            '<tool_call>{"id": 1, "function": {"name": "say", "arguments": {}}}</tool_call>',
            ("", "", [("say", {})]),
        ),
        (
            "hermes",
            '<tool_call>{"name": "say", "arguments": {"n": 1}\n</tool_call>!',
            ("!", "", [("say", {"n": 1})]),
        ),
        (
            "hermes",
            "<tool_call>{'name': 'say', 'arguments': {'t': 'it\\'s'}}</tool_call>",
            ("", "", [("say", {"t": "it's"})]),
        ),
        (
            "llama3-json",
            '{"name": "now", "parameters": {}}; {"name": "say", "parameters": {"n": 1}}',
            ("", "", [("now", {}), ("say", {"n": 1})]),
        ),
        ("mistral", '[TOOL_CALLS] [{"name": "now", "arguments": {}}]', ("", "", [("now", {})])),
        ("mistral", '[TOOL_CALLS]say{"n": 2}', ("", "", [("say", {"n": 2})])),
        (
            "hermes",
            '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
            ("", "", [("other", {})]),
        ),
        ("mistral", "Write [TOOL_CALLS] and so", ("Write [TOOL_CALLS] and so", "", [])),
        ("mistral", "[TOOL_CALLS]sa", ("", "", [])),
        # Reasoning.
        ("hermes", "<think>\nWhy?\n</think>\n\nSo.", ("So.", "Why?", [])),
        ("hermes", "So <think> is a mark.", ("So <think> is a mark.", "", [])),
        (
            "hermes",
            f"<think>I write\n<tool_call>{CALL}</tool_call>\nor not</think>No.",
            ("No.", f"I write\n<tool_call>{CALL}</tool_call>\nor not", []),
        ),
        (
            "hermes",
            f"<think>I call.\n<tool_call>{CALL}</tool_call>",
            ("", "I call.", CALLED),
        ),
    ],
)  # fmt: skip
def test_what_is_what(name, text, expected):
    assert read(name, text) == ((text, "", []) if expected is None else expected)


def test_arguments_come_as_fragments_and_the_name_before_them():
    parser = parser_of("hermes")
    pieces = ['<tool_call>{"name": "say", ', '"arguments": {"t": "a', "b", '"}}', "</tool_call>"]
    assert [parser.feed(piece) for piece in pieces] == [
        [],
        [CallBegin(0, "say"), CallArguments(0, '{"t": "a')],
        [CallArguments(0, "b")],
        [CallArguments(0, '"}'), CallEnd(0)],
        [],
    ]
    assert parser.finish() == []


def test_content_comes_at_once_but_what_may_begin_a_call():
    parser = parser_of("hermes")
    assert parser.feed("Hello <to") == [Content("Hello")]
    assert parser.feed("ol> ") == [Content(" <tool>")]
    assert parser.finish() == [Content(" ")]


def test_a_call_that_turns_out_to_be_none_has_no_end_and_comes_back_as_content():
    text = '<tool_call>{"name": "say", "arguments": {"t": 1]}}</tool_call>'
    call = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    events = read_events(parser_of("hermes"), text + call)
    assert read_output(events) == (text, "", [("now", "{}")])
    assert [event.call for event in events if isinstance(event, CallEnd)] == [1]


def limited(name, text, **options):
    """What comes of a text that a limit ends, and whether it ended within a call."""
    parser = parser_of(name, **options)
    output = read_output(parser.feed(text) + parser.finish(limited=True))
    return (output.content, output.reasoning, len(output.calls)), parser.cut_call


@pytest.mark.parametrize(
    ("name", "text", "expected", "cut"),
    [
        # The beginning of a marker, however short, where one may begin.
        ("hermes", "<", ("", "", 0), True),
        ("hermes", "Yes. <to", ("Yes.", "", 0), True),
        ("hermes", "Yes.\n<", ("Yes.", "", 0), True),
        ("hermes", "<th", ("", "", 0), False),
        ("hermes", "<think>So</t", ("", "So", 0), False),
        ("hermes", "<think>So<", ("", "So", 0), False),
        ("mistral", "Yes.[TO", ("Yes.", "", 0), True),
        ("mistral", "[TH", ("", "", 0), False),
        ("qwen3-xml", "Yes.\n<tool_call>\n<fun", ("Yes.", "", 0), True),
        ("harmony", " to", ("", "", 0), False),
        ("llama3-json", '{"name": "sa', ("", "", 0), True),
        # A tool's name, before it is complete or has come.
        ("llama3-json", "{", ("", "", 0), True),
        ("llama3-json", ' {"na', ("", "", 0), True),
        ("llama3-json", '{"name": ', ("", "", 0), True),
        ("llama3-json", '{"type": "function", "nam', ("", "", 0), True),
        ("pythonic", "[", ("", "", 0), True),
        ("pythonic", "[s", ("", "", 0), True),
        # Nothing but markup is missing: what a stream has told of the arguments is not complete.
        ("hermes", '<tool_call>\n{"name": "now", "arguments": {}', ("", "", 0), True),
        ("llama3-json", '{"name": "now", "parameters": {}', ("", "", 0), True),
        ("apertus", '<|tools_prefix|>[{"now": {}', ("", "", 0), True),
        ("llama3-json", '{"name": "now", "parameters": {}}; {"na', ("", "", 1), True),
        ("pythonic", "[now(), sa", ("", "", 1), True),
        ("qwen3-xml", "<think>So.\n<tool_call>\n<function=say>\n", ("", "So.", 0), True),
        # What may well be text.
        ("hermes", "if a<", ("if a<", "", 0), False),
        ("hermes", "Yes </", ("Yes </", "", 0), False),
        ("hermes", "Yes <th", ("Yes <th", "", 0), False),
        ("mistral", "list[", ("list[", "", 0), False),
        ("llama3-json", '{"city', ('{"city', "", 0), False),
        ("llama3-json", '{"type": "obj', ('{"type": "obj', "", 0), False),
        ("pythonic", "[1, 2", ("[1, 2", "", 0), False),
        ("pythonic", "[saw", ("[saw", "", 0), False),
        ("llama3-json", '{"name": "Bob', ('{"name": "Bob', "", 0), False),
        # The model has ended it: nothing is cut.
        ("hermes", "Yes. <to", None, False),
        ("hermes", "<th", None, False),
        ("mistral", "Yes.[TO", None, False),
    ],
)
def test_what_a_limit_cuts(name, text, expected, cut):
    if expected is None:
        assert read(name, text) == (text, "", [])
    else:
        assert limited(name, text) == (expected, cut)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", '<tool_call>\n{"name": "now", "arguments": {"a": {}}'),
        ("hermes", '<tool_call>\n{"name": "now", "arguments": {"a": {}}]'),
        ("llama3-json", '{"name": "now", "parameters": {"a": {}}, "id": 3'),
    ],
)
def test_arguments_of_what_is_no_call_are_never_complete(name, text):
    parser = parser_of(name)
    events = [event for character in text for event in parser.feed(character)]
    events += parser.finish()
    told = "".join(event.text for event in events if isinstance(event, CallArguments))
    assert told == '{"a": {}' and not any(isinstance(event, CallEnd) for event in events)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("generic", '<tool_call>\n{"name": "say", "arguments": {"t": "x"}}\n</tool_call>'),
        ("hermes", '\n<tool_call>\n{"name": "say", "arguments": {"t": "x"}}\n</tool_call>'),
        ("llama3-json", '{"name": "say", "parameters": {"t": "x"}}; {"name": "now"'),
        ("mistral", '[TOOL_CALLS]say[ARGS]{"t": "x"}[TOOL_CALLS]now[ARGS]{}'),
        ("mistral-list", '[TOOL_CALLS][{"name": "say", "arguments": {}}, {"name": "now"'),
        ("qwen3-xml", "<tool_call>\n<function=say>\n<parameter=t>\nx\n</parameter>\n</function>"),
        ("harmony", ' to=functions.say<|channel|>commentary <|constrain|>json<|message|>{"t": 1}'),
        (
            "deepseek-v3",
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>say\n```json\n{",
        ),
    ],
)  # fmt: skip
def test_where_there_have_to_be_calls_a_limit_leaves_no_content(name, text):
    for at in range(1, len(text)):
        (content, reasoning, _), _ = limited(name, text[:at], only_calls=True)
        assert (content, reasoning) == ("", ""), text[:at]


def test_without_tools_nothing_is_a_call():
    for text in ("a <", "a <to", "[TO"):
        parser = OutputParser(FORMATS["hermes"], None)
        assert read_output(parser.feed(text) + parser.finish(limited=True)).content == text
    for tools in (None, []):
        parser = OutputParser(FORMATS["hermes"], tools, reasoning=REASONING["think"])
        text = f"<think>a</think><tool_call>{CALL}</tool_call>"
        assert read_output(read_events(parser, text)).content == text.partition("</think>")[2]


@pytest.mark.parametrize(
    ("tail", "reasoning", "content"),
    [
        ("<|assistant|><think>\n", "a", "b"),
        ("<think>\n\n</think>\n\n", "", "a</think>b"),
        ("<|assistant|>", "", "a</think>b"),
    ],
)
def test_the_end_of_the_prompt_says_whether_reasoning_has_begun(tail, reasoning, content):
    assert read("hermes", "a</think>b", prompt_tail=tail) == (content, reasoning, [])


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("hm</think>\n\n</think>\n\nyes", "yes"),
        ("hm</think></think>yes", "yes"),
        ("hm</think>\n</think> </think>yes", "yes"),
        ("</think>\n\n</think>yes", "yes"),
        ("<think>hm</think>\n\n</think>yes", "yes"),
        ("hm</think>\n\nyes</think>", "yes</think>"),
        ("hm</think>\n\n< yes", "< yes"),
        ("hm</think>\n\n</thin", ""),
        ("hm</think>\n\n</think>", ""),
        ('hm</think>\n\n</think>\n<tool_call>\n{"name": "now"}\n</tool_call>', ""),
    ],
)
def test_a_model_whose_reasoning_was_ended_may_end_it_once_more(text, content):
    options = {"prompt_tail": "" if text.startswith("<think>") else "<think>\n", "bounded": True}
    assert read("hermes", text, **options)[0] == content
    whole = merged(in_pieces(parser_of("hermes", **options), text, ()))
    for cut in range(1, len(text)):
        assert merged(in_pieces(parser_of("hermes", **options), text, (cut,))) == whole
    assert merged(in_pieces(parser_of("hermes", **options), text, range(1, len(text)))) == whole


def test_nothing_is_left_of_a_second_end_that_a_limit_cuts():
    text = "hm</think>\n\n</think>yes"
    for end in range(text.index("\n"), len(text)):
        parser = parser_of("hermes", prompt_tail="<think>\n", bounded=True)
        output = read_output(parser.feed(text[:end]) + parser.finish(limited=True))
        assert "yes".startswith(output.content) and output.reasoning == "hm"


def test_without_a_bound_the_end_of_reasoning_is_content_behind_it():
    assert read("hermes", "hm</think>\n</think>yes", prompt_tail="<think>\n")[0] == "</think>yes"


def test_a_reasoning_format_may_stand_alone():
    parser = OutputParser(None, TOOLS, reasoning=ReasoningFormat("x", "<a>", "</a>"))
    assert read_output(read_events(parser, "<a>b</a>c")) == ("c", "b", [])


HOSTILE = {
    "generic": ['<tool_call>{"function":', '{"function":', "["],
    "hermes": ["<", "<tool_call>", '<tool_call>{"a":', "<tool_call>{", " ", "\n", "<think>", "{"],
    "qwen3-xml": ["<tool_call>\n<function=f>\n<parameter=a>\n", "</parameter>", "<parameter="],
    "glm": ["</arg_value>", "<tool_call>f<arg_key>", "</tool_call>"],
    "llama3-json": ['{"name":', "[", "{"],
    "pythonic": ["[", "[f(", "(", "[f(a=", "'"],
    "mistral": ["[TOOL_CALLS]", "[", "[TOOL_CALLS]f[ARGS]{"],
    "gemma4": ["<|tool_call>call:f{a:", '<|"|>', "["],
    "harmony": ["<|channel|>", "<|start|>assistant", "<|end|>", "<|message|>", "to="],
    "deepseek-v3": ["<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>", "```"],
}  # fmt: skip
BEGUN = {
    "hermes": '<tool_call>{"name": "say", "arguments": {"t": ',
    "qwen3-xml": "<tool_call>\n<function=say>\n<parameter=t>\n",
    "glm": "<tool_call>say<arg_key>t</arg_key><arg_value>",
    "pythonic": "[say(t=",
    "gemma4": "<|tool_call>call:say{t:",
}


def effort(name, text):
    """Calls of functions that a text takes, character by character; little of it waits."""
    parser, count = parser_of(name), 0

    def profile(frame, event, _):
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        for character in text:
            parser.feed(character)
            assert len(parser._source._text) < 1000
        parser.finish()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("name", HOSTILE)
def test_every_character_costs_the_same(name):
    for begun in {"", BEGUN.get(name, "")}:
        for part in [*HOSTILE[name], '"', "x", "\\", "9"]:
            short, long = (effort(name, begun + part * (n // len(part))) for n in (300, 1200))
            assert long < 6 * short + 500, (begun, part)
