"""Where a query and a document stand in what a chat template makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from embedpool.drivers.chat_pairs import ChatPairs
from embedpool.errors import ModelFailed, UnsupportedOption

QUERY = "{{ messages[-2]['content'] }}"
DOCUMENT = "{{ messages[-1]['content'] }}"
SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}|{% endif %}"
PLAIN = f"{SYSTEM}q: {QUERY}\nd: {DOCUMENT} answer:"
STRIPPED = f"q: {QUERY.replace(' }}', ' | trim }}')}\nd: {DOCUMENT.replace(' }}', ' | trim }}')} answer:"


def pairs_of(folder: Path, template: str) -> ChatPairs:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return ChatPairs(folder)


@pytest.mark.parametrize(
    ("query", "document"),
    [("a fox", "is red"), ("", ""), ("ends with\nd: ", "\nd: x answer:"), ("\nd: ", ""), ("a\nd: b", " c \n")],
)
@pytest.mark.parametrize("prompt", ["", "find: "])
def test_the_parts_are_found(tmp_path: Path, query: str, document: str, prompt: str) -> None:
    """Also of texts that look like the template, and behind a prompt."""
    found = pairs_of(tmp_path, PLAIN).render(query, document, prompt)
    assert found.text == f"{prompt and prompt + '|'}q: {query}\nd: {document} answer:"
    assert (found.text[found.query], found.text[found.document]) == (query, document)


def test_a_template_may_strip_them(tmp_path: Path) -> None:
    """Then what is left of them stands there."""
    found = pairs_of(tmp_path, STRIPPED).render("  a fox ", "\nis red\n")
    assert (found.text[found.query], found.text[found.document]) == ("a fox", "is red")


@pytest.mark.parametrize(
    "template",
    [
        f"{DOCUMENT} {QUERY}",
        f"{QUERY} {DOCUMENT} {QUERY}",
        QUERY,
        "nothing of it",
        f"{QUERY} {{{{ raise_exception('no') }}}}",
    ],
)
def test_a_template_that_puts_pairs_in_another_way_is_refused(tmp_path: Path, template: str) -> None:
    """At load: nobody could tell what is cut."""
    with pytest.raises(ModelFailed, match="its chat template cannot be used for pairs"):
        pairs_of(tmp_path, template)


def test_a_template_may_have_no_place_for_an_instruction(tmp_path: Path) -> None:
    """Then who gives one is told."""
    pairs = pairs_of(
        tmp_path, f"{{% if messages|length > 2 %}}{{{{ raise_exception('no system') }}}}{{% endif %}}{PLAIN}"
    )
    assert pairs.render("a", "b").text == "q: a\nd: b answer:"
    with pytest.raises(UnsupportedOption, match="no system"):
        pairs.render("a", "b", "find: ")
