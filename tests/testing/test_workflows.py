"""Saved graphs: taken apart, turned into prompts and scaled down, on graphs made for the purpose."""

from __future__ import annotations

import pytest

from testing.workflows.small import scale_down
from testing.workflows.unfold import UnknownNodeError, api_form, unfold
from testing.workflows.widgets import read_values


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


def test_values_of_a_dynamic_combo_are_named_by_its_choice():
    cut, plain = (read_values(INFO["Sample"], [7, "fixed", *rest]) for rest in (["cut", 4, 20], ["plain", 20]))
    assert cut == {"seed": 7, "control_after_generate": "fixed", "mode": "cut", "mode.at": 4, "steps": 20}
    assert plain == {"seed": 7, "control_after_generate": "fixed", "mode": "plain", "steps": 20}


def test_values_that_are_missing_are_defaults():
    assert read_values(INFO["Patch"], []) == {"strength": 0.5}
    assert read_values(INFO["Picture"], ["x.png", "image"]) == {"image": "x.png", "upload": "image"}


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
    graph = chain(0)
    graph["nodes"].append(saved_node(8, "MarkdownNote", values=["text"], outputs=()))
    assert unfold(graph, INFO) == unfold(chain(0), INFO)
