"""ComfyUI's own info panel shows the help of every node in the user's language, rendered."""

from __future__ import annotations

import re

import pytest

from testing import comfyui

pytestmark = [pytest.mark.browser, pytest.mark.headless, pytest.mark.slow]

NODES = "() => Object.keys(LiteGraph.registered_node_types).filter((name) => name.startsWith('Lowbit')).sort()"
SELECT = """(name) => {
    app.rootGraph.clear();
    const node = LiteGraph.createNode(name);
    node.pos = [400, 300];
    app.rootGraph.add(node);
    app.canvas.ds.reset();
    app.canvas.deselectAll();
    app.canvas.selectItems([node]);
    return node.title;
}"""
CUT = """() => [...document.querySelectorAll(".markdown-content *:not(pre, pre *)")]
    .filter((e) => e.getBoundingClientRect().right > document.querySelector(".markdown-content").getBoundingClientRect().right + 1)
    .map((e) => e.textContent)"""
PROSE = """() => {
    const copy = document.querySelector(".markdown-content").cloneNode(true);
    copy.querySelectorAll("code").forEach((code) => code.remove());
    return copy.textContent;
}"""
HEADING = {"en": "When something goes wrong", "zh": "出错时怎么办"}


@pytest.mark.parametrize("language", HEADING)
def test_the_help_of_every_node_is_shown(tab, language):
    tab.open(**{"Comfy.Locale": language})
    names = tab.evaluate(NODES)
    assert len(names) >= 8
    cut = {}
    for index, name in enumerate(names):
        title = tab.evaluate(SELECT, name)
        assert "Lowbit" in title
        assert (re.search(r"[\u4e00-\u9fff]", title) is not None) == (language == "zh")
        if index == 0:
            _open_help(tab, name)
        help_page = tab.page.locator(".markdown-content")
        help_page.get_by_role("heading", name=HEADING[language]).wait_for()
        tab.page.wait_for_function(
            "([name, first]) => document.querySelector('.markdown-content')?.innerText.includes(first)",
            arg=[name, _first_words(name, language)],
        )
        assert help_page.locator("li").count() >= 4
        assert "*" not in tab.evaluate(PROSE), "bold text is shown as asterisks"
        cut[name] = tab.evaluate(CUT)
        if index == 0:
            tab.shot(f"help-{language}")
    assert not {name: texts for name, texts in cut.items() if texts}, "text is cut at the panel's edge"


def _open_help(tab, name: str) -> None:
    """Clicks the info button; a selection made before the toolbox is there shows none, so it is made again."""
    button = tab.page.get_by_test_id("info-button")
    for _ in range(120):
        if button.is_visible():
            break
        tab.page.wait_for_timeout(500)
        tab.evaluate(SELECT, name)
    button.click()


def _first_words(name: str, language: str) -> str:
    """How the page begins, without Markdown's marks."""
    folder = comfyui.CHECKOUT / "web" / "docs"
    path = folder / f"{name}.md" if language == "en" else folder / name / f"{language}.md"
    return path.read_text(encoding="utf-8").split("\n", 1)[0]
