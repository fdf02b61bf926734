"""A sample of the sweep: the built-in templates, over every kind of conversation."""

import re

import pytest

from omnistep.data.chat import TEMPLATES, builtin_templates
from tests.sweeps.templates import BOTH, CONVERSATIONS, FITTED, LEFT, SAME, both


@pytest.mark.parametrize("name", builtin_templates())
def test_built_in_templates_are_as_transformers_renders_them(name, tmp_path):
    jinja = (TEMPLATES / f"{name}.jinja").read_text()
    pair = both(jinja, tmp_path)
    outcomes = {kind: pair.outcome(record).kind for kind, record in CONVERSATIONS.items()}
    plain = {kind for kind in CONVERSATIONS if not re.search("tool|reasoning|thinking", kind)}
    assert {outcomes[kind] for kind in plain} <= {SAME, FITTED, BOTH}
    assert sum(outcomes[kind] in (SAME, FITTED) for kind in plain) >= len(plain) - 1
    assert {outcomes[kind] for kind in CONVERSATIONS.keys() - plain} <= {LEFT, BOTH}
