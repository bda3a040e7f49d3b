"""Core's Generate Text behind the Text Generation node in a running ComfyUI: it writes, repeats, and can be interrupted."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from testing import graphs
from testing.server import GraphFailedError, GraphInterruptedError

WRITING, SILENT = "qwen25_vl_writing.safetensors", "qwen25_vl.safetensors"
SETTINGS = {"kv_cache": "full", "cuda_graph": "auto", "window": 252, "heavy_hitters": 252}
LONG = 1000


def sampling(seed: int) -> dict[str, Any]:
    values = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.0, "repetition_penalty": 1.05, "seed": seed}
    return {"sampling_mode": "on"} | {f"sampling_mode.{name}": value for name, value in values.items()}


def writing(file: str = WRITING, length: int = 12, **options: Any) -> graphs.Graph:
    """Load the encoder in INT8, put our node behind it, write, and show what was written."""
    settings = {name: options.pop(name, value) for name, value in SETTINGS.items()}
    mode = options or {"sampling_mode": "off"}
    return {
        "text": graphs.load_text_encoder(file, "qwen_image", "int8"),
        "node": graphs.node("LowbitTextGeneration", clip=["text", 0], **settings),
        "write": graphs.node("TextGenerate", clip=["node", 0], prompt="a red train", max_length=length, **mode),
        "show": graphs.node("PreviewAny", source=["write", 0]),
    }


UNSEEN = itertools.count(10_000)


def written(bench, graph: graphs.Graph) -> str:
    # A window that is seen for the first time and holds every token: an unchanged node would answer from ComfyUI's cache.
    if graph["node"]["inputs"]["window"] > 100:
        graph["node"]["inputs"]["window"] = next(UNSEEN)
    return bench.server.run(graph).outputs["show"]["text"][0]


def test_it_writes_and_the_seed_repeats(bench):
    greedy = written(bench, writing())
    assert len(greedy) > 12
    assert written(bench, writing(cuda_graph="off")) == greedy
    first, again, other = (written(bench, writing(**sampling(seed))) for seed in (1, 1, 2))
    assert first == again != other


def test_few_heavy_hitters_write_something_else(bench):
    greedy = written(bench, writing(length=20))
    assert written(bench, writing(length=20, kv_cache="heavy_hitters", window=1000)) == greedy
    assert written(bench, writing(length=20, kv_cache="heavy_hitters", window=3, heavy_hitters=2)) != greedy


def test_an_interrupt_ends_the_text_and_the_next_one_is_whole(bench):
    seen: list[dict] = []

    def interrupt(event: dict) -> None:
        if event["type"] == "progress" and event["data"]["node"] == "write" and event["data"]["value"] > 4 and not seen:
            seen.append(event["data"])
            bench.server.interrupt()

    with pytest.raises(GraphInterruptedError):
        bench.server.run(writing(length=LONG), on_event=interrupt)
    assert seen[0]["max"] == LONG
    assert len(written(bench, writing())) > 12


def test_a_picture_beside_the_prompt_is_looked_at(bench):
    texts = []
    for seed in (None, 5, 6):
        graph = writing()
        if seed is not None:
            graph["picture"] = graphs.node("TinyImage", frames=1, height=56, width=56, seed=seed)
            graph["write"]["inputs"]["image"] = ["picture", 0]
        texts.append(written(bench, graph))
    assert len(set(texts)) == 3


def test_a_file_without_a_head_is_told_so(bench):
    with pytest.raises(GraphFailedError) as failed:
        bench.server.run(writing(SILENT))
    assert "has no output head" in failed.value.exception_message
