"""The one node after a run: its three lines stand on it whole, the meter below them."""

from __future__ import annotations

import pytest

from testing import graphs

from .test_meter import CUT, METER, NUMBERED, numbered

pytestmark = [pytest.mark.browser, pytest.mark.headless, pytest.mark.slow]

LINES = ".lowbit-report"
HIDDEN = "(text) => text.scrollHeight > text.clientHeight + 1 || text.scrollWidth > text.clientWidth + 1"


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "vue"])
def test_what_it_did_can_be_read_on_the_node(tab, server, vue):
    tab.open(**{"Comfy.VueNodes.Enabled": vue})
    server.free()
    graph = graphs.wan_t2v(
        graphs.load_diffusion_model("wan_t2v.safetensors"), graphs.conditioning_random(width=256), steps=4
    ) | graphs.decode(graphs.node("VAELoader", vae_name="wan_vae.safetensors"))
    graph["optimize"] = graphs.node("LowbitOptimize", model=["model", 0], vae=["vae", 0], preset="balanced")
    graph["sample"]["inputs"]["model"] = ["optimize", 0]
    graph["images"]["inputs"]["vae"] = ["optimize", 2]
    graph["saved"] = graphs.node("SaveImage", images=["images", 0], filename_prefix="optimize")
    tab.evaluate(NUMBERED, numbered(graph))
    tab.run()
    tab.page.locator(METER).wait_for(state="visible")
    lines = tab.page.locator(LINES)
    text = lines.inner_text().splitlines()
    assert [line.split(":")[0] for line in text] == ["Weights", "Attention", "Memory"]
    tab.page.wait_for_timeout(1000)
    assert not lines.evaluate(HIDDEN)
    assert tab.evaluate(CUT) == []
    tab.evaluate(
        """() => {
            const node = app.rootGraph.nodes.find((node) => node.type === "LowbitOptimize");
            app.canvas.ds.scale = 1.5;
            app.canvas.ds.offset = [100 - node.pos[0], 100 - node.pos[1]];
            app.canvas.setDirty(true, true);
        }"""
    )
    tab.page.wait_for_timeout(500)
    tab.shot(f"optimize-{'vue' if vue else 'canvas'}")
