"""The attention nodes in a real ComfyUI: results near core's on every graph, and graphs that finish with broken backends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from testing import graphs
from testing.measure import relative_error
from testing.server import GraphFailedError, Server

from .conftest import faulty_server

FAULTS = Path(__file__).with_name("attention_faults")
NEAR = 2e-3
SETTINGS = graphs.ATTENTION | {"error_budget": "fast"}


class Attention:
    """A server with the pack and the faulty backends, and graphs with the attention node put in."""

    def __init__(self, server: Server):
        self.server = server
        self.names = iter(range(10_000))

    def run(self, graph: dict) -> tuple[torch.Tensor, dict | None, str]:
        """The latent, the report as data when the graph has one, and its text."""
        name = f"attention-{next(self.names)}"
        result = self.server.run(graphs.dump(graph, name, latent=["sample", 0]))
        latent = next(iter(load_file(self.server.base / "output" / name / "latent.safetensors").values()))
        if "report" not in graph:
            return latent, None, ""
        return latent, self.json_of(result), result.outputs["report"]["text"][0]

    def json_of(self, result) -> dict:
        """The report's JSON, shown by core's own text preview."""
        return json.loads(result.outputs["json"]["text"][0])


def with_attention(graph: dict, fault: str | None = None, source: str = "model", seed: int = 0, **settings) -> dict:
    """The graph with the attention node behind node `source`, and a report after sampling."""
    entry = graphs.node("LowbitAttention", model=[source, 0], **(SETTINGS | settings))
    out, last = graphs.between(graph, [source, 0], "attention", entry), "attention"
    if fault:
        entry = graphs.node("TestFaultyAttention", model=["attention", 0], fault=fault, seed=seed)
        out, last = graphs.between(out, ["attention", 0], "faulty", entry), "faulty"
    out["report"] = graphs.node("LowbitAttentionReport", model=[last, 0], after=["sample", 0])
    out["json"] = graphs.node("PreviewAny", source=["report", 1])
    return out


def wan(seed=1, steps=2):
    model = graphs.load_diffusion_model("wan_t2v.safetensors")
    return graphs.wan_t2v(model, graphs.conditioning_random(width=256), seed=seed, steps=steps)


def qwen(seed=1):
    model = graphs.load_diffusion_model("qwen_image.safetensors")
    return graphs.qwen_image(model, graphs.conditioning_random(width=64), seed=seed)


def infinitetalk(seed=1):
    return graphs.infinitetalk(
        graphs.load_diffusion_model("wan_i2v_infinitetalk.safetensors"),
        graphs.load_model_patch("infinitetalk.safetensors"),
        graphs.conditioning_random(width=256),
        seed=seed,
    )


GRAPHS = {"wan": wan, "qwen": qwen, "infinitetalk": infinitetalk}


@pytest.fixture(scope="module")
def attention(models: Path, comfyui_path: Path, tmp_path_factory) -> Iterator[Attention]:
    """A server with the faulty backends."""
    with faulty_server(tmp_path_factory.mktemp("attention"), models, comfyui_path, FAULTS) as server:
        yield Attention(server)


@pytest.mark.parametrize("backend", ["auto", "measured", "sdpa"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_the_result_is_near_cores(attention, graph, backend):
    want, _, _ = attention.run(GRAPHS[graph](seed=3))
    got, report, text = attention.run(with_attention(GRAPHS[graph](seed=3), backend=backend))
    assert torch.isfinite(got).all()
    assert relative_error(got, want) < NEAR
    assert report["sampling_runs"] == 1
    assert sum(report["calls_by_backend"].values()) == sum(row["calls"] for row in report["calls"]) > 0
    assert "calls of" in text
    if backend == "sdpa":
        assert report["calls_by_backend"].keys() == {"sdpa"}


def test_infinitetalks_audio_attention_comes_through_too(attention):
    _, report, _ = attention.run(with_attention(infinitetalk(seed=4), backend="sdpa"))
    audio = [row for row in report["calls"] if row["heads"] == 40]
    assert sum(row["calls"] for row in audio) == 2 * 2, "two blocks, two steps, one model call a step at cfg 1"
    assert all(row["kv_len"] % 32 == 0 for row in audio)


def test_the_node_behind_infinitetalks_node_does_the_same(attention):
    want, _, _ = attention.run(infinitetalk(seed=5))
    got, report, _ = attention.run(with_attention(infinitetalk(seed=5), backend="sdpa", source="talk"))
    assert relative_error(got, want) < NEAR
    assert any(row["heads"] == 40 for row in report["calls"])


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("nan", "made NaN or Inf"),
        ("raises", "this backend always raises"),
        ("wrong shape", "instead of"),
    ],
)
@pytest.mark.parametrize("graph", GRAPHS)
def test_a_graph_with_a_broken_backend_finishes_and_the_report_says_why(attention, graph, fault, says):
    want, _, _ = attention.run(GRAPHS[graph](seed=6))
    got, report, text = attention.run(with_attention(GRAPHS[graph](seed=6), fault=fault))
    assert relative_error(got, want) < NEAR
    assert report["calls_by_backend"].keys() == {"right"}
    assert {item["backend"] for item in report["struck_off"]} == {"faulty"}
    assert any(says in item["reason"] for item in report["struck_off"])
    assert says in text


@pytest.mark.parametrize("dropped", [0, 5])
def test_qwens_text_mask_is_dropped_when_idle_and_honoured_when_not(attention, dropped):
    graph = qwen(seed=20 + dropped)
    plain, _, _ = attention.run(graph)
    for name in ("positive", "negative"):
        graph[f"masked_{name}"] = graphs.node("TestTextMask", conditioning=[name, 0], dropped=dropped)
        graph["sample"]["inputs"][name] = [f"masked_{name}", 0]
    want, _, _ = attention.run(graph)
    got, report, _ = attention.run(with_attention(graph, backend="sdpa"))
    assert relative_error(got, want) < NEAR
    masked = [row for row in report["calls"] if row["mask"]]
    assert bool(masked) is bool(dropped)
    assert (report["text_masks_dropped"] > 0) is (dropped == 0)
    assert (relative_error(want, plain) > 10 * NEAR) is bool(dropped), "a real mask must show, an idle one must not"


def test_a_missing_backend_is_no_hindrance(attention):
    got, report, text = attention.run(with_attention(wan(seed=7), fault="missing", backend="auto"))
    assert torch.isfinite(got).all()
    assert report["calls_by_backend"].keys() == {"right"}
    assert "right" in text


def test_nan_that_starts_in_the_middle_of_a_run_never_reaches_the_picture(attention):
    want, _, _ = attention.run(wan(seed=8, steps=12))
    got, report, text = attention.run(with_attention(wan(seed=8, steps=12), fault="late nan"))
    assert torch.isfinite(got).all()
    assert relative_error(got, want) < NEAR
    assert report["model_calls_repeated"] == 1
    assert report["calls_by_backend"].keys() == {"faulty", "right"}
    assert "repeated with exact attention" in text


def test_counts_start_anew_with_each_prompt_and_runs_add_up_within_one(attention):
    graph = with_attention(wan(seed=9), backend="sdpa")
    _, first, _ = attention.run(graph)
    graph["sample"]["inputs"]["seed"] = 10
    _, second, _ = attention.run(graph)
    assert second["calls_by_backend"] == first["calls_by_backend"]
    assert second["sampling_runs"] == 1


def test_the_schedule_keeps_the_lossy_backend_to_its_steps(attention):
    graph = with_attention(wan(seed=11, steps=6), fault="none", exact_first_steps=2, exact_last_steps=1)
    _, report, _ = attention.run(graph)
    calls = report["calls_by_backend"]
    assert calls["right"] == calls["faulty"], "3 of 6 steps are exact"
    graph = with_attention(wan(seed=12, steps=4), fault="none", exact_blocks="1")
    _, report, _ = attention.run(graph)
    calls = report["calls_by_backend"]
    assert calls["right"] == calls["faulty"], "1 of 2 blocks is exact"


def test_a_backend_that_cannot_run_stops_with_one_sentence_or_falls_back(attention):
    with pytest.raises(GraphFailedError) as failed:
        attention.run(with_attention(wan(seed=13), backend="sageattn_3_fp4", if_unavailable="stop"))
    assert failed.value.exception_message == (
        "The attention backend sageattn_3_fp4 cannot run: it needs an NVIDIA GPU. Choose another one, or let it fall back."
    )
    got, report, text = attention.run(with_attention(wan(seed=13), backend="sageattn_3_fp4"))
    assert torch.isfinite(got).all()
    assert report["calls_by_backend"].keys() == {"core"}
    assert "needs an NVIDIA GPU" in text


def test_it_works_with_a_lora_before_and_after(attention):
    base = wan(seed=14)
    lora = graphs.lora(base, "wan.safetensors")
    want, _, _ = attention.run(lora)
    plain, _, _ = attention.run(base)
    assert relative_error(want, plain) > 10 * NEAR, "the LoRA must show"
    for source in ("lora", "model"):
        got, report, _ = attention.run(with_attention(lora, backend="sdpa", source=source))
        assert relative_error(got, want) < NEAR
        assert report["calls_by_backend"].keys() == {"sdpa"}


def test_cores_own_choice_of_backend_before_it_is_kept_as_the_last_resort(attention):
    graph = with_attention(wan(seed=15))
    graph["chosen"] = graphs.node("ModelAttentionBackend", model=["model", 0], attention="pytorch attention")
    graph["attention"]["inputs"]["model"] = ["chosen", 0]
    want, _, _ = attention.run(wan(seed=15))
    got, report, _ = attention.run(graph)
    assert relative_error(got, want) < NEAR
    assert report["calls_by_backend"].keys() == {"core"}


def test_a_model_loaded_anew_knows_nothing_of_it(attention):
    attention.run(with_attention(wan(seed=16), backend="sdpa"))
    graph = wan(seed=17)
    graph["report"] = graphs.node("LowbitAttentionReport", model=["model", 0], after=["sample", 0])
    graph["json"] = graphs.node("PreviewAny", source=["report", 1])
    _, report, text = attention.run(graph)
    assert "no Attention (Lowbit) node" in text
    assert "error" in report


def test_every_input_has_a_tooltip(attention):
    for name in ("LowbitAttention", "LowbitAttentionReport"):
        info = attention.server.object_info(name)
        assert info["category"] == "lowbit"
        for group in ("required", "optional"):
            for key, spec in info["input"].get(group, {}).items():
                assert spec[1]["tooltip"], f"{name}.{key}"
