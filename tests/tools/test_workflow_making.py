"""Saved graphs: taken apart, turned into prompts, written again, placed and looked over, on graphs made for the purpose."""

from __future__ import annotations

import pytest

from tools.workflows import tidy
from tools.workflows.compose import Design, Exposed, Subgraph, saved_graph
from tools.workflows.edit import insert, note, own
from tools.workflows.layout import TITLE, column, place, row
from tools.workflows.room import ROOM
from tools.workflows.small import scale_down
from tools.workflows.unfold import Node, UnknownNodeError, api_form, unfold
from tools.workflows.widgets import list_values, read_values


def node_info(inputs: dict, outputs: list[str], optional: dict | None = None, **more) -> dict:
    return {
        "input": {"required": inputs, "optional": optional or {}},
        "input_order": {"required": list(inputs), "optional": list(optional or {})},
        "output": outputs,
        "output_name": outputs,
        "display_name": None,
        **more,
    }


MODE = [
    "COMFY_DYNAMICCOMBO_V3",
    {
        "options": [
            {"key": "plain", "inputs": {"required": {}}},
            {"key": "cut", "inputs": {"required": {"at": ["INT", {"default": 3}]}, "optional": {"mask": ["MASK", {}]}}},
        ]
    },
]
INFO = {
    "Load": node_info({"name": [["a", "b"], {}]}, ["MODEL"]),
    "Picture": node_info({"image": [[], {"image_upload": True}]}, ["IMAGE"]),
    "Number": node_info({"value": ["INT", {"default": 1, "control_after_generate": True}]}, ["INT"]),
    "Patch": node_info({"model": ["MODEL", {}], "strength": ["FLOAT", {"default": 0.5}]}, ["MODEL"]),
    "Sample": node_info(
        {"seed": ["INT", {}], "model": ["MODEL", {}], "mode": MODE, "steps": ["INT", {"default": 20}]}, ["LATENT"]
    ),
    "Pass": node_info(
        {"value": ["COMFY_MATCHTYPE_V3", {"template": {"template_id": "value"}}]},
        ["COMFY_MATCHTYPE_V3", "STRING"],
        output_matchtypes=["value", None],
    ),
    "Save": node_info({"latent": ["LATENT", {}]}, []),
}


def saved_node(number: int, kind: str, inputs=(), values=(), mode=0, outputs=("MODEL",)) -> dict:
    """A node with inputs (name, type, link id, is a widget)."""
    return {
        "id": number,
        "type": kind,
        "mode": mode,
        "inputs": [
            {"name": name, "type": type, "link": link, **({"widget": {"name": name}} if widget else {})}
            for name, type, link, widget in inputs
        ],
        "outputs": [{"name": name, "type": name} for name in outputs],
        "widgets_values": list(values),
    }


def chain(mode: int) -> dict:
    """Load -> Patch (in this mode) -> Sample -> Save."""
    return {
        "nodes": [
            saved_node(1, "Load", values=["b"]),
            saved_node(2, "Patch", [("model", "MODEL", 1, False)], [0.25], mode),
            saved_node(3, "Sample", [("model", "MODEL", 2, False)], [7, "fixed", "cut", 9, 30], outputs=("LATENT",)),
            saved_node(4, "Save", [("latent", "LATENT", 3, False)], outputs=()),
        ],
        "links": [[1, 1, 0, 2, 0, "MODEL"], [2, 2, 0, 3, 0, "MODEL"], [3, 3, 0, 4, 0, "LATENT"]],
    }


def test_prompt_has_named_values_and_links_and_nothing_of_the_frontends_own():
    prompt = api_form(unfold(chain(0), INFO))
    assert prompt["3"]["inputs"] == {"seed": 7, "mode": "cut", "mode.at": 9, "steps": 30, "model": ["2", 0]}
    assert prompt["2"]["inputs"] == {"strength": 0.25, "model": ["1", 0]}
    assert prompt["4"]["inputs"] == {"latent": ["3", 0]}


def test_bypassed_node_hands_its_input_on_and_a_muted_one_nothing():
    assert unfold(chain(4), INFO)["3"].links == {"model": ("1", 0)}
    muted = unfold(chain(2), INFO)
    assert "2" not in muted
    assert muted["3"].links == {}


def test_node_that_the_server_lacks_is_named():
    graph = chain(0)
    graph["nodes"][1]["type"] = "Missing"
    with pytest.raises(UnknownNodeError, match=r"Missing \(node 2\)"):
        unfold(graph, INFO)


@pytest.mark.parametrize("kind", ["Reroute", "PrimitiveNode"])
def test_frontend_nodes_are_resolved(kind):
    reroute = saved_node(5, "Reroute", [("", "*", 1, False)])
    primitive = saved_node(5, "PrimitiveNode", values=[11, "fixed"])
    graph = chain(0)
    graph["nodes"].append(reroute if kind == "Reroute" else primitive)
    if kind == "Reroute":
        graph["links"][1] = [2, 5, 0, 3, 0, "MODEL"]
        graph["links"][0] = [1, 1, 0, 5, 0, "MODEL"]
        assert unfold(graph, INFO)["3"].links == {"model": ("1", 0)}
    else:
        graph["nodes"][2]["inputs"].append({"name": "steps", "type": "INT", "link": 9, "widget": {"name": "steps"}})
        graph["links"].append([9, 5, 0, 3, 1, "INT"])
        assert unfold(graph, INFO)["3"].values["steps"] == 11
    assert "5" not in unfold(graph, INFO)


def nested(host_values: list) -> dict:
    """Load -> subgraph (Sample, its seed and steps shown by the host) -> Save."""
    inner = {
        "id": "inner",
        "name": "Inner",
        "nodes": [
            saved_node(
                3,
                "Sample",
                [("model", "MODEL", 1, False), ("seed", "INT", 2, True), ("steps", "INT", 3, True)],
                [1, "fixed", "plain", 2],
                outputs=("LATENT",),
            )
        ],
        "links": [
            {"id": 1, "origin_id": -10, "origin_slot": 0, "target_id": 3, "target_slot": 0, "type": "MODEL"},
            {"id": 2, "origin_id": -10, "origin_slot": 1, "target_id": 3, "target_slot": 1, "type": "INT"},
            {"id": 3, "origin_id": -10, "origin_slot": 2, "target_id": 3, "target_slot": 2, "type": "INT"},
            {"id": 4, "origin_id": 3, "origin_slot": 0, "target_id": -20, "target_slot": 0, "type": "LATENT"},
        ],
        "inputs": [
            {"name": "model", "type": "MODEL", "linkIds": [1]},
            {"name": "seed", "type": "INT", "linkIds": [2]},
            {"name": "steps", "type": "INT", "linkIds": [3]},
        ],
        "outputs": [{"name": "latent", "type": "LATENT", "linkIds": [4]}],
    }
    host = saved_node(7, "inner", [("model", "MODEL", 1, False)], host_values, outputs=("LATENT",))
    return {
        "nodes": [
            saved_node(1, "Load", values=["a"]),
            host,
            saved_node(4, "Save", [("latent", "LATENT", 2, False)], outputs=()),
        ],
        "links": [[1, 1, 0, 7, 0, "MODEL"], [2, 7, 0, 4, 0, "LATENT"]],
        "definitions": {"subgraphs": [inner]},
    }


def test_subgraph_is_unfolded_and_its_hosts_values_hold():
    flat = unfold(nested([5, 6]), INFO)
    assert flat["7:3"].links == {"model": ("1", 0)}
    assert (flat["7:3"].values["seed"], flat["7:3"].values["steps"]) == (5, 6)
    assert flat["4"].links == {"latent": ("7:3", 0)}


def test_values_inside_hold_when_the_host_has_none():
    flat = unfold(nested([]), INFO)
    assert (flat["7:3"].values["seed"], flat["7:3"].values["steps"]) == (1, 2)


def test_value_linked_to_the_host_comes_before_its_own():
    graph = nested([5, 6])
    graph["nodes"].append(saved_node(9, "Number", values=[33, "fixed"], outputs=("INT",)))
    graph["nodes"][1]["inputs"].append({"name": "steps", "type": "INT", "link": 3, "widget": {"name": "steps"}})
    graph["links"].append([3, 9, 0, 7, 1, "INT"])
    assert unfold(graph, INFO)["7:3"].links["steps"] == ("9", 0)


@pytest.mark.parametrize("values", [[7, "randomize", "cut", 4, 20], [7, "fixed", "plain", 20]])
def test_values_read_and_listed_are_the_same(values):
    assert list_values(INFO["Sample"], read_values(INFO["Sample"], values)) == values


def test_values_that_are_missing_are_defaults():
    assert read_values(INFO["Patch"], []) == {"strength": 0.5}
    assert list_values(INFO["Picture"], {"image": "x.png"}) == ["x.png", "image"]


def design() -> Design:
    flat = {
        "1": own("Load", name="a"),
        "3": own("Sample", None, {"model": ("1", 0)}, seed=1, mode="plain", steps=2),
        "4": own("Save", None, {"latent": ("3", 0)}),
        "about": note("About", "text"),
    }
    insert(flat, "patch", own("Patch", strength=0.75), "model", ("1", 0))
    insert(flat, "pass", own("Pass"), "value", ("3", 0))
    folded = Subgraph(
        "Sampling",
        row("patch", "3"),
        inputs={"model": ("1", 0)},
        outputs={"latent": ("3", 0)},
        widgets=[Exposed("seed", (("3", "seed"),)), Exposed("strength", (("patch", "strength"),))],
    )
    return Design(
        "test", flat, row("about", "1", "sub", "pass", "4"), {"sub": folded}, {("4", "latent"): ("under pass",)}
    )


def test_written_graph_unfolds_to_what_it_was_written_from():
    made = design()
    flat = unfold(saved_graph(made, INFO), INFO)
    found = sorted((node.type, sorted(node.values.items())) for node in flat.values())
    assert found == [
        ("Load", [("name", "a")]),
        ("Pass", []),
        ("Patch", [("strength", 0.75)]),
        ("Sample", [("control_after_generate", "fixed"), ("mode", "plain"), ("seed", 1), ("steps", 2)]),
        ("Save", []),
    ]
    kinds = {key: node.type for key, node in flat.items()}
    links = {(kinds[source], node.type) for node in flat.values() for source, _ in node.links.values()}
    assert links == {("Load", "Patch"), ("Patch", "Sample"), ("Sample", "Pass"), ("Pass", "Save")}


def test_node_that_passes_a_value_on_has_its_type():
    saved = saved_graph(design(), INFO)
    passing = next(node for node in saved["nodes"] if node["type"] == "Pass")
    assert [entry["type"] for entry in passing["inputs"]] == ["LATENT"]
    assert [entry["type"] for entry in passing["outputs"]] == ["LATENT", "STRING"]


def test_writing_twice_gives_the_same():
    assert saved_graph(design(), INFO) == saved_graph(design(), INFO)


def test_bends_of_a_link_hang_together():
    saved = saved_graph(design(), INFO)
    first, second = saved["extra"]["reroutes"]
    assert second["parentId"] == first["id"]
    (extension,) = saved["extra"]["linkExtensions"]
    assert extension["parentId"] == second["id"]
    assert extension["id"] in {link[0] for link in saved["links"]}


def test_node_left_out_of_the_layout_is_named():
    made = design()
    made.nodes["extra"] = own("Load")
    with pytest.raises(KeyError, match="leaves out.*extra"):
        saved_graph(made, INFO)


def test_boxes_are_placed_without_overlap_and_columns_are_equally_wide():
    sizes = {"a": (100, 50), "b": (150, 30), "c": (80, 200)}
    placed = place(row(column("a", "b", title="Group"), "c"), sizes)
    assert placed.sizes["a"][0] == placed.sizes["b"][0] == 150
    assert placed.positions["b"][1] >= placed.positions["a"][1] + 50 + TITLE
    ((title, (x, _, width, _), _),) = placed.groups
    assert title == "Group"
    assert placed.positions["c"][0] >= x + width


def drawn(nodes: list[tuple[int, int, int]], links: list[tuple[int, int, int]]) -> dict:
    """Nodes (id, x, y) of 100 x 100 with four sockets, and links (from, to, slot of both)."""
    sockets = [{"name": str(slot), "type": "*", "link": None} for slot in range(4)]
    return {
        "nodes": [
            {"id": number, "pos": [x, y], "size": [100, 100], "inputs": sockets, "outputs": sockets}
            for number, x, y in nodes
        ],
        "links": [[number, a, slot, b, slot, "*"] for number, (a, b, slot) in enumerate(links, 1)],
    }


def test_overlap_link_behind_a_node_and_crossing_are_found():
    assert tidy.overlaps(drawn([(1, 0, 0), (2, 90, 50)], [])) == [(1, 2)]
    assert tidy.overlaps(drawn([(1, 0, 0), (2, 300, 0)], [])) == []
    assert tidy.links_behind_nodes(drawn([(1, 0, 0), (2, 200, 0), (3, 400, 0)], [(1, 3, 0)])) == [(1, 2)]
    assert tidy.links_behind_nodes(drawn([(1, 0, 0), (2, 200, 300), (3, 400, 0)], [(1, 3, 0)])) == []
    square = [(1, 0, 0), (2, 0, 300), (3, 500, 0), (4, 500, 300)]
    assert tidy.crossings(drawn(square, [(1, 4, 0), (2, 3, 0)])) == [(1, 2)]
    assert tidy.crossings(drawn(square, [(1, 3, 0), (2, 4, 0)])) == []


def test_room_that_a_node_grows_into_is_kept_free():
    """A saver of videos becomes taller when it has run: what is below it then, or behind it, is found before."""
    below = drawn([(1, 0, 0), (2, 0, 200)], [])
    assert tidy.overlaps(below) == []
    below["nodes"][0]["type"] = "SaveVideo"
    assert tidy.overlaps(below) == [(1, 2)]
    past = drawn([(1, 0, 250), (2, 200, 0), (3, 400, 250)], [(1, 3, 0)])
    assert tidy.links_behind_nodes(past) == []
    past["nodes"][1]["type"] = "SaveVideo"
    assert tidy.links_behind_nodes(past) == [(1, 2)]


def test_written_node_is_as_small_as_its_rows_and_has_its_room_below(monkeypatch):
    made = design()
    made.box = column("about", "1", "sub", "pass", "4")
    before = {node["type"]: node for node in saved_graph(made, INFO)["nodes"]}
    monkeypatch.setitem(ROOM, "Load", 70)
    after = {node["type"]: node for node in saved_graph(made, INFO)["nodes"]}
    assert after["Load"]["size"] == before["Load"]["size"]
    assert after["Pass"]["pos"][1] == before["Pass"]["pos"][1] + 70


def test_only_what_is_listed_is_scaled_down():
    def entry(kind: str, title: str, **inputs):
        return {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}

    small = scale_down(
        {
            "1": entry("EmptySD3LatentImage", "Latent", width=1328, height=["5", 0], batch_size=1),
            "2": entry("PrimitiveInt", "Int (Split Steps)", value=10),
            "3": entry("PrimitiveFloat", "Float(CFG)", value=3.5),
            "4": entry("Painter", "Mask of speaker 2", mask="", width=512),
        }
    )
    assert small["1"]["inputs"] == {"width": 64, "height": ["5", 0], "batch_size": 1}
    assert small["2"]["inputs"] == {"value": 1}
    assert small["3"]["inputs"] == {"value": 3.5}
    assert small["4"]["inputs"] == {"mask": "mask_right.png", "width": 512}


def test_note_is_no_part_of_a_prompt():
    assert "MarkdownNote" not in {node.type for node in unfold(saved_graph(design(), INFO), INFO).values()}
    assert isinstance(note("a", "b"), Node)
