"""Templates that would take for ever, or all memory; and ones that the bounds must not change."""

from __future__ import annotations

import time

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engineroom import ChatMessage, ConfigurationError
from engineroom.prompts import ChatTemplate, template_sandbox
from engineroom.prompts.work import Reading, ReadingStoppedError

LONG = "{% set long = 'a' * 99999 %}"
TWICE = (
    "{% set ns = namespace(x=['a'], y=['a']) %}"
    "{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}"
)
"""Lists of 2^60 elements, of which 120 lists are made."""
HELLO = [ChatMessage(role="user", content="hello")]


def growing(start: str, change: str) -> str:
    loop = "{% for i in range(60) %}{% set ns.x = " + change + " %}{% endfor %}"
    return "{% set ns = namespace(x=" + start + ") %}" + loop


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{{ 'a' * 10000000000 }}", "characters"),
        ("{% if 'a' * 10000000000 == 'b' %}{% endif %}", "characters"),
        ("{{ (range(99999) | list * 99999) | length }}", "characters"),
        ("{{ 2 ** 10000000000 }}", "bits"),
        (growing("7", "ns.x * ns.x"), "bits"),
        (growing("'a'", "ns.x ~ ns.x"), "characters"),
        (growing("'a'", "ns.x + ns.x"), "characters"),
        ("{{ 'a'.center(10000000000) }}", "length"),
        ("{{ 'a' | center(10000000000) }}", "length"),
        ("{{ 'a' | indent(10000000000, true) }}", "length"),
        ("{{ 5 | slice(10000000000) | list }}", "length"),
        ("{{ '%10000000000d' % 1 }}", "width"),
        ("{{ '%*d' % (10000000000, 1) }}", "width"),
        ("{{ '%10000000000d' | format(1) }}", "width"),
        ("{{ '{:10000000000}'.format(1) }}", "width"),
        ("{{ '{:{}}'.format(1, 10000000000) }}", "width"),
        (LONG + "{{ long.replace('a', long) }}", "characters"),
        (LONG + "{{ long | replace('a', long) }}", "characters"),
        (LONG + "{{ [long, long] | join(long) ~ ([long] * 9999) | join }}", "characters"),
        (LONG + "{{ 'x'.join([long] * 9999) }}", "characters"),
        (LONG + "{% for i in range(99999) %}{{ long }}{% endfor %}", "characters"),
        ("{% set x %}{% for i in range(99999) %}" + "a" * 9999 + "{% endfor %}{% endset %}",
         "characters"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "steps"),
        ("{% for i in range(99999) %}{% for j in range(99999) if j < 0 %}{% endfor %}{% endfor %}",
         "steps"),
        ("{% for i in range(99999) %}{{ range(99999) | sum }}{% endfor %}", "steps"),
        ("{% macro m(n) %}{% if n %}{{ m(n - 1) ~ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
         "steps"),
        ("{% for m in [60] recursive %}{% if m %}{{ loop([m - 1, m - 1]) }}{% endif %}{% endfor %}",
         "steps"),
        (TWICE + "{{ ns.x }}", "steps"),
        (LONG + "{% set ns = namespace(x=long) %}{% for i in range(9999) %}"
         "{% set ns.x = [ns.x, long[1:]] %}{% endfor %}", "characters"),
        (LONG + "{{ (long * 400) | list | length }}", "characters"),
        (LONG + "{{ (long * 400).split('a') | length }}", "characters"),
        (LONG + "{{ (long * 400).split() | length }}", "characters"),
        (LONG + "{{ long | wordwrap(5) }}", "characters"),
        (LONG + "{{ (long * 90) | title }}", "steps"),
        (TWICE + "{{ ns.x ~ '' }}", "steps"),
        (TWICE + "{{ ns.x | tojson }}", "steps"),
        (TWICE + "{{ ns.x == ns.y }}", "steps"),
    ],
)  # fmt: skip
def test_what_would_take_too_much_is_refused(
    monkeypatch: pytest.MonkeyPatch, source: str, why: str
) -> None:
    monkeypatch.setattr(template_sandbox, "MOST_STEPS", 200_000)
    monkeypatch.setattr(template_sandbox, "MOST_SECONDS", 60)  # steps end it first, on any machine
    template = ChatTemplate(source, {})  # where it is tried, in the same bounds
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=f"OverflowError: it .*{why}"):
            template.render(HELLO)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{{ range(99999) | sort | length }}{% endfor %}",
        "{% for i in range(99999) %}{{ (range(99999) | list).count(99999) }}{% endfor %}",
        LONG + "{% set x = long * 600 %}{% for i in range(99999) %}{{ x.find('b') }}{% endfor %}",
        LONG + "{% set x = long * 600 %}{% for i in range(99999) %}{{ 'b' in x }}{% endfor %}",
        LONG + "{% for i in range(99999) %}{{ (long * 600)[1:] | length }}{% endfor %}",
        "{% for i in range(999) %}{% for j in range(9999) %}{{ {i: j} }}{% endfor %}{% endfor %}",
    ],
)  # fmt: skip
def test_what_would_take_for_ever_ends_within_its_time_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    assert template_sandbox.MOST_SECONDS == 2.0
    monkeypatch.setattr(template_sandbox, "MOST_SECONDS", 0.3)
    began = time.thread_time()
    template = ChatTemplate(source, {})
    loaded = time.thread_time()
    with pytest.raises(ConfigurationError, match="OverflowError: it (takes|makes) more than"):
        template.render(HELLO)
    assert loaded - began < 1
    assert time.thread_time() - loaded < 1


def test_a_template_that_is_too_long_is_not_valid() -> None:
    with pytest.raises(ConfigurationError, match="not valid: it has 400000 characters"):
        ChatTemplate("{{1}}" * 80_000, {})


def test_each_rendering_has_the_bounds_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MOST_STEPS", 100)
    template = ChatTemplate("{% for i in range(40) %}{{ i }}{% endfor %}", {})
    assert len({template.render(HELLO) for _ in range(20)}) == 1


def test_a_long_conversation_is_far_from_the_bounds() -> None:
    messages = [ChatMessage(role="user", content="word " * 400) for _ in range(1000)]
    source = (
        "{% for m in messages %}{% if loop.index0 == messages | length - 1 or m.role == 'user' %}"
        "{{ '<' ~ m.role ~ '>' + m.content | trim + '</s>\\n' }}{% endif %}{% endfor %}"
    )
    assert len(ChatTemplate(source, {}).render(messages)) > 1_990_000


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{% endfor %}",
        "{% for m in nothing %}a{% else %}none{% endfor %}",
        "{% for k, v in messages[0].items() %}{{ k ~ v }}{{ 1 if loop.last }}{% endfor %}",
        "{% for m in messages | selectattr('role', 'eq', 'user') %}{{ m.content }}{% endfor %}",
        "{% for m in messages if m.role != 'user' %}{{ m }}{% else %}nobody{% endfor %}",
        "{% for c in 'abc' %}{{ loop.nextitem }}{{ loop.cycle('x', 'y') }}{% endfor %}",
        "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}",
        "{% macro m(a, b=2) %}{{ a + b }}{{ varargs, kwargs }}{% endmacro %}{{ m(1, 3, 4, c=5) }}",
        "{% macro m() %}<{{ caller(7) }}>{% endmacro %}{% call(x) m() %}{{ x }}{% endcall %}",
        "{% block b %}{{ messages[0].role }}{% endblock %}{{ self.b() }}",
        growing("0", "ns.x + 1") + "{{ ns.x }}",
        "{% set x %}a{{ 1 }}{% endset %}{{ x | upper }}{% filter lower %}ABC{% endfilter %}",
        "{{ '%s-%03d' % ('a', 7) }}{{ '{}-{:>4}-{a}'.format(1, 2, a=3) }}",
        "{{ '{a}'.format_map({'a': 1}) }}{{ '%s' | format(3) }}",
        "{{ 'a' * 3 }}{{ 3 * 'a' }}{{ [1] * 2 }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** -1 }}{{ 2.5 * 2 }}",
        "{{ none }}{{ undefined_name }}{{ true }}{{ 1.50 }}{{ [none, 'a'] }}{{ {'a': 1} }}",
        "{{ 'user' in messages[0].role }}{{ messages[0].role in ['user'] }}{{ nothing == 1 }}",
        "{{ messages | map(attribute='role') | join(', ') }}{{ [3, 1] | sort }}{{ 1 < 2 < 3 }}",
        "{{ 1700000000 | int }}{{ nothing | default(1700000000) }}{{ 'a b' | replace(' ', '_') }}",
        "{{ 'a-b'.split('-')[1] }}{{ ' x '.strip() }}{{ 'x'.ljust(4) }}|{{ '-'.join(['a', 'b']) }}",
        "{% if messages[0].content is string and 'h' ~ 'i' == 'hi' %}yes{% elif 1 %}no{% endif %}",
    ],
)  # fmt: skip
def test_other_templates_give_what_plain_jinja_gives(source: str) -> None:
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    messages = [message.model_dump(exclude_none=True) for message in HELLO]
    expected = plain.from_string(source).render(messages=messages)
    assert ChatTemplate(source, {}).render(HELLO) == expected


def test_a_rendering_for_which_nobody_waits_stops() -> None:
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}"
    template = ChatTemplate(loops, {})
    asked = 0

    def stopped() -> bool:
        nonlocal asked
        asked += 1
        return asked > 9

    with Reading(stopped), pytest.raises(ReadingStoppedError):
        template.render(HELLO)
    assert asked == 10
