"""Every bundled workflow and the official template it came from, end to end on tiny checkpoints under the real file names.

Only what demo/workflows/small.py lists is changed for the run: frames, sizes, steps, drawn masks, the GPU's memory limit.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from safetensors.torch import load_file

from demo import comfyui, graphs
from demo.measure import relative_error
from demo.tiny import official
from demo.workflows import edit, tidy
from demo.workflows.__main__ import FOLDER, text, untidy
from demo.workflows.bundle import WORKFLOWS
from demo.workflows.small import scale_down
from demo.workflows.unfold import api_form, unfold

pytest.importorskip("comfyui_workflow_templates_json")

TEMPLATES = sorted({workflow.template for workflow in WORKFLOWS.values()})
LOADERS = {"LowbitLoadDiffusionModel", "LowbitLoadTextEncoder", "LowbitLoadVAE", "LowbitLoadModelPatch"}
LIGHTNING = {"enable lightning lora", "enable 4steps lora?", "enable 4steps lora"}
LARGEST_ERROR = {"int8": 0.05, "4 bits": 0.15}


@pytest.fixture(scope="module")
def info(bench):
    return bench.server.get_json("/object_info")


@pytest.fixture(scope="module")
def run(bench, info):
    """Runs a saved graph scaled down; gives every decoded latent and picture, and the texts that nodes showed."""
    official.write_all(bench.base)
    count = itertools.count()

    def run(saved: dict[str, Any], lightning: bool = False) -> tuple[dict[str, Any], dict[str, str]]:
        prompt = scale_down(api_form(unfold(saved, info)))
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
        return tensors, texts

    return run


@pytest.fixture(scope="module")
def references(run):
    """(template, Lightning LoRA or not) -> what the official template makes, run when first asked for."""

    class References(dict):
        def __missing__(self, key):
            self[key] = run(edit.official(key[0]), key[1])[0]
            return self[key]

    return References()


def bundled(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def test_every_bundled_file_is_one_of_the_table_with_a_small_thumbnail():
    assert {path.stem for path in FOLDER.glob("*.json")} == set(WORKFLOWS)
    for name in WORKFLOWS:
        assert 1000 < (FOLDER / f"{name}.jpg").stat().st_size < 60_000


@pytest.mark.parametrize("name", WORKFLOWS)
def test_bundled_file_is_what_the_generator_makes_with_these_nodes(info, name):
    assert (FOLDER / f"{name}.json").read_text(encoding="utf-8") == text(name, info)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_bundled_file_is_tidy(name):
    assert untidy(bundled(name)) == []


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("lightning", [False, True])
def test_official_template_runs_on_the_tiny_checkpoints(references, template, lightning):
    for key, tensor in references[template, lightning].items():
        assert tensor.isfinite().all(), key
        assert tensor.std() > 0.02, key


@pytest.mark.parametrize("lightning", [False, True])
@pytest.mark.parametrize("name", WORKFLOWS)
def test_bundled_workflow_is_near_its_template_in_16_bits(run, references, name, lightning):
    workflow = WORKFLOWS[name]
    tensors, texts = run(bundled(name), lightning)
    reference = references[workflow.template, lightning]
    bound = LARGEST_ERROR["4 bits" if "16GB" in name else "int8"]
    for key, tensor in tensors.items():
        assert tensor.isfinite().all(), key
        # Zero would mean that nothing was quantized.
        assert 1e-4 < relative_error(tensor, reference[key]) < bound, key
    assert "calls of" in texts["LowbitAttentionReport"]
    assert "Peak" in texts["LowbitMemoryReport"]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_bundled_workflow_has_the_nodes_files_and_settings_of_its_template(info, name):
    """Beside the pack's own nodes nothing is added, nothing is lost, and no setting differs."""
    ours, theirs = (unfold(graph, info) for graph in (bundled(name), edit.official(WORKFLOWS[name].template)))
    stock = {"UNETLoader", "CLIPLoader", "VAELoader", "ModelPatchLoader"}

    def settings(flat) -> list[tuple[str, str]]:
        return sorted(
            (node.type, json.dumps(node.values, sort_keys=True))
            for node in flat.values()
            if not node.type.startswith("Lowbit") and node.type not in stock | {"PreviewImage", "PreviewAny"}
        )

    def files(flat) -> set[str]:
        names = (value for node in flat.values() for value in node.values.values())
        return {value for value in names if isinstance(value, str) and value.endswith(".safetensors")}

    workflow = WORKFLOWS[name]
    if not workflow.varies:
        assert settings(ours) == settings(theirs)
        assert files(ours) == files(theirs)
    assert not {node.type for node in ours.values()} & stock
    assert {node.type for node in ours.values()} & LOADERS


def test_links_are_looked_at_on_every_level():
    saved = edit.official("image_qwen_image")
    assert [level for level, _ in tidy.levels(saved)] == ["", "Text to Image (Qwen-Image)"]
    assert any(tidy.crossings(graph) for _, graph in tidy.levels(saved))


def test_the_file_names_asked_for_are_all_there(bench, info):
    official.write_all(bench.base)
    for name in WORKFLOWS:
        for node in unfold(bundled(name), info).values():
            for value in node.values.values():
                if isinstance(value, str) and value.endswith(".safetensors"):
                    assert any(path.endswith(f"/{value}") for path in official.FILES), value
    assert comfyui.CHECKOUT / "workflows" == FOLDER
