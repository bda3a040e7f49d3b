"""The live meter on the memory manager node, fed through ComfyUI's own websocket and by a real run."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from testing import graphs

from .conftest import VIEWPORT

pytestmark = [pytest.mark.browser, pytest.mark.headless, pytest.mark.slow]

GIB = 2**30
METER = ".lowbit-meter"
ADD_NODE = """() => {
    app.rootGraph.clear();
    const node = LiteGraph.createNode("LowbitMemoryManager");
    node.pos = [300, 150];
    app.rootGraph.add(node);
    app.canvas.ds.reset();
    return String(node.id);
}"""
WIDGETS = "(id) => app.rootGraph.getNodeById(id).widgets.map(w => w.name)"
SAVED = "(id) => JSON.stringify(app.rootGraph.getNodeById(id).serialize().widgets_values)"
CUT = """() => [...document.querySelectorAll(".lowbit-meter, .lowbit-meter *")]
    .filter(e => e.scrollWidth > e.clientWidth + 1 || e.scrollHeight > e.clientHeight + 1).map(e => e.className)"""
COMPONENTS = {
    "diffusion model": 8 * GIB,
    "text encoder": 2 * GIB,
    "VAE": GIB // 4,
    "audio encoder": 0,
    "model patch": GIB,
    "scratch": GIB // 2,
    "other": 2 * GIB,
}


def reading(node: str, step: int = 0, **changes: Any) -> dict[str, Any]:
    """An event's data as the server sends it."""
    allocated = sum(COMPONENTS.values())
    return {
        "node_id": node,
        "prompt_id": "first",
        "phase": "sampling",
        "step": step,
        "steps": 20,
        "seconds_per_step": 1.5 + step / 10,
        "limit_bytes": 16 * GIB,
        "allocated_bytes": allocated,
        "reserved_bytes": allocated + GIB,
        "peak_bytes": 15 * GIB,
        "free_bytes": 8 * GIB,
        "device": "a test",
        "components": COMPONENTS,
    } | changes


@pytest.fixture(scope="module")
def tabs(browser, open_tab) -> Iterator[Callable[..., Any]]:
    """A tab for each choice of ComfyUI's settings, kept for all tests here, and a function that sends it an event through
    the websocket it has open to the server."""

    @functools.cache
    def opened(vue: bool, language: str) -> tuple[Any, Callable[[dict[str, Any]], None]]:
        context, sockets = browser.new_context(viewport=VIEWPORT, locale="en-US", reduced_motion="reduce"), []

        def connect(socket: Any) -> None:
            socket.connect_to_server()
            sockets.append(socket)

        def send(data: dict[str, Any]) -> None:
            sockets[-1].send(json.dumps({"type": "lowbit.memory", "data": data}))

        context.route_web_socket("**/ws*", connect)
        found.append(open_tab(context, **{"Comfy.VueNodes.Enabled": vue, "Comfy.Locale": language}))
        return found[-1], send

    found: list[Any] = []
    yield opened
    for tab in found:
        tab.page.context.close()


@pytest.fixture
def fed(tabs):
    """Gives one of `tabs`; none may end with an error that nobody caught."""
    used = []

    def choose(vue: bool = False, language: str = "en") -> tuple[Any, Callable[[dict[str, Any]], None]]:
        used.append(tabs(vue, language))
        return used[-1]

    yield choose
    assert not [error for tab, _ in used for error in tab.errors]


def widths(tab) -> list[float]:
    """Each segment's part of the bar."""
    return tab.evaluate(
        """() => {
            const bar = document.querySelector(".lowbit-bar");
            return [...bar.querySelectorAll(".lowbit-piece")].map(p => p.offsetWidth / bar.clientWidth);
        }"""
    )


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "vue"])
def test_the_meter_draws_what_the_server_sends(fed, vue):
    tab, send = fed(vue=vue)
    node = tab.evaluate(ADD_NODE)
    before = tab.evaluate(WIDGETS, node), tab.evaluate(SAVED, node)
    tab.page.wait_for_timeout(500)
    assert tab.page.locator(METER).count() == 0

    for step in range(1, 8):
        send(reading(node, step))
    meter = tab.page.locator(METER)
    meter.wait_for(state="visible")
    tab.page.get_by_text("sampling 7/20").wait_for()
    assert "2.20 s/step" in meter.inner_text()
    assert "13.8 GiB / 16.0 GiB · peak 15.0 GiB" in meter.inner_text()
    for name, size in (("diffusion model", "8.00 GiB"), ("scratch", "512 MiB"), ("VAE", "256 MiB")):
        assert f"{name}\n{size}" in meter.inner_text()
    assert "audio encoder" not in meter.inner_text()
    used = [size / (16 * GIB) for size in COMPONENTS.values() if size] + [1 / 16]
    assert widths(tab) == pytest.approx(used, abs=0.01)
    assert "text encoder 2.00 GiB" in tab.page.locator(".lowbit-bar").get_attribute("aria-label")
    assert tab.page.locator(".lowbit-time").count() == 7

    box, frame = meter.bounding_box(), tab.evaluate("() => [innerWidth, innerHeight]")
    assert box["width"] > 200
    assert box["y"] + box["height"] < frame[1]
    assert tab.evaluate(CUT) == [], "nothing is cut"
    tab.shot(f"meter-{'vue' if vue else 'canvas'}")

    assert tab.evaluate(WIDGETS, node)[: len(before[0])] == before[0]
    assert tab.evaluate(SAVED, node) == before[1], "the meter is no part of a saved workflow"


def test_every_step_has_its_time_and_a_new_prompt_starts_anew(fed):
    tab, send = fed()
    node = tab.evaluate(ADD_NODE)
    for step in range(1, 5):
        send(reading(node, step))
        tab.page.get_by_text(f"sampling {step}/20").wait_for()
    heights = "() => [...document.querySelectorAll('.lowbit-time')].map(e => parseFloat(e.style.height))"
    slowest = 1.5 + 4 / 10
    assert tab.evaluate(heights) == pytest.approx([100 * (1.5 + step / 10) / slowest for step in range(1, 5)], abs=1)
    send(reading(node, 1, prompt_id="second"))
    tab.page.get_by_text("sampling 1/20").wait_for()
    assert tab.evaluate(heights) == [100]
    send(reading(node, 0, phase="decode", steps=0, prompt_id="second"))
    tab.page.get_by_text("decoding", exact=True).wait_for()
    assert tab.evaluate(heights) == [100]


def test_what_is_not_known_is_left_out(fed):
    """A device that counts nothing but what is allocated, such as the CPU."""
    tab, send = fed()
    node = tab.evaluate(ADD_NODE)
    send(
        reading(
            node,
            limit_bytes=None,
            free_bytes=None,
            reserved_bytes=0,
            seconds_per_step=None,
            peak_bytes=0,
            steps=0,
            allocated_bytes=3 * 2**20,
            components={"other": 3 * 2**20},
        )
    )
    tab.page.get_by_text("3.0 MiB").first.wait_for()
    assert tab.page.locator(METER).inner_text().split("\n") == ["sampling", "3.0 MiB", "other", "3.0 MiB"]
    assert widths(tab) == [1]


def test_events_for_other_nodes_change_nothing(fed):
    tab, send = fed()
    tab.evaluate(ADD_NODE)
    other = tab.evaluate("() => { const n = LiteGraph.createNode('KSampler'); app.rootGraph.add(n); return n.id; }")
    for node in (str(other), "999", "999:1", "", None):
        send(reading(node))
    tab.page.wait_for_timeout(500)
    assert tab.page.locator(METER).count() == 0


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "vue"])
def test_the_meter_works_inside_a_subgraph(fed, vue):
    tab, send = fed(vue=vue)
    node = tab.evaluate(ADD_NODE)
    inside = tab.evaluate(
        """(id) => {
            const { node } = app.rootGraph.convertToSubgraph(new Set([app.rootGraph.getNodeById(id)]));
            return [String(node.id), String(node.subgraph.nodes[0].id)];
        }""",
        node,
    )
    send(reading(":".join(inside), 3))
    tab.page.wait_for_timeout(300)
    tab.evaluate(
        """(id) => {
            const node = app.rootGraph.getNodeById(id);
            app.canvas.openSubgraph ? app.canvas.openSubgraph(node.subgraph, node) : app.canvas.setGraph(node.subgraph);
        }""",
        inside[0],
    )
    send(reading(":".join(inside), 4))
    tab.page.get_by_text("sampling 4/20").wait_for()
    tab.page.locator(METER).wait_for(state="visible")
    tab.shot(f"meter-subgraph-{'vue' if vue else 'canvas'}")


def test_the_meter_speaks_chinese(fed):
    tab, send = fed(language="zh")
    node = tab.evaluate(ADD_NODE)
    send(reading(node, 7))
    tab.page.get_by_text("采样 7/20").wait_for()
    text = tab.page.locator(METER).inner_text()
    assert "扩散模型" in text
    assert "秒/步" in text
    assert "峰值" in text
    tab.shot("meter-zh")


NUMBERED = """(prompt) => app.loadApiJson(prompt, "a run")"""


def test_a_real_run_feeds_the_meter(fed):
    """Wan on tiny weights with its VAE managed, started with the Run button."""
    tab, _ = fed()
    graph = graphs.wan_t2v(
        graphs.load_diffusion_model("wan_t2v.safetensors", format="int8"),
        graphs.conditioning_random(width=256),
        steps=8,
    ) | graphs.decode(graphs.node("VAELoader", vae_name="wan_vae.safetensors"))
    graph["manager"] = graphs.node("LowbitMemoryManager", model=["model", 0], vae=["vae", 0], **graphs.MEMORY_MANAGER)
    graph["sample"]["inputs"]["model"] = ["manager", 0]
    graph["images"]["inputs"]["vae"] = ["manager", 2]
    graph["saved"] = graphs.node("SaveImage", images=["images", 0], filename_prefix="meter")
    tab.evaluate(NUMBERED, numbered(graph))
    tab.run()
    meter = tab.page.locator(METER)
    meter.wait_for(state="visible")
    assert "peak" in meter.inner_text()
    assert "iB" in meter.inner_text()
    assert tab.page.locator(".lowbit-entry").count() >= 1
    assert tab.page.get_by_text("GiB now").count() == 0, "the line of progress says the same"
    tab.command("Comfy.Canvas.FitView")
    tab.shot("meter-real-run")


def numbered(graph: graphs.Graph) -> graphs.Graph:
    """The same prompt with numbers for node ids: ComfyUI's canvas takes no others."""
    numbers = {name: str(index) for index, name in enumerate(graph, 1)}
    return {
        numbers[name]: entry
        | {"inputs": {k: [numbers[v[0]], v[1]] if isinstance(v, list) else v for k, v in entry["inputs"].items()}}
        for name, entry in graph.items()
    }
