"""Every shipped template: each expression goes through a filter for where it lands, and nothing but ``if`` and ``for`` is in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from jinja2 import Environment, nodes

from launcher.errors import UsageError
from launcher.shipped import shipped
from launcher.templating import one_line, shell_word

FILTERS = {".def.j2": {"sh", "line"}, ".sbatch.j2": {"sh", "line"}, ".json.j2": {"line", "tojson"}, ".html.j2": {"e", "escape", "tojson"}}
TEMPLATES = sorted(shipped("templates").rglob("*.j2"))


def parsed(template: Path) -> nodes.Template:
    return Environment().parse(template.read_text(encoding="utf-8"))


def unfiltered(tree: nodes.Template, allowed: set[str]) -> list[int]:
    """Lines of the expressions whose last step is no such filter."""
    expressions = [part for output in tree.find_all(nodes.Output) for part in output.nodes if not isinstance(part, nodes.TemplateData)]
    return [part.lineno for part in expressions if not (isinstance(part, nodes.Filter) and part.name in allowed)]


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_every_expression_is_filtered(template: Path) -> None:
    assert unfiltered(parsed(template), FILTERS["".join(template.suffixes[-2:])]) == []


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_only_if_and_for(template: Path) -> None:
    assert {type(node) for node in parsed(template).find_all(nodes.Stmt)} <= {nodes.Output, nodes.If, nodes.For}


def test_a_definition_is_among_them() -> None:
    assert "image.def.j2" in [path.name for path in TEMPLATES]


@pytest.mark.parametrize("source", ["{{ a }}", "{{ a | upper }}", "{{ a ~ b | sh }}", "{% if a %}{{ a.b }}{% endif %}"])
def test_an_unfiltered_expression_is_found(source: str) -> None:
    assert unfiltered(Environment().parse(source), {"sh", "line"}) == [1]


@pytest.mark.parametrize("template", sorted(shipped("templates").rglob("*.def.j2")), ids=lambda path: path.name)
def test_nothing_runs_on_the_building_host(template: Path) -> None:
    assert "%setup" not in template.read_text(encoding="utf-8")


@pytest.mark.parametrize("value", ["a\nb", "a\rb", "a\x00b", "a\u2028b", "a\u202eb", "a\tb"], ids=ascii)
def test_control_characters_are_refused(value: str) -> None:
    for quote in (shell_word, one_line):
        with pytest.raises(UsageError, match="control character"):
            quote(value)


def test_a_word_for_the_shell() -> None:
    assert [shell_word(value) for value in ("plain", "two words", "$(id)", "it's", "")] == [
        "plain",
        "'two words'",
        "'$(id)'",
        "'it'\"'\"'s'",
        "''",
    ]
