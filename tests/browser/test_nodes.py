"""Every node as it comes out of the search box: nothing cut, in both renderers and both languages."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.headless, pytest.mark.slow]

HELPERS = Path(__file__).with_name("graph.js").read_text(encoding="utf-8")
ADD_ALL = """() => {
    app.rootGraph.clear();
    const names = Object.keys(LiteGraph.registered_node_types).filter((name) => name.startsWith("Lowbit")).sort();
    const bottoms = [80, 80, 80, 80];
    for (const name of names) {
        const node = LiteGraph.createNode(name);
        // How long the names of the user's files are is not the nodes' doing.
        for (const widget of node.widgets ?? []) {
            if (/\\.(safetensors|json)$/.test(String(widget.value))) widget.value = "model.safetensors";
        }
        const column = bottoms.indexOf(Math.min(...bottoms));
        node.pos = [40 + 460 * column, bottoms[column]];
        app.rootGraph.add(node);
        bottoms[column] += node.size[1] + 130;
    }
    app.canvas.ds.reset();
    app.canvas.setDirty(true, true);
    return names.length;
}"""
# Text in a node that its own box does not show whole; empty inputs show a placeholder.
CUT_IN_VUE = """() => [...document.querySelectorAll("[data-node-id] *")]
    .filter((e) => e.children.length === 0 && e.textContent.trim() && e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0)
    .map((e) => e.textContent.trim())"""


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "vue"])
def test_nothing_on_a_new_node_is_cut(tab, vue, language):
    tab.open(**{"Comfy.VueNodes.Enabled": vue, "Comfy.Locale": language})
    tab.evaluate(HELPERS)
    assert tab.evaluate(ADD_ALL) >= 8
    tab.page.wait_for_timeout(1000)
    tab.command("Comfy.Canvas.FitView")
    tab.shot(f"nodes-{'vue' if vue else 'canvas'}-{language}")
    assert tab.evaluate(CUT_IN_VUE if vue else "() => window.lowbitTest.problems()") == []
