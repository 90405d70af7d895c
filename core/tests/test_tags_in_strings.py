"""A tag inside of a string of JSON is text, in every format whose arguments are JSON."""

import json

import pytest

from engineroom.generation.call_forms import JsonForm, NamedForm, TaggedForm
from engineroom.generation.literal_scanner import JSON
from engineroom.generation.outputs import OutputParser, read_output
from engineroom.generation.tool_formats import GENERIC, TOOL_FORMATS

FORMATS = {item.name: item for item in (GENERIC, *TOOL_FORMATS)}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "say",
            "parameters": {"type": "object", "properties": {"o": {"type": "object"}}},
        },
    }
]


def written(format_, value):
    """A call of ``say`` whose argument ``o`` this JSON is; ``None``: it is not written as JSON."""
    form, arguments = format_.form, f'{{"o": {value}}}'
    if isinstance(form, JsonForm):
        named = f'{{"{form.name_key}": "say", "{form.arguments_key}": {arguments}}}'
        call = named if form.name_key else f'{{"say": {arguments}}}'
        call = f"[{call}]" if form.many else call
    elif isinstance(form, NamedForm) and form.dialect is JSON:
        name = form.written.format(name="say", index=0)
        call = form.before + name + form.after + arguments + form.close
    elif isinstance(form, TaggedForm):
        line = "\n" if form.lines else ""
        key = form.written_parameter.format(name="o", string="false", type="object")
        call = (
            f"{form.call}{form.written_call.format(name='say', index=1)}{form.name_end}{form.gap}"
            f"{form.parameter}{key}{form.parameter_end}{form.key_gap}"
            f"{line}{value}{line}{form.value_end}{form.gap}{form.call_end}"
        )
    else:
        return None
    begin, end = format_.section
    return f"{begin}{format_.begin}{call}{format_.end}{end}"


def tags_of(format_):
    """Its own, alone and as the end of a call has them."""
    value_end, call_end = (getattr(format_.form, n, "") for n in ("value_end", "call_end"))
    end = format_.end.strip() + format_.section[1].strip()
    return [*sorted(format_.markers), value_end + call_end, value_end + call_end + end, end]


def calls_in(format_, pieces):
    parser = OutputParser(format_, TOOLS)
    events = [event for piece in pieces for event in parser.feed(piece)]
    output = read_output([*events, *parser.finish()])
    assert not output.content.strip()
    return [(name, json.loads(arguments)) for name, arguments in output.calls]


@pytest.mark.parametrize("name", [n for n in FORMATS if written(FORMATS[n], "{}") is not None])
def test_a_tag_in_a_string_is_text(name):
    format_ = FORMATS[name]
    for tag in filter(None, tags_of(format_)):
        for value in (
            {"x": f"a {tag} b"},
            {tag: ["\\", tag]},
            {"x": f'"{tag}" \\" {tag}\n{tag}\\'},
        ):
            text = written(format_, json.dumps(value, ensure_ascii=False))
            expected = [("say", {"o": value})]
            assert calls_in(format_, [text]) == expected
            assert calls_in(format_, text) == expected  # a character at a time


@pytest.mark.parametrize("name", ["qwen3-xml", "glm", "minimax"])
@pytest.mark.parametrize("value", ['{"x": "it\n', "{'x': 'it'}", '"', "it's 5\"", "{x: '"])
def test_what_is_no_json_ends_at_its_tag(name, value):
    format_ = FORMATS[name]
    text = written(format_, value)
    assert [called for called, _ in calls_in(format_, [text])] == ["say"]
    assert calls_in(format_, text) == calls_in(format_, [text])
