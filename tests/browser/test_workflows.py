"""Every bundled workflow opens from ComfyUI's template browser as it was saved, can be read, and runs."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from testing import comfyui
from testing.tiny import official
from testing.workflows.small import scale_down
from testing.workflows.unfold import api_form, unfold

pytestmark = [pytest.mark.browser, pytest.mark.headless, pytest.mark.slow]

WORKFLOWS = sorted((comfyui.CHECKOUT / "workflows").glob("*.json"))
HELPERS = Path(__file__).with_name("graph.js").read_text(encoding="utf-8")
# The scope puts all tests of a workflow next to each other, so that what is open is not opened again.
EVERY = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem, scope="module")
RENDERERS = pytest.mark.parametrize("vue", [False, True], ids=["canvas", "vue"])
# Nodes grow more in Nodes 2.0; the classic canvas is looked at where two managers or a subgraph's nodes run.
RUN_ON_CANVAS = [path for path in WORKFLOWS if path.stem in ("wan2.2_14B_text_to_video", "infinitetalk_two_speakers")]
VIEWPORT, LARGE = {"width": 1600, "height": 1000}, {"width": 3400, "height": 1500}
BROKEN_IMAGES = """(card) => [...card.querySelectorAll("img")]
    .filter((image) => image.complete && !image.naturalWidth).map((image) => image.src)"""
# What the command "Fit view" does, without gliding there: each frame on the way is drawn on the processor.
FIT = "() => app.canvas.fitViewToSelectionAnimated({ duration: 1 })"
# Nodes 2.0 lays its nodes out anew: over when nothing has moved for a while.
SETTLED = """() => new Promise((resolve) => {
    let before = "", still = 0;
    const look = () => {
        const { scale, offset } = app.canvas.ds;
        const drawn = [...document.querySelectorAll("[data-node-id]")].map((node) => [node.offsetWidth, node.offsetHeight]);
        const now = JSON.stringify([scale, ...offset, app.canvas.graph.nodes.map((node) => [...node.boundingRect]), drawn]);
        still = now === before ? still + 1 : 0;
        before = now;
        if (still < 6) requestAnimationFrame(look);
        else resolve();
    };
    look();
})"""
OPEN = """async (name) => {
    const saved = await (await fetch(app.api.apiURL(`/workflow_templates/lowbit/${name}.json`))).json();
    await app.loadGraphData(saved, true, true, name, { openSource: "template" });
}"""
# A workflow that is opened twice is called "name (2)".
LOADED = """([name, count]) => app.extensionManager.workflow.activeWorkflow?.filename.replace(/ \\(\\d+\\)$/, "") === name
    && window.lowbitTest.nodes().length === count"""

# Core's node to paint masks on takes the size of the picture that it is given; ours is a tiny one.
FOLLOWS_ITS_PICTURE = {"Painter"}

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


@dataclass(frozen=True)
class Opened:
    """What ComfyUI made of a workflow: its nodes, open dialogs, what cannot be read in it, and errors of the page."""

    nodes: dict[str, dict[str, Any]]
    dialogs: list[str]
    problems: list[str]
    errors: list[str]


@pytest.fixture(scope="module")
def tabs(browser, open_tab, base, screenshots) -> Iterator[Callable[[bool], Any]]:
    """A tab for each renderer, kept for all workflows; tiny checkpoints lie under the names that they ask for."""
    official.write_all(base)
    opened: dict[bool, Any] = {}

    def tab(vue: bool) -> Any:
        if vue not in opened:
            # The classic canvas is judged by its geometry: a large one is for people who look at the screenshots.
            viewport = LARGE if vue or screenshots else VIEWPORT
            context = browser.new_context(viewport=viewport, locale="en-US", reduced_motion="reduce")
            opened[vue] = open_tab(context, **{"Comfy.VueNodes.Enabled": vue})
            opened[vue].evaluate(HELPERS)
        opened[vue].errors.clear()
        return opened[vue]

    yield tab
    for one in opened.values():
        one.page.context.close()


@pytest.fixture(scope="module")
def opened(tabs) -> Callable[[Path, bool], Opened]:
    """Opens a workflow from the template browser in one of the renderers, once."""

    @functools.cache
    def look(path: Path, vue: bool) -> Opened:
        tab = tabs(vue)
        open_template(tab, path)
        problems = look_over(tab, vue, f"{path.stem}-{'vue' if vue else 'canvas'}")
        return Opened(
            {node["id"]: node for node in tab.evaluate("() => window.lowbitTest.nodes()")},
            tab.evaluate("() => window.lowbitTest.dialogs()"),
            problems,
            list(tab.errors),
        )

    return look


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


def open_template(tab: Any, path: Path) -> None:
    """Opens a workflow as the template browser does; `tab.showing` is the one that is open and has not run yet."""
    tab.showing = None
    tab.evaluate(OPEN, path.stem)
    wait_until_open(tab, path)


def wait_until_open(tab: Any, path: Path) -> None:
    """Until the workflow is drawn and nothing in it moves."""
    tab.page.wait_for_function(LOADED, arg=[path.stem, len(saved_nodes(path))])
    tab.page.wait_for_load_state("networkidle")
    tab.evaluate(FIT)
    tab.evaluate(SETTLED)
    tab.showing = path


def look_over(tab: Any, vue: bool, name: str) -> list[str]:
    """What a person could not read in the workflow that is open; keeps a screenshot of each of its graphs."""
    problems = []
    for level in range(tab.evaluate("() => window.lowbitTest.count()")):
        tab.evaluate("(level) => window.lowbitTest.show(level)", level)
        tab.evaluate(FIT)
        tab.evaluate(SETTLED)
        tab.shot(name + (f"-inside-{level}" if level else ""))
        problems += tab.evaluate("() => window.lowbitTest.problemsInVue()") if vue else []
    tab.evaluate("() => window.lowbitTest.show(0)")
    return problems if vue else tab.evaluate("() => window.lowbitTest.problems()")


def assert_readable_after_a_run(tab: Any, server: Any, path: Path, renderer: str) -> None:
    """Runs the workflow small and looks over what its nodes then show."""
    if tab.showing != path:
        open_template(tab, path)
    tab.showing = None
    server.free()  # so that every node runs, and none is answered from the cache
    prompt = scale_down(api_form(unfold(json.loads(path.read_text(encoding="utf-8")), server.get_json("/object_info"))))
    tab.run_prompt(prompt)
    tab.page.wait_for_timeout(1000)
    problems = look_over(tab, renderer == "vue", f"{path.stem}-{renderer}-after-a-run")
    assert problems == []
    assert tab.errors == []
    tab.page.locator(".lowbit-meter").first.wait_for(state="attached")
    assert tab.page.get_by_text("GiB now").count() == 0, "the line that the meter stands for"
    reports = tab.page.locator(".lowbit-report").all_text_contents()
    assert sum("calls of" in text for text in reports) == sum(
        node["class_type"] == "LowbitAttentionReport" for node in prompt.values()
    )


def test_the_template_browser_shows_every_workflow_and_opens_one(tabs):
    assert len(WORKFLOWS) >= 8
    tab = tabs(False)
    tab.command("Comfy.BrowseTemplates")
    dialog = tab.page.get_by_role("dialog")
    dialog.get_by_text("lowbit", exact=True).click()
    for path in WORKFLOWS:
        card = dialog.get_by_test_id(f"template-workflow-{path.stem}")
        card.scroll_into_view_if_needed()
        tab.page.wait_for_load_state("networkidle")
        assert card.evaluate(BROKEN_IMAGES) == [], f"the thumbnail of {path.stem}"
    card.click()
    dialog.wait_for(state="detached")
    wait_until_open(tab, path)


@RENDERERS
@EVERY
def test_a_workflow_opens_as_it_was_saved(opened, path, vue):
    """No node is missing or marked, every value is the saved one and a choice there is, no input is left open."""
    found, saved = opened(path, vue), saved_nodes(path)
    assert found.errors == []
    assert found.dialogs == [], "a dialog about something missing is open"
    assert set(found.nodes) == set(saved)
    for name, node in found.nodes.items():
        where = f"{node['type']} {name}"
        assert node["known"], f"{where} is missing"
        assert not node["error"], f"{where} is marked as wrong"
        if node["type"] not in FOLLOWS_ITS_PICTURE:
            assert set_values(node, node["values"]) == set_values(node, saved[name].get("widgets_values", [])), where
        for widget in node["widgets"]:
            assert widget["options"] is None or widget["value"] in widget["options"], f"{where}: {widget}"
        assert node["unlinked"] == [], f"{where}: inputs that must be linked"


@EVERY
def test_a_workflow_can_be_read(opened, path):
    """No node lies on another, no title or value is cut, no link runs behind a node that it has nothing to do with, none cross."""
    assert opened(path, False).problems == []


@EVERY
def test_a_workflow_can_be_read_in_nodes_2(opened, path):
    """No node lies on another and no link runs behind one, inside subgraphs too."""
    assert opened(path, True).problems == []


@EVERY
def test_a_workflow_can_be_read_in_nodes_2_after_a_run(tabs, server, path):
    """The lines, the meter, the reports and the pictures that nodes show once they have run have the room they need."""
    assert_readable_after_a_run(tabs(True), server, path, "vue")


@pytest.mark.parametrize("path", RUN_ON_CANVAS, ids=lambda path: path.stem)
def test_a_workflow_can_be_read_after_a_run(tabs, server, path):
    """The same on the classic canvas."""
    assert_readable_after_a_run(tabs(False), server, path, "canvas")


def test_a_workflow_runs_from_the_run_button(tabs, server):
    """Text to video at a size for a CPU."""
    tab = tabs(False)
    open_template(tab, next(path for path in WORKFLOWS if path.stem == RUN))
    assert tab.evaluate(SET, SMALL) == sorted(SMALL)
    before = {*(server.base / "output").rglob("*.mp4")}
    server.free()
    tab.run()
    tab.page.locator(".lowbit-meter").first.wait_for(state="attached")
    assert {*(server.base / "output").rglob("*.mp4")} - before, "the video is there"
    assert tab.errors == []
