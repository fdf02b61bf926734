"""Templates of strangers end soon, make little, and see nothing of Python."""

import datetime

import jinja2
import pytest

from omnistep.data.chat import Template
from omnistep.data.errors import DataError
from omnistep.data.sandbox import LONGEST_TEMPLATE, render

DOUBLED = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}@{% endfor %}"


@pytest.mark.parametrize(
    "jinja",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) + f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "{{ 'a' * 3000000000 }}",
        "{{ (3000000000 * [0]) | length }}",
        "{{ 10 ** 1000000000 }}",
        DOUBLED.replace("@", "{% set ns.x = ns.x ~ ns.x %}"),
        DOUBLED.replace("@", "{% set ns.x = ns.x + ns.x %}"),
        DOUBLED.replace("@", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"),
        "{{ 'x' | center(1000000000) }}",
        "{{ 'x'.ljust(1000000000) }}",
        "{{ '%1000000000d' % 3 }}",
        "{{ '%*d' % (1000000000, 3) }}",
        "{{ '{:1000000000}'.format(3) }}",
        "{{ '{:{}}'.format(3, 1000000000) }}",
        "{{ '%1000000000d' | format(3) }}",
        "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
        "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
        "{{ (['a' * 100000] * 100000) | join }}",
        "{{ (',' * 100000).join(['a'] * 1000000) }}",
        "{{ 'a\nb' | indent(1000000000) }}",
        "{{ {'a': 1} | tojson(indent=1000000000) }}",
        "{% for i in range(99999) %}{% for j in range(10) %}"
        + "a" * 100
        + "{% endfor %}{% endfor %}",
        "a" * (LONGEST_TEMPLATE + 1),
    ],
)
def test_what_takes_or_makes_too_much_is_refused(jinja):
    with pytest.raises(jinja2.TemplateError, match="which no conversation needs"):
        render(jinja, {})
    with pytest.raises(DataError, match=r"conversation: .*which no conversation needs"):
        Template("x", jinja).render([])


@pytest.mark.parametrize("deep", ["{{ (", "{% if a %}", "{{ [", "{% macro f() %}{{ f() }}"])
def test_deep_templates_are_an_error_with_a_reason(deep):
    end = "{% endmacro %}{{ f() }}" if "macro" in deep else ""
    with pytest.raises(DataError, match=r"does not take this conversation: ."):
        Template("x", (deep if end else deep * 3000) + end).render([])


@pytest.mark.parametrize(
    ("jinja", "text"),
    [
        (
            "{{ 123456 | tojson }} {{ '%d' % 123456 }} {{ 'a' ~ 3 ~ none }}",
            "123456 123456 a3None",
        ),
        ("{% set z %}q{% endset %}{{ z }}{% set z | upper %}q{% endset %}{{ z }}", "qQ"),
        ("{% for c in 'ab' %}{{ loop.last }}{{ loop.nextitem }}{% endfor %}", "FalsebTrue"),
        ("{% for x in [1, 2, 3] if x != 2 %}{{ x }}{% else %}-{% endfor %}", "13"),
        ("{% for x in [[2]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}", "2"),
        (
            "{{ [1, 2] | join(',') }}{{ 'a-b'.replace('-', '+') }}{{ 'x' | center(5) }}",
            "1,2a+b  x  ",
        ),
        ("{% for i in range(40000) %}{{ i | string | length }}{% break %}{% endfor %}", "1"),
    ],
)
def test_what_templates_do_goes_on(jinja, text):
    assert render(jinja, {}) == text


def test_the_moment_may_be_given():
    now = datetime.datetime(2024, 2, 3)
    template = Template("x", "{{ strftime_now('%d %B %Y') }}", now=now)
    assert template.render([]) == "03 February 2024"
    today = Template("x", "{{ strftime_now('%Y') }}").render([])
    assert today == str(datetime.datetime.now().year)
