"""The formats that models write tool calls and reasoning in: one table.

Each line describes what models write, as their chat templates and their makers' documents show it.
Other packages add to it by entry points of the group ``engineroom.tool_formats``, each of which
names a :class:`ToolFormat`.
"""

from __future__ import annotations

import re
from typing import Final

from engineroom.generation.call_forms import (
    ChannelForm,
    JsonForm,
    NamedForm,
    PythonicForm,
    ReasoningFormat,
    TaggedForm,
    ToolFormat,
)
from engineroom.generation.literal_scanner import GEMMA, Dialect
from engineroom.generation.text_source import Markers

__all__ = ["GENERIC", "REASONING_FORMATS", "TOOL_FORMATS"]

GENERIC: Final = ToolFormat(
    "generic", JsonForm(), "<tool_call>", "</tool_call>", between="\n", bare=True, trims=True
)
"""For templates that know of no tools, which are told in messages instead (of Hermes' form)."""

_ESCAPE: Final = Dialect(
    "functiongemma", mark=Markers(["<escape>"]), bare_keys=True, bare_words=True
)
_KIMI_NAME: Final = re.compile(r"\s*(?:functions\.)?(?P<name>[^\s]+?)(?::[0-9]+)?\s*")
_SOLAR_NAME: Final = re.compile(r"\s*(?:\S*<\|tool_call:name\|>)?(?P<name>[^\s<]+)\s*")


def _dsml(name: str, mark: str, section: str, *templates: tuple[str, ...]) -> ToolFormat:
    """DeepSeek's markup: the makers changed no more than these names."""
    form = TaggedForm(
        call=f"<{mark}invoke",
        name_end=">",
        parameter=f"<{mark}parameter",
        parameter_end=">",
        value_end=f"</{mark}parameter>",
        call_end=f"</{mark}invoke>",
        written_call=' name="{name}"',
        written_parameter=' name="{name}" string="{string}"',
        attributes=True,
        types="string",
        gap="\n",
    )
    around = (f"<{mark}{section}>\n", f"</{mark}{section}>")
    return ToolFormat(
        name,
        form,
        section=around,
        between="\n",
        trims=True,
        templates=templates,
    )


def _parameters(call: str, section: tuple[str, str], name: str, marker: str) -> ToolFormat:
    """Qwen's markup: ``<function=f>``, ``<parameter=p>``."""
    form = TaggedForm(
        call=call,
        name_end=">",
        parameter="<parameter=",
        parameter_end=">",
        value_end="</parameter>",
        call_end="</function>",
        lines=True,
        gap="\n",
    )
    return ToolFormat(
        name,
        form,
        section=section,
        trims=True,
        templates=((marker, "<parameter="),),
    )


TOOL_FORMATS: Final[tuple[ToolFormat, ...]] = (
    ToolFormat(
        "harmony",
        ChannelForm(),
        templates=(("<|channel|>", "<|message|>", "<|start|>"),),
    ),
    _parameters("<function=", ("<tool_call>\n", "\n</tool_call>"), "qwen3-xml", "<tool_call>"),
    _parameters(
        "<function=", ("<seed:tool_call>\n", "\n</seed:tool_call>"), "seed-oss", "<seed:tool_call>"
    ),
    ToolFormat(
        "kimi-k3",
        TaggedForm(
            call="<|open|>call",
            name_end="<|sep|>",
            parameter="<|open|>argument",
            parameter_end="<|sep|>",
            value_end="<|close|>argument<|sep|>",
            call_end="<|close|>call<|sep|>",
            written_call=' tool="{name}" index="{index}"',
            written_parameter=' key="{name}" type="{type}"',
            attributes=True,
            types="type",
        ),
        section=("<|open|>tools<|sep|>", "<|close|>tools<|sep|>"),
        ignored=(
            "<|open|>response<|sep|>",
            "<|close|>response<|sep|>",
            "<|close|>message<|sep|>",
        ),
        templates=(("<|open|>", "<|sep|>", "<|close|>"), ("<|open|>", "<|sep|>", "tools")),
    ),
    ToolFormat(
        "kimi-k2",
        NamedForm(
            after="<|tool_call_argument_begin|>",
            name=_KIMI_NAME,
            written="functions.{name}:{index}",
        ),
        "<|tool_call_begin|>",
        "<|tool_call_end|>",
        section=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        templates=(("<|tool_calls_section_begin|>", "<|tool_call_argument_begin|>"),),
    ),
    _dsml("deepseek-v4.1", "｜DSML｜ ", "calls", ("｜DSML｜ ", " calls>")),
    _dsml("deepseek-v4", "｜DSML｜", "tool_calls", ("｜DSML｜", "tool_calls>")),
    _dsml("deepseek-v3.2", "｜DSML｜", "function_calls", ("｜DSML｜", "function_calls>")),
    ToolFormat(
        "deepseek-v3",
        NamedForm(before="function<｜tool▁sep｜>", after="\n```json\n", close="\n```"),
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        section=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        between="\n",
        trims=True,
        templates=(("<｜tool▁call▁begin｜>", "```json"),),
    ),
    ToolFormat(
        "deepseek-v3.1",
        NamedForm(after="<｜tool▁sep｜>"),
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        section=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        trims=True,
        templates=(("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>"),),
    ),
    ToolFormat(
        "glm",
        TaggedForm(
            parameter="<arg_key>",
            parameter_end="</arg_key>",
            value_end="</arg_value>",
            call_end="</tool_call>",
            key_gap="<arg_value>",
            gap="\n",
        ),
        "<tool_call>",
        between="\n",
        trims=True,
        templates=(("<arg_key>", "<arg_value>", "<tool_call>"),),
    ),
    ToolFormat(
        "minimax",
        TaggedForm(
            call="<invoke",
            name_end=">",
            parameter="<parameter",
            parameter_end=">",
            value_end="</parameter>",
            call_end="</invoke>",
            written_call=' name="{name}"',
            written_parameter=' name="{name}"',
            attributes=True,
            gap="\n",
        ),
        section=("<minimax:tool_call>\n", "</minimax:tool_call>"),
        between="\n",
        trims=True,
        templates=(("minimax:tool_call", "<invoke"),),
    ),
    ToolFormat(
        "hunyuan",
        TaggedForm(
            parameter="<arg_key:opensource>",
            parameter_end="</arg_key:opensource>",
            value_end="</arg_value:opensource>",
            call_end="</tool_call:opensource>",
            name_end="<tool_sep:opensource>",
            key_gap="<arg_value:opensource>",
            gap="\n",
        ),
        "<tool_call:opensource>",
        section=("<tool_calls:opensource>\n", "</tool_calls:opensource>"),
        between="\n",
        trims=True,
        templates=(("<arg_key:opensource>",), ("<arg_key", ":opensource")),
    ),
    ToolFormat(
        "minicpm",
        TaggedForm(
            call="<function",
            name_end=">",
            parameter="<param",
            parameter_end=">",
            value_end="</param>",
            call_end="</function>",
            written_call=' name="{name}"',
            written_parameter=' name="{name}"',
            attributes=True,
            cdata=True,
        ),
        between="\n",
        trims=True,
        templates=(("<function name=", "<param name="),),
    ),
    ToolFormat(
        "gemma4",
        NamedForm(before="call:", dialect=GEMMA),
        "<|tool_call>",
        "<tool_call|>",
        ignored=("<|tool_response>",),
        templates=(("<|tool_call>", "<tool_call|>"),),
    ),
    ToolFormat(
        "functiongemma",
        NamedForm(before="call:", dialect=_ESCAPE),
        "<start_function_call>",
        "<end_function_call>",
        templates=(("<start_function_call>", "<escape>"),),
    ),
    ToolFormat(
        "mistral",
        NamedForm(after="[ARGS]", id_mark="[CALL_ID]"),
        "[TOOL_CALLS]",
        templates=(("[TOOL_CALLS]", "[ARGS]"),),
    ),
    ToolFormat(
        "mistral-list",
        JsonForm(many=True),
        "[TOOL_CALLS]",
        templates=(("[TOOL_CALLS]",),),
    ),
    ToolFormat(
        "command",
        JsonForm("tool_name", "parameters", many=True),
        "<|START_ACTION|>",
        "<|END_ACTION|>",
        trims=True,
        ignored=("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"),
        templates=(("<|START_ACTION|>", "<|END_ACTION|>"),),
    ),
    ToolFormat(
        "apertus",
        JsonForm(name_key="", many=True),
        "<|tools_prefix|>",
        "<|tools_suffix|>",
        trims=True,
        templates=(("<|tools_prefix|>",),),
    ),
    ToolFormat(
        "gigachat3",
        JsonForm(),
        "<|message_sep|>\n\nfunction call<|role_sep|>\n",
        trims=True,
        templates=(("function call", "<|role_sep|>"),),
    ),
    ToolFormat(
        "gigachat3.1",
        JsonForm(),
        "<|function_call|>",
        trims=True,
        templates=(("<|function_call|>",),),
    ),
    ToolFormat(
        "solar",
        NamedForm(
            after="<|tool_call:args|>",
            name=_SOLAR_NAME,
            written="call_{index}<|tool_call:name|>{name}",
        ),
        "<|tool_call:begin|>",
        "<|tool_call:end|>",
        section=("<|tool_calls|>", "<|calls|>"),
        trims=True,
        templates=(("<|tool_call:begin|>", "<|tool_call:name|>"),),
    ),
    ToolFormat(
        "nemotron",
        JsonForm(many=True),
        "<TOOLCALL>",
        "</TOOLCALL>",
        trims=True,
        templates=(("<TOOLCALL>",),),
    ),
    ToolFormat(
        "tool-calls",
        JsonForm(many=True),
        "<tool_calls>",
        "</tool_calls>",
        trims=True,
        templates=(("<tool_calls>", "</tool_calls>"),),
    ),
    ToolFormat(
        "granite",
        JsonForm(many=True),
        "<|tool_call|>",
        "<|/tool_call|>",
        trims=True,
        templates=(("<|tool_call|>",),),
    ),
    ToolFormat(
        "functools",
        JsonForm(many=True),
        "functools",
        trims=True,
        templates=(("functools[",),),
    ),
    ToolFormat(
        "internlm",
        JsonForm(arguments_key="parameters"),
        "<|action_start|><|plugin|>",
        "<|action_end|>",
        trims=True,
        templates=(("<|action_start|>", "<|plugin|>"),),
    ),
    ToolFormat(
        "function-tag",
        NamedForm(after=">"),
        "<function=",
        "</function>",
        between="\n",
        trims=True,
        templates=(("<function=", "</function>"),),
    ),
    ToolFormat(
        "lfm2",
        PythonicForm(),
        "<|tool_call_start|>",
        "<|tool_call_end|>",
        trims=True,
        templates=(("<|tool_call_start|>",), ("<|tool_list_start|>",)),
    ),
    ToolFormat(
        "pythonic",
        PythonicForm(),
        "<|python_start|>",
        "<|python_end|>",
        bare=True,
        trims=True,
        templates=(
            ("<|python_start|>",),
            ("func_name1(params_name1=params_value1",),
        ),
    ),
    ToolFormat(
        "olmo3",
        PythonicForm(brackets=False),
        "<function_calls>",
        "</function_calls>",
        trims=True,
        templates=(("<function_calls>",),),
    ),
    ToolFormat(
        "hermes",
        JsonForm(),
        "<tool_call>\n",
        "\n</tool_call>",
        between="\n",
        trims=True,
        templates=(("<tool_call>", "</tool_call>"),),
    ),
    ToolFormat(
        "llama3-json",
        JsonForm(arguments_key="parameters", separator="; "),
        "<|python_tag|>",
        bare=True,
        templates=(("<|python_tag|>",), ('{"name": function name, "parameters":',)),
    ),
)
"""Those of narrower marks first: the first that a template's marks fit is tried first."""

REASONING_FORMATS: Final[tuple[ReasoningFormat, ...]] = (
    ReasoningFormat(
        "kimi-k3",
        "<|open|>think<|sep|>",
        "<|close|>think<|sep|>",
        also_ends=("<|open|>response<|sep|>", "<|open|>tools<|sep|>"),
        anywhere=True,
        forms=(("<|open|>", "<|sep|>", "think"),),
    ),
    ReasoningFormat(
        "gemma4",
        "<|channel>thought",
        "<channel|>",
        anywhere=True,
        forms=(("<|channel>", "<channel|>"),),
    ),
    ReasoningFormat("mistral", "[THINK]", "[/THINK]", anywhere=True, forms=(("[THINK]",),)),
    ReasoningFormat(
        "apriel",
        "Here are my reasoning steps:",
        "[BEGIN FINAL RESPONSE]",
        forms=(("reasoning steps", "[BEGIN FINAL RESPONSE]"),),
    ),
    ReasoningFormat(
        "hunyuan",
        "<think:opensource>",
        "</think:opensource>",
        forms=(("<think:opensource>",), ("<think{}>", ":opensource")),
    ),
    ReasoningFormat("minimax-m3", "<mm:think>", "</mm:think>", forms=(("<mm:think>",),)),
    ReasoningFormat("seed", "<seed:think>", "</seed:think>", forms=(("seed:think",),)),
    ReasoningFormat(
        "command",
        "<|START_THINKING|>",
        "<|END_THINKING|>",
        anywhere=True,
        forms=(("<|START_THINKING|>",),),
    ),
    ReasoningFormat(
        "apertus", "<|inner_prefix|>", "<|inner_suffix|>", forms=(("<|inner_prefix|>",),)
    ),
    ReasoningFormat("think", "<think>", "</think>", forms=(("<think>",), ("</think>",))),
)
