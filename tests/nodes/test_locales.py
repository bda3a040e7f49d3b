"""Every text of every node is there in every language, and none is there for what no longer exists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from lowbit.memory.components import COMPONENTS
from testing import comfyui

pytestmark = pytest.mark.headless

LOCALES = comfyui.CHECKOUT / "locales"
LANGUAGES = ("en", "zh")
FILES = ("main.json", "nodeDefs.json")
UNTRANSLATED = {"Lowbit", "CLIP", "VAE", "JSON"}
HAN = re.compile(r"[\u4e00-\u9fff]")
# What must stand in a translation word for word: formats, inputs, backends and folders have an underscore.
CODE = re.compile(r"[a-z0-9]+(?:_[a-z0-9]+)+")
# vue-i18n's own syntax: a text with one of these would be shown cut or not at all.
I18N_SYNTAX = re.compile(r"[{}@|]")


def strings(tree: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Every text of a locale file with its dotted path."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from strings(value, (*path, key))
        else:
            yield ".".join((*path, key)), value


def english(nodes) -> dict[str, Any]:
    """locales/en/nodeDefs.json as the node schemas have it."""
    tree = {}
    for name, node in nodes.items():
        tree[name] = {
            "display_name": node.display_name,
            "description": node.description,
            "inputs": {key: {"name": key, "tooltip": tooltip} for key, tooltip in node.inputs.items()},
            "outputs": {
                str(index): ({"name": label} if label else {}) | {"tooltip": tooltip}
                for index, (label, tooltip) in enumerate(node.outputs)
            },
        }
    return tree


def test_every_node_input_and_output_has_a_text(nodes):
    missing = [path for path, text in strings(english(nodes)) if not text.strip()]
    assert nodes
    assert not missing


def test_the_schemas_say_what_the_english_file_does(nodes, locale):
    assert locale("en", "nodeDefs.json") == english(nodes)


@pytest.mark.parametrize("language", LANGUAGES)
def test_nodes_that_share_an_input_say_the_same_of_it(language, locale):
    texts = locale(language, "nodeDefs.json")
    for name in ("format", "keep_rules", "dry_run", "keep_quantized_file"):
        said = [node["inputs"][name]["tooltip"] for node in texts.values() if name in node["inputs"]]
        assert len(said) == 4
        assert len(set(said)) == 1, name


@pytest.mark.parametrize("name", FILES)
def test_every_language_has_every_string_and_no_other(name, locale):
    keys = {language: {path for path, _ in strings(locale(language, name))} for language in LANGUAGES}
    for language in LANGUAGES:
        assert keys[language] == keys["en"]


def test_no_language_has_a_file_that_comfyui_does_not_read():
    found = {str(path.relative_to(LOCALES)) for path in LOCALES.rglob("*") if path.is_file()}
    assert found == {f"{language}/{name}" for language in LANGUAGES for name in FILES}


@pytest.mark.parametrize("name", FILES)
def test_chinese_is_chinese(name, locale):
    """But for names that the field uses as they are."""
    foreign = {text for _, text in strings(locale("zh", name)) if not HAN.search(text)}
    assert foreign <= UNTRANSLATED


@pytest.mark.parametrize("name", FILES)
def test_chinese_names_the_same_formats_files_and_inputs(name, locale):
    translated = dict(strings(locale("zh", name)))
    for path, text in strings(locale("en", name)):
        if not path.endswith(".name"):
            assert set(CODE.findall(text)) == set(CODE.findall(translated[path])), path


@pytest.mark.parametrize("name", FILES)
def test_chinese_punctuation_is_full_width(name, locale, half_width):
    found = {path: half_width(text) for path, text in strings(locale("zh", name))}
    assert not {path: marks for path, marks in found.items() if marks}


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", FILES)
def test_no_text_holds_the_translators_own_syntax(language, name, locale):
    assert not {path for path, text in strings(locale(language, name)) if I18N_SYNTAX.search(text)}


def test_the_meter_has_a_text_for_every_phase_and_component(locale):
    sources = [path.read_text(encoding="utf-8") for path in (comfyui.CHECKOUT / "host" / "memory").glob("*.py")]
    phases = {phase for text in sources for phase in re.findall(r"observe\(\s*\"(\w+)\"", text)}
    assert phases
    assert phases | set(COMPONENTS) <= set(locale("en", "main.json")["lowbitMeter"])


def test_the_meter_asks_for_no_text_that_is_missing(locale):
    view = (comfyui.CHECKOUT / "web" / "js" / "memory_meter_view.js").read_text(encoding="utf-8")
    asked = set(re.findall(r"say\(\"([^\"]+)\"\)", view))
    assert asked
    assert asked <= set(locale("en", "main.json")["lowbitMeter"])
