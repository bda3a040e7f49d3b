"""Every bundled workflow and the official template it came from, end to end on tiny checkpoints under the real file names.

Only what testing/workflows/small.py lists is changed for the run: frames, sizes, steps, drawn masks, the GPU's memory limit.
"""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from testing import graphs, tiny
from testing.measure import relative_error
from testing.tiny import official
from testing.workflows.bundled import FOLDER, INFINITETALK, WORKFLOWS, official_nodes, saved, share_models
from testing.workflows.small import scale_down
from testing.workflows.unfold import Flat, api_form, unfold

pytest.importorskip("comfyui_workflow_templates_json")


def talks(name: str) -> bool:
    """Whether a workflow is one of InfiniteTalk's."""
    return WORKFLOWS[name].template == INFINITETALK


LIGHTNING = {"enable lightning lora", "enable 4steps lora?", "enable 4steps lora"}
RUNS = [
    # Qwen-Image-Edit encodes and attends to a megapixel, however small the picture. InfiniteTalk always has its LoRA on.
    pytest.param(name, lightning, marks=[pytest.mark.slow] if name == "qwen_image_edit" else [])
    for name in WORKFLOWS
    for lightning in (False, True)
    if not (lightning and (talks(name) or WORKFLOWS[name].added))
]
SAVED = {path.stem: path for path in sorted((Path(__file__).parent / "saved_workflows").glob("*.json"))}
"""The workflows as release 0.1.0 bundled them, before there was one node for all: what people have saved."""
SINGLE_NODES = {
    "LowbitLoadDiffusionModel", "LowbitLoadTextEncoder", "LowbitLoadVAE", "LowbitAttention", "LowbitMemoryManager",
    "LowbitReleaseComponent", "LowbitAttentionReport", "LowbitMemoryReport",
}  # fmt: skip
ALL = "all_nodes"
WITHOUT_A_PICTURE = {"LowbitTextGeneration"}
"""Nodes that are not for diffusion models."""


def largest_error(name: str, key: str) -> float:
    """How far a bundled workflow's result may be from its template's: of 8 bits, of 4 bits, of a second part.

    InfiniteTalk's second part goes on from the decoded and again encoded pictures of the first: the random VAE makes an
    error of 2% in them one of 12%.
    """
    if talks(name) and key.endswith("1"):
        return 0.3
    return 0.15 if "16GB" in name else 0.05


@pytest.fixture(scope="module")
def info(bench):
    return bench.server.get_json("/object_info")


@pytest.fixture(scope="module")
def run(bench):
    """Runs a flat graph scaled down; gives every decoded latent and picture, the texts that nodes showed, and the order."""
    official.write_all(bench.base)
    count = itertools.count()

    def run(flat: Flat, lightning: bool = False) -> tuple[dict[str, Any], dict[str, str], list[str]]:
        prompt = scale_down(api_form(flat))
        for node in prompt.values():
            if node["_meta"]["title"].lower() in LIGHTNING:
                node["inputs"]["value"] = lightning
        name = f"workflow-{next(count)}"
        decodes = sorted(key for key, node in prompt.items() if node["class_type"] == "VAEDecode")
        values = {f"latent{n}": prompt[key]["inputs"]["samples"] for n, key in enumerate(decodes)}
        values |= {f"image{n}": [key, 0] for n, key in enumerate(decodes)}
        result = bench.server.run(graphs.dump(prompt, name, **values))
        tensors = {key: next(iter(load_file(bench.output / name / f"{key}.safetensors").values())) for key in values}
        texts = {
            prompt[key]["class_type"]: "\n".join(output["text"])
            for key, output in result.outputs.items()
            if "text" in output
        }
        order = [event["data"]["node"] for event in result.events if event["type"] == "executing"]
        return tensors, texts, order

    return run


@pytest.fixture(scope="module")
def references(run, info):
    """(bundled workflow, Lightning LoRA or not) -> what its template makes, run when first asked for."""

    class References(dict):
        def __missing__(self, key):
            same = [name for name in WORKFLOWS if origin(name) == origin(key[0])]
            made = run(official_nodes(WORKFLOWS[key[0]], info), key[1])[0]
            self.update({(name, key[1]): made for name in same})
            return made

    return References()


def origin(name: str) -> tuple[str, bool]:
    """Workflows of one origin are compared with the same run."""
    return WORKFLOWS[name].template, WORKFLOWS[name].adapt is not None


def test_every_bundled_file_is_one_of_the_table_with_a_small_thumbnail():
    assert {path.stem for path in FOLDER.glob("*.json")} == set(WORKFLOWS)
    for name in WORKFLOWS:
        assert 1000 < (FOLDER / f"{name}.jpg").stat().st_size < 60_000


@pytest.mark.parametrize(("name", "lightning"), RUNS)
def test_official_template_runs_on_the_tiny_checkpoints(references, name, lightning):
    for key, tensor in references[name, lightning].items():
        assert tensor.isfinite().all(), key
        assert tensor.std() > 0.02, key


@pytest.mark.parametrize(("name", "lightning"), RUNS)
def test_bundled_workflow_is_near_its_template_in_16_bits(run, references, info, name, lightning):
    flat = unfold(saved(name), info)
    tensors, texts, order = run(flat, lightning)
    reference = references[name, lightning]
    for key, tensor in tensors.items():
        assert tensor.isfinite().all(), key
        if WORKFLOWS[name].added:
            assert relative_error(tensor, reference[key]) > 0.01, key
            continue
        # Zero would mean that nothing was quantized.
        assert 1e-4 < relative_error(tensor, reference[key]) < largest_error(name, key), key
    if name == ALL:
        assert_reported_and_released(flat, texts, order)
    elif not lightning:  # the second run is answered from the cache as far as the one node
        assert [line.split(":")[0] for line in texts["LowbitOptimize"].splitlines()] == [
            "Weights",
            "Attention",
            "Memory",
        ]


@pytest.mark.parametrize("name", SAVED)
def test_workflow_of_the_release_before_runs_as_it_did(run, references, info, name):
    flat = unfold(json.loads(SAVED[name].read_text(encoding="utf-8")), info)
    assert {node.type for node in flat.values()} >= SINGLE_NODES
    tensors, texts, order = run(flat)
    for key, tensor in tensors.items():
        assert 1e-4 < relative_error(tensor, references[name, False][key]) < largest_error(name, key), key
    assert_reported_and_released(flat, texts, order)


def assert_reported_and_released(flat: Flat, texts: dict[str, str], order: list[str]) -> None:
    """The reports say something, and every component is released after all that use it."""
    assert "calls of" in texts["LowbitAttentionReport"]
    assert "Peak" in texts["LowbitMemoryReport"]
    assert_released_after_its_work(flat, order, "text_encoder", ("CLIPTextEncode", "TextEncodeQwenImageEdit"))
    assert_released_after_its_work(flat, order, "audio_encoder", ("AudioEncoderEncode",))
    assert_released_after_its_work(flat, order, "diffusion_model", ("KSampler", "KSamplerAdvanced"))


def assert_released_after_its_work(flat: Flat, order: list[str], component: str, users: tuple[str, ...]) -> None:
    """The release node lets a component go after all that use it have run; a node answered from the cache did not."""
    releases = [order.index(key) for key, node in flat.items() if node.values.get(component) is True and key in order]
    used = [order.index(key) for key, node in flat.items() if node.type in users and key in order]
    if releases and used:
        assert max(releases) > max(used)


@pytest.mark.parametrize("name", [name for name in WORKFLOWS if name.startswith(("wan", "qwen_image_text"))])
def test_lightning_lora_changes_the_result(references, name):
    fast, normal = (references[name, lightning]["latent0"] for lightning in (True, False))
    assert relative_error(fast, normal) > 0.05


@pytest.mark.parametrize("name", WORKFLOWS)
def test_bundled_workflow_has_the_nodes_files_and_settings_of_its_template(info, name):
    """Beside the pack's own nodes nothing is added, nothing is lost, and no setting differs."""
    workflow = WORKFLOWS[name]
    ours, theirs = unfold(saved(name), info), official_nodes(workflow, info)
    if talks(name):
        share_models(theirs)
    stock = {"UNETLoader", "CLIPLoader", "VAELoader", "ModelPatchLoader"}

    def settings(flat: Flat) -> list[tuple[str, str]]:
        used = {source for node in flat.values() for source, _ in node.links.values()}
        # A text that is written in the run is no setting.
        written = {"text"} if workflow.added else set()
        return sorted(
            (node.type, json.dumps({k: v for k, v in node.values.items() if k not in written}, sort_keys=True))
            for key, node in flat.items()
            if not node.type.startswith("Lowbit")
            and node.type not in stock | {"PreviewImage", "PreviewAny"} | set(workflow.added)
            and (key in used or info[node.type]["output_node"])
        )

    def files(flat: Flat) -> set[str]:
        names = (value for node in flat.values() for value in node.values.values())
        return {value for value in names if isinstance(value, str) and value.endswith(".safetensors")}

    assert settings(ours) == settings(theirs)
    assert (files(ours) == files(theirs)) == (not workflow.varies)
    used = {node.type for node in ours.values()}
    if name == ALL:
        assert used >= SINGLE_NODES
        assert not used & stock
    else:
        assert "LowbitOptimize" in used
        assert not used & (SINGLE_NODES - {"LowbitLoadDiffusionModel", "LowbitLoadTextEncoder"})


def test_one_workflow_shows_every_node(info):
    graph = saved(ALL)
    levels = [graph, *graph["definitions"]["subgraphs"]]
    shown = {node["type"] for level in levels for node in level["nodes"]}
    assert {name for name in info if name.startswith("Lowbit")} - WITHOUT_A_PICTURE <= shown


def test_saved_model_loads_in_core_and_gives_what_was_tried(bench, run, info):
    """What "quantize once and save" leaves in the output folder is a model file like any other."""
    name = "quantize_qwen_image_once_and_save"
    flat = unfold(saved(name), info)
    next(node for node in flat.values() if node.type == "LowbitSaveQuantizedModel").values["filename_prefix"] = "tried"
    tried = run(flat)[0]
    (written,) = bench.output.glob("tried*.safetensors")
    shutil.copy(written, bench.models / "diffusion_models" / "qwen_image_saved.safetensors")
    flat = official_nodes(WORKFLOWS[name], info)
    loader = next(node for node in flat.values() if node.type == "UNETLoader")
    loader.values["unet_name"] = "qwen_image_saved.safetensors"
    loaded = run(flat)[0]
    assert relative_error(loaded["latent0"], tried["latent0"]) < 0.02


def test_fp8_files_are_taken_as_they_are(bench, run, info):
    """What the templates' links really lead to: FP8 files with scales. The pack then stores nothing of its own."""
    name = "wan2.2_14B_text_to_video"
    folder = bench.models / "diffusion_models"
    graphs_of = {"ours": unfold(saved(name), info), "theirs": official_nodes(WORKFLOWS[name], info)}
    for flat in graphs_of.values():
        for node in flat.values():
            if "unet_name" in node.values:
                source = node.values["unet_name"]
                node.values["unet_name"] = f"real_{source}"
                if not (folder / f"real_{source}").exists():
                    scaled = tiny.quantized.scaled_fp8(load_file(folder / source))
                    tiny.write_file(folder / f"real_{source}", scaled, tiny.WAN.metadata())
    ours, theirs = (run(flat)[0] for flat in (graphs_of["ours"], graphs_of["theirs"]))
    assert relative_error(ours["latent0"], theirs["latent0"]) < 0.05
    cached = [path.name for path in (bench.models / "lowbit_cache").glob("*") if "real_wan" in path.name]
    assert cached == []


def test_the_file_names_asked_for_are_all_there(bench, info):
    official.write_all(bench.base)
    for name in WORKFLOWS:
        for node in unfold(saved(name), info).values():
            for value in node.values.values():
                if isinstance(value, str) and value.endswith(".safetensors"):
                    assert any(path.endswith(f"/{value}") for path in official.FILES), value
