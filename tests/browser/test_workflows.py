"""Every bundled workflow opens from ComfyUI's template browser as it was saved, is readable, and runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from demo import comfyui

pytestmark = [pytest.mark.browser, pytest.mark.headless, pytest.mark.slow]

WORKFLOWS = sorted((comfyui.CHECKOUT / "workflows").glob("*.json"))
HELPERS = Path(__file__).with_name("graph.js").read_text(encoding="utf-8")
RENDERERS = pytest.mark.parametrize("vue", [False, True], ids=["canvas", "vue"])
EVERY = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def saved_nodes(path: Path) -> dict[str, dict[str, Any]]:
    """Id to node of the graph as the file has it; of nodes inside subgraphs, the subgraph's id stands in front."""
    graph = json.loads(path.read_text(encoding="utf-8"))
    nodes = {str(node["id"]): node for node in graph["nodes"]}
    for inner in (graph.get("definitions") or {}).get("subgraphs", []):
        nodes |= {f"{inner['id']}:{node['id']}": node for node in inner["nodes"]}
    return nodes


def open_template(tab, path: Path, **settings: Any) -> dict[str, dict[str, Any]]:
    """Opens a workflow the way a person does, and returns what ComfyUI made of its nodes."""
    tab.open(**settings)
    tab.evaluate(HELPERS)
    tab.command("Comfy.BrowseTemplates")
    dialog = tab.page.get_by_role("dialog")
    dialog.get_by_text("lowbit", exact=True).click()
    card = dialog.get_by_test_id(f"template-workflow-{path.stem}")
    card.scroll_into_view_if_needed()
    tab.page.wait_for_load_state("networkidle")
    broken = "card => [...card.querySelectorAll('img')].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
    assert card.evaluate(broken) == [], "the thumbnail"
    card.click()
    dialog.wait_for(state="detached")
    tab.page.wait_for_function("(count) => window.lowbitTest.nodes().length === count", arg=len(saved_nodes(path)))
    tab.page.wait_for_load_state("networkidle")
    return {node["id"]: node for node in tab.evaluate("() => window.lowbitTest.nodes()")}


def test_there_are_workflows():
    assert len(WORKFLOWS) >= 8


@RENDERERS
@EVERY
def test_a_workflow_opens_as_it_was_saved(tab, path, vue):
    opened = open_template(tab, path, **{"Comfy.VueNodes.Enabled": vue})
    tab.command("Comfy.Canvas.FitView")
    tab.shot(f"{path.stem}-{'vue' if vue else 'canvas'}")
    assert tab.evaluate("() => window.lowbitTest.dialogs()") == [], "a dialog about something missing is open"
    saved = saved_nodes(path)
    assert set(opened) == set(saved)
    for name, node in opened.items():
        where = f"{node['type']} {name}"
        assert node["known"], f"{where} is missing"
        assert not node["error"], f"{where} is marked as wrong"
        assert node["values"] == saved[name].get("widgets_values", []), f"{where}: values differ from those saved"
        for widget in node["widgets"]:
            assert widget["options"] is None or widget["value"] in widget["options"], f"{where}: {widget}"
        assert node["unlinked"] == [], f"{where}: inputs that must be linked"


@EVERY
def test_a_workflow_can_be_read(tab, path):
    """No node lies on another, no title or value is cut, and no link runs behind a node that it has nothing to do with."""
    open_template(tab, path)
    problems = tab.evaluate("() => window.lowbitTest.problems()")
    assert problems == []
