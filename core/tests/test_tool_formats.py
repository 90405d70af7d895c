"""The table of tool formats: what each describes is read back, and a model's own is found."""

import json
import logging
import re

import pytest
from hypothesis import given, settings, strategies as st

from engineroom import ConfigurationError
from engineroom.generation import format_choice
from engineroom.generation.call_forms import (
    JsonForm,
    NamedForm,
    PythonicForm,
    TaggedForm,
    ToolFormat,
)
from engineroom.generation.format_choice import find_format, find_reasoning, tool_formats
from engineroom.generation.outputs import OutputParser, read_events, read_output
from engineroom.generation.tool_formats import GENERIC, REASONING_FORMATS, TOOL_FORMATS

FORMATS = {item.name: item for item in (GENERIC, *TOOL_FORMATS)}


# ── what a template of a format writes, from the table ───────────────────────────────────────


def written(format_, calls):
    form, texts = format_.form, []
    for number, (name, arguments) in enumerate(calls):
        if isinstance(form, JsonForm):
            call = {form.name_key: name, form.arguments_key: arguments}
            text = json.dumps(call if form.name_key else {name: arguments}, ensure_ascii=False)
            begin = "" if form.separator and number else format_.begin
            text = text if form.many else f"{begin}{text}{format_.end}"
        elif isinstance(form, NamedForm):
            marked = form.dialect.mark.texts[0] if form.dialect.mark else ""
            value = objects(arguments, marked) if marked else json.dumps(arguments)
            head = form.written.format(name=name, index=number)
            text = f"{format_.begin}{form.before}{head}{form.after}{value}{form.close}{format_.end}"
        elif isinstance(form, TaggedForm):
            text = format_.begin + tags(form, name, arguments, number) + format_.end
        elif isinstance(form, PythonicForm):
            text = f"{name}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})"
        else:
            head = f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"
            text = f"{'<|start|>assistant' if number else ''}{head}{json.dumps(arguments)}<|call|>"
        texts.append(text)
    if isinstance(form, PythonicForm):
        body = f"[{', '.join(texts)}]" if form.brackets else "\n".join(texts)
        return f"{format_.begin}{body}{format_.end}"
    if isinstance(form, JsonForm) and form.many:
        return f"{format_.begin}[{', '.join(texts)}]{format_.end}"
    separator = getattr(form, "separator", "") or format_.between
    return format_.section[0] + separator.join(texts) + format_.section[1]


def objects(value, mark):
    if isinstance(value, str):
        return f"{mark}{value}{mark}"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{objects(item, mark)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(objects(item, mark) for item in value) + "]"
    return json.dumps(value)


def tags(form, name, arguments, number):
    parts = [form.call, form.written_call.format(name=name, index=number + 1), form.name_end]
    parts.append(form.gap)
    for key, value in arguments.items():
        kind = type_of(value)
        text = value if kind == "string" else json.dumps(value, ensure_ascii=False)
        if form.cdata and kind == "string":
            text = f"<![CDATA[{text}]]>"
        line = "\n" if form.lines else ""
        said = {"name": key, "string": json.dumps(kind == "string"), "type": kind}
        parts += [form.parameter, form.written_parameter.format(**said), form.parameter_end]
        parts += [form.key_gap, line, text, line, form.value_end, form.gap]
    return "".join([*parts, form.call_end])


def type_of(value):
    kinds = {str: "string", bool: "boolean", int: "integer", list: "array", dict: "object"}
    return kinds.get(type(value), "null")


def tools_of(calls):
    """Tools whose schemas say of each argument what it is."""
    return [
        {
            "type": "function",
            "function": {
                "name": name,
                "parameters": {
                    "type": "object",
                    "properties": {key: {"type": type_of(v)} for key, v in arguments.items()},
                },
            },
        }
        for name, arguments in calls
    ]


# Marks in values are text where the format escapes or counts them; where it does neither, nothing
# can tell.
TEXT = st.text(
    st.characters(codec="utf-8", exclude_characters="<>\r|", exclude_categories=("Cs", "Cc"))
    | st.sampled_from("\n\t")
)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | TEXT,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.from_regex(r"[a-z]{1,5}", fullmatch=True), inner, max_size=3)
    ),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(st.from_regex(r"[a-z]{1,6}", fullmatch=True), VALUE, max_size=4)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=30)
@given(first=ARGUMENTS, second=ARGUMENTS)
def test_what_the_table_says_is_read_back(name, first, second):
    calls = [("get_it", first), ("put-it", second)]
    if isinstance(FORMATS[name].form, PythonicForm):
        calls[1] = ("put.it", second)
    text = written(FORMATS[name], calls)
    for content in ("", "Yes."):
        if content and name in ("llama3-json", "pythonic", "harmony"):
            continue
        parser = OutputParser(FORMATS[name], tools_of(calls))
        output = read_output(read_events(parser, content + text))
        assert [(n, json.loads(a)) for n, a in output.calls] == calls
        assert output.content == content


@pytest.mark.parametrize("name", FORMATS)
def test_the_markers_of_a_format_are_all_there_is_of_control_tokens_in_it(name):
    text = written(FORMATS[name], [("get_it", {"t": "a", "n": 1}), ("put_it", {})])
    tokens = re.findall(r"</?[a-z_]+>|<[|｜][^<>\s]+[|｜]?>|｜\w+｜|\[[A-Z_]+\]", text)
    markers = "\n".join(FORMATS[name].markers)
    assert [token for token in tokens if token not in markers] == []


@pytest.mark.parametrize("name", FORMATS)
def test_a_text_that_is_cut_has_the_calls_that_are_whole_and_no_markup(name):
    format_ = FORMATS[name]
    calls = [("get_it", {"t": "a b", "n": 1, "o": {"x": [None, True]}}), ("put_it", {})]
    text, before = written(format_, calls), ""
    if name not in ("llama3-json", "pythonic", "harmony"):
        before = "Yes."
    seen = set()
    for end in range(len(text) + 1):
        parser = OutputParser(format_, tools_of(calls))
        output = read_output(read_events(parser, before + text[:end]))
        whole = [(name_, json.loads(arguments)) for name_, arguments in output.calls]
        assert whole == calls[: len(whole)]
        seen.add(len(whole))
        left = output.content.removeprefix(before).strip()
        if name in ("llama3-json", "generic"):
            left = left.removeprefix('{"name":')
        assert len(left) < 4 or (name == "pythonic" and left in "[get_it"), left
    assert seen == {0, 1, 2}


# ── the choice ───────────────────────────────────────────────────────────────────────────────


def render_of(format_, calls=2, answer="<|answer|>"):
    """A fake template: renders conversations, with calls of this format."""

    def render(messages, tools):
        text = "".join(f"<|tool|>{tool['function']['name']}" for tool in tools or ())
        for message in messages:
            text += f"<|{message.role}|>" if message.role == "user" else answer
            if message.tool_calls:
                functions = [call["function"] for call in message.tool_calls]
                if len(functions) > calls:
                    return ""
                text += written(
                    format_, [(f["name"], json.loads(f["arguments"])) for f in functions]
                )
            text += f"{message.content or ''}<|end|>"
        return text + answer

    return render


def marks_of(format_):
    return " ".join(format_.templates[0])


@pytest.mark.parametrize("name", [format_.name for format_ in TOOL_FORMATS])
@pytest.mark.parametrize("calls", [2, 1])
def test_a_format_is_found_by_marks_and_proven_by_trial(name, calls):
    answer = "<|start|>assistant" if name == "harmony" else "<|answer|>"
    render = render_of(FORMATS[name], calls, answer)
    assert find_format(marks_of(FORMATS[name]), render).name == name


def test_a_format_is_found_by_trial_where_no_mark_tells():
    assert find_format("no marks", render_of(FORMATS["kimi-k2"])).name == "kimi-k2"


def test_marks_that_a_trial_contradicts_do_not_count(caplog):
    source = marks_of(FORMATS["glm"])
    assert find_format(source, render_of(FORMATS["qwen3-xml"])).name == "qwen3-xml"
    odd = ToolFormat("odd", NamedForm(before="!!", after="??"), "((", "))")
    assert find_format(source, render_of(odd)) is GENERIC
    assert "'glm'" in caplog.text and "tool_format" in caplog.text


def test_a_template_that_writes_no_calls_of_a_history_is_taken_by_its_marks():
    source = marks_of(FORMATS["lfm2"])
    assert find_format(source, lambda messages, tools: "").name == "lfm2"
    assert find_format(source).name == "lfm2"


@pytest.mark.parametrize("source", [None, "", "{{ messages }}"])
def test_without_marks_and_without_a_trial_tools_are_told_in_a_message(source):
    assert find_format(source) is GENERIC


def test_an_option_names_a_format():
    assert find_format("anything", None, "mistral").name == "mistral"
    assert find_reasoning("<think>", "mistral").name == "mistral"
    assert find_reasoning("<think>", "none") is None
    with pytest.raises(ConfigurationError, match="tool_format 'x' is not known.* hermes,"):
        find_format(None, None, "x")
    with pytest.raises(ConfigurationError, match="reasoning_format 'x' is not known; .*none"):
        find_reasoning(None, "x")


@pytest.mark.parametrize("name", [format_.name for format_ in REASONING_FORMATS])
def test_reasoning_is_found_by_marks(name):
    format_ = next(item for item in REASONING_FORMATS if item.name == name)
    assert find_reasoning(" ".join(format_.forms[0])) is format_
    assert find_reasoning("{{ messages }}") is None


def test_names_are_names():
    for table in (TOOL_FORMATS, REASONING_FORMATS):
        names = [item.name for item in table]
        assert len(set(names)) == len(names)


class FakeEntry:
    def __init__(self, name, value):
        self.name, self.value = name, value

    def load(self):
        if isinstance(self.value, BaseException):
            raise self.value
        return self.value


@pytest.fixture
def entries(monkeypatch):
    """Sets what packages offer."""

    def offer(*entries):
        monkeypatch.setattr(format_choice, "entry_points", lambda group: entries)
        tool_formats.cache_clear()

    yield offer
    tool_formats.cache_clear()


def test_other_packages_add_formats_which_come_first(entries, caplog):
    own = ToolFormat("odd", NamedForm(before="!!", after="??"), "((", "))", templates=(("((",),))
    mine = ToolFormat("hermes", JsonForm(), "<call>", "</call>")
    entries(
        FakeEntry("odd", own),
        FakeEntry("hermes", mine),
        FakeEntry("broken", ImportError("no")),
        FakeEntry("wrong", 3),
    )
    with caplog.at_level(logging.WARNING):
        assert find_format("((", render_of(own)) is own
    assert find_format(None, None, "hermes") is mine
    assert "'broken'" in caplog.text and "'wrong'" in caplog.text
    assert {format_.name for format_ in tool_formats()} == set(FORMATS) | {"odd"}


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"templates": ("<<tool ",)}, "templates must be a tuple of groups"),
        ({"templates": "<<tool "}, "templates must be a tuple of groups"),
        ({"templates": None}, "templates must be a tuple of groups"),
        ({"begin": 3}, "begin must be text"),
        ({"form": "json"}, "form must be a form of calls, not str"),
        ({"section": ("a",)}, "section must be two texts"),
        ({"ignored": "ab"}, "ignored must be a tuple of texts"),
    ],
)
def test_a_format_of_another_package_with_wrong_parts_is_left_out(entries, caplog, values, problem):
    entries(FakeEntry("odd", ToolFormat(**{"name": "odd", "form": JsonForm(), **values})))
    with caplog.at_level(logging.WARNING):
        assert "odd" not in {format_.name for format_ in tool_formats()}
    assert problem in caplog.text


def test_a_format_whose_import_ends_the_process_ends_nothing(entries, caplog):
    entries(FakeEntry("odd", SystemExit(1)))
    assert find_format("((") is GENERIC
    assert "'odd' cannot be loaded" in caplog.text
