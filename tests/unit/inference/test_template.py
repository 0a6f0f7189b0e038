"""Chat templates: what surely does not parse is told with its line, and what models ship is not."""

from __future__ import annotations

import pytest

from turnout.workers.inference.template import problem

SMOL = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful assistant<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"""


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain",
        SMOL,
        "{%- set ns = namespace(found=false) -%}{% set x %}a{% endset %}",
        "{%- macro render(a, b='}}') -%}{{ a }}{%- endmacro -%}{{ '{%' }} {{ \"%}\" }}",
        "{% raw %}{% if %}{{ never closed {% endraw %}{# if #}",
        "{% for a in b %}{% else %}{% endfor %}{% if a %}{% elif b %}{% else %}{% endif %}",
        "{% generation %}{{ x }}{% endgeneration %}{% do_something_unknown 3 %}",
        "{{- bos_token }}{%- if tools is not none %}{{- '{\"a\": 1}' }}{%- endif %}",
    ],
)
def test_a_template_that_parses_is_fine(text: str) -> None:
    assert problem(text) == ""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a\n{% for m in messages %}\n{{ m }}", "line 2: for is never ended"),
        ("{% if a %}\n{% endfor %}", "line 2: endfor, and if of line 1 is open"),
        ("{% endif %}", "line 1: endif without its beginning"),
        ("\n\n{{ m", "line 3: {{ is never closed"),
        ("{% if a ", "line 1: {% is never closed"),
        ("{# a", "line 1: {# is never closed"),
        ("{{ '}}' ", "line 1: {{ is never closed"),
        ("{% raw %}x", "line 1: raw is never ended"),
        ("{% else %}", "line 1: else outside of if and for"),
    ],
)
def test_a_template_that_does_not_parse_is_told_with_its_line(text: str, says: str) -> None:
    assert problem(text) == says
