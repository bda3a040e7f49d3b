"""Every bundled workflow opens from ComfyUI's template browser as it was saved, is readable, and runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from demo import comfyui
from demo.tiny import official

pytestmark = [pytest.mark.browser, pytest.mark.headless, pytest.mark.slow]

WORKFLOWS = sorted((comfyui.CHECKOUT / "workflows").glob("*.json"))
HELPERS = Path(__file__).with_name("graph.js").read_text(encoding="utf-8")
RENDERERS = pytest.mark.parametrize("vue", [False, True], ids=["canvas", "vue"])
EVERY = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


LARGE = {"width": 3400, "height": 1500}
RUN = "wan2.2_14B_text_to_video"
SMALL = {"width": 64, "height": 64, "duration in seconds": 0.25, "4 steps (Lightning LoRA)": True}
SET = """(values) => {
    const set = new Set();
    for (const node of app.rootGraph.nodes)
        for (const widget of node.widgets ?? [])
            if (widget.name in values) {
                widget.value = values[widget.name];
                set.add(widget.name);
            }
    return [...set].sort();
}"""


@pytest.fixture(scope="module", autouse=True)
def tiny_files(base: Path) -> None:
    """Tiny checkpoints under the names that the workflows ask for."""
    official.write_all(base)


def saved_nodes(path: Path) -> dict[str, dict[str, Any]]:
    """Id to node of the graph as the file has it; of nodes inside subgraphs, the subgraph's id stands in front."""
    graph = json.loads(path.read_text(encoding="utf-8"))
    nodes = {str(node["id"]): node for node in graph["nodes"]}
    for inner in (graph.get("definitions") or {}).get("subgraphs", []):
        nodes |= {f"{inner['id']}:{node['id']}": node for node in inner["nodes"]}
    return nodes


def set_values(node: dict[str, Any], values: list[Any] | dict[str, Any]) -> list[Any] | dict[str, Any]:
    """A node's values but for widgets that a link has taken over: what stands in those has no effect."""
    if isinstance(values, dict) or len(values) != len(node["linked"]):
        return [] if all(node["linked"]) else values
    return [value for value, linked in zip(values, node["linked"], strict=True) if not linked]


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
    tab.page.set_viewport_size(LARGE)
    tab.command("Comfy.Canvas.FitView")
    tab.page.wait_for_timeout(1000)
    tab.shot(f"{path.stem}-{'vue' if vue else 'canvas'}")
    assert tab.evaluate("() => window.lowbitTest.dialogs()") == [], "a dialog about something missing is open"
    if vue:
        assert tab.evaluate("() => window.lowbitTest.overlapsInVue()") == []
    saved = saved_nodes(path)
    assert set(opened) == set(saved)
    for name, node in opened.items():
        where = f"{node['type']} {name}"
        assert node["known"], f"{where} is missing"
        assert not node["error"], f"{where} is marked as wrong"
        assert set_values(node, node["values"]) == set_values(node, saved[name].get("widgets_values", [])), where
        for widget in node["widgets"]:
            assert widget["options"] is None or widget["value"] in widget["options"], f"{where}: {widget}"
        assert node["unlinked"] == [], f"{where}: inputs that must be linked"


@EVERY
def test_a_workflow_can_be_read(tab, path):
    """No node lies on another, no title or value is cut, and no link runs behind a node that it has nothing to do with."""
    open_template(tab, path)
    problems = tab.evaluate("() => window.lowbitTest.problems()")
    assert problems == []


def test_a_workflow_runs_from_the_run_button(tab, server):
    """At a size for a CPU; the video is made, and the meter shown."""
    path = next(path for path in WORKFLOWS if path.stem == RUN)
    open_template(tab, path)
    assert tab.evaluate(SET, SMALL) == sorted(SMALL)
    tab.run()
    assert list((server.base / "output").rglob("*.mp4")), "the video is there"
    tab.page.locator(".lowbit-meter").first.wait_for(state="attached")
    tab.command("Comfy.Canvas.FitView")
    tab.page.wait_for_timeout(2000)
    tab.shot(f"{RUN}-after-a-run")
