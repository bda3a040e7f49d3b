"""Edits on a flat graph: official loaders replaced by the pack's, nodes put on an edge, notes."""

from __future__ import annotations

import json
from importlib import metadata, resources
from typing import Any

from .unfold import Flat, Node, Source, unfold
from .widgets import ObjectInfo

TEMPLATES = "comfyui_workflow_templates_json"


def official(name: str) -> dict[str, Any]:
    """An official template as saved. Raises FileNotFoundError when the installed package has none of this name."""
    return json.loads((resources.files(TEMPLATES) / "templates" / f"{name}.json").read_text(encoding="utf-8"))


def versions(name: str) -> dict[str, str]:
    """The template and the version of the package it is in: kept in the file that is made from it."""
    return {"template": name, TEMPLATES.replace("_", "-"): metadata.version(TEMPLATES)}


def official_nodes(name: str, info: ObjectInfo) -> Flat:
    """An official template, flat, its nodes named by their numbers alone."""
    flat = unfold(official(name), info)
    short = {key: key.rpartition(":")[2] for key in flat}
    if len({*short.values()}) < len(flat):
        raise ValueError(f"{name} uses a node number twice")
    for node in flat.values():
        node.links = {entry: (short[source], slot) for entry, (source, slot) in node.links.items()}
    return {short[key]: node for key, node in flat.items()}


def own(kind: str, title: str | None = None, links: dict[str, Source] | None = None, **values: Any) -> Node:
    """A node that no template has; widgets not named have their defaults."""
    return Node(kind, title, values, links or {})


def relink(flat: Flat, old: Source, new: Source, but: tuple[str, ...] = ()) -> None:
    """Everything linked to output `old`, except the nodes `but`, is linked to `new`."""
    for key, node in flat.items():
        if key not in but:
            node.links = {name: new if source == old else source for name, source in node.links.items()}


def insert(flat: Flat, key: str, node: Node, entry: str, edge: Source, slot: int = 0) -> Source:
    """Puts a node on all that leaves output `edge`: into input `entry`, out of output `slot`; returns that output."""
    relink(flat, edge, (key, slot))
    node.links[entry] = edge
    flat[key] = node
    return key, slot


def replace(flat: Flat, key: str, kind: str, **values: Any) -> None:
    """Another class in a node's place, with its links out, title, and the addresses of its model files."""
    old = flat[key]
    models = old.look.get("properties", {}).get("models")
    flat[key] = Node(kind, old.title, values, {}, look={"properties": {"models": models}} if models else {})


def lowbit_loaders(flat: Flat, format: str = "auto") -> None:
    """Every loader for which the pack has one of its own gives way to it; file names stay."""
    for key, node in list(flat.items()):
        values = node.values
        if node.type == "UNETLoader":
            replace(flat, key, "LowbitLoadDiffusionModel", unet_name=values["unet_name"], format=format)
        elif node.type == "CLIPLoader":
            chosen = {name: values[name] for name in ("clip_name", "type", "device")}
            replace(flat, key, "LowbitLoadTextEncoder", format="auto", **chosen)
        elif node.type == "VAELoader":
            replace(flat, key, "LowbitLoadVAE", vae_name=values["vae_name"])
        elif node.type == "ModelPatchLoader":
            replace(flat, key, "LowbitLoadModelPatch", name=values["name"], format=format)


def optimize(flat: Flat, key: str, model: Source, clip: str = "", vae: str = "", preset: str = "balanced") -> None:
    """The one node behind output `model`, as node `key`; text encoder and VAE, where their loaders are named, go through it."""
    insert(flat, key, own("LowbitOptimize", preset=preset), "model", model)
    for slot, (entry, loader) in enumerate((("clip", clip), ("vae", vae)), start=1):
        if loader:
            insert(flat, key, flat[key], entry, (loader, 0), slot)


def retitle(flat: Flat, **titles: str) -> None:
    """Titles by node number: `retitle(flat, n75="High noise model")`."""
    for key, title in titles.items():
        flat[key.removeprefix("n")].title = title


def rename_file(flat: Flat, key: str, widget: str, name: str) -> None:
    """Another model file in a loader, with its address changed alike."""
    node = flat[key]
    old, node.values[widget] = node.values[widget], name
    for model in node.look["properties"]["models"]:
        model["url"] = model["url"].replace(old, name)
        model["name"] = name


def note(title: str, text: str) -> Node:
    """A note that the browser shows as Markdown."""
    return Node("MarkdownNote", title, {"text": text})


def model_list(flat: Flat) -> str:
    """The model files a workflow asks for, by folder, with where to get them, as Markdown."""
    folders: dict[str, dict[str, str]] = {}
    for node in flat.values():
        for model in node.look.get("properties", {}).get("models", []):
            folders.setdefault(model["directory"], {})[model["name"]] = model["url"]
    parts = []
    for folder, files in sorted(folders.items(), key=lambda item: item[0] != "diffusion_models"):
        lines = [f"- [{name}]({url})" for name, url in files.items()]
        parts.append("\n".join([f"**models/{folder}**", *lines]))
    return "\n\n".join(parts)
