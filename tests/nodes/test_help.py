"""Every node has a help page in both languages that names all of its inputs, outputs and choices, and nothing stale."""

from __future__ import annotations

import ast
import re

import pytest

from lowbit.attention.backends import BACKENDS
from lowbit.ops.auto_format import AUTO_ROWS
from lowbit.ops.formats import FORMAT_CHOICES
from testing import comfyui

pytestmark = pytest.mark.headless

PACK = comfyui.CHECKOUT
DOCS = PACK / "web" / "docs"
LANGUAGES = ("en", "zh")
SECTIONS = {
    "en": ("When to use it", "Inputs", "Outputs", "Example", "When something goes wrong"),
    "zh": ("何时使用", "输入", "输出", "示例", "出错时怎么办"),
}
BACKEND_HEADING = {"en": "\n## Backends\n", "zh": "\n## 后端\n"}
# Choices that are explained in the help of one node, and those that are core's or the user's own files.
FORMAT_HELP = "LowbitLoadDiffusionModel"
NOT_OURS = ("type", "unet_name", "clip_name", "vae_name", "name")
OUR_FOLDERS = ("nodes", "host", "ops", "attention", "memory", "kernels", "text")


def page(node: str, language: str) -> str:
    """The help that ComfyUI shows: a page of the language's own, else the one without a language."""
    path = DOCS / f"{node}.md" if language == "en" else DOCS / node / f"{language}.md"
    return path.read_text(encoding="utf-8")


def section(text: str, title: str) -> str:
    """What stands below the heading `title`, up to the next heading of the same level."""
    assert f"\n## {title}\n" in text, f"no section {title}"
    return text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def items(text: str) -> dict[str, str]:
    """First line of every list entry that has more than one, to the rest of it."""
    found = re.findall(r"^- (.+)\\\n((?:  .+\n?)+)", text, re.MULTILINE)
    return {first: re.sub(r"\\?\n  ", "\n", rest.strip()) for first, rest in found}


def quoted(text: str) -> list[str]:
    """The fragments of every quoted message: between double quotes of either kind, cut at the dots that stand for names."""
    found = re.findall(r"[\"“]([^\"”]+)[\"”]", text)
    return [part.strip(" .,':") for message in found for part in re.split(r"\.\.\.|…+", message)]


@pytest.fixture(scope="module")
def said() -> str:
    """Every string constant in the pack's own code; what an f-string fills in is a line break."""
    texts = []
    for folder in OUR_FOLDERS:
        for path in (PACK / folder).rglob("*.py"):
            for found in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(found, ast.JoinedStr):
                    texts.append("".join(v.value if isinstance(v, ast.Constant) else "\n" for v in found.values))
                elif isinstance(found, ast.Constant) and isinstance(found.value, str):
                    texts.append(found.value)
    return "\n".join(texts)


def test_every_node_has_a_page_and_no_page_is_left_over(nodes):
    expected = {f"{name}.md" for name in nodes} | {f"{name}/zh.md" for name in nodes}
    assert {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")} == expected


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_page_has_the_same_sections_with_something_in_them(nodes, language):
    for name in nodes:
        text = page(name, language)
        titles = re.findall(r"^## (.+)$", text, re.MULTILINE)
        assert [title for title in titles if title in SECTIONS[language]] == list(SECTIONS[language]), name
        assert len(text.split("\n## ", 1)[0].strip()) > 20, f"{name} does not say what it does"
        for title in SECTIONS[language]:
            assert len(section(text, title).strip()) > 10, f"{name}: nothing in {title}"


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.md")), ids=lambda path: str(path.relative_to(DOCS)))
def test_no_page_has_a_table(path):
    """ComfyUI shows help in a column of 300 pixels, where tables are cut."""
    assert "\n|" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_input_is_explained_in_the_order_of_the_node(nodes, language):
    for name, node in nodes.items():
        explained = items(section(page(name, language), SECTIONS[language][1]))
        assert list(explained) == [f"`{key}`" for key in node.inputs], name
        assert all(len(text) > 5 for text in explained.values()), name


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_output_is_explained(nodes, language):
    for name, node in nodes.items():
        lines = re.findall(r"^- `(.+?)`", section(page(name, language), SECTIONS[language][2]), re.MULTILINE)
        expected = [label or kind for (label, _), kind in zip(node.outputs, node.output_types, strict=True)]
        assert lines == expected, name


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_choice_is_explained(nodes, language):
    for name, node in nodes.items():
        for key, options in node.options.items():
            text = page(FORMAT_HELP if key == "format" else name, language)
            missing = [] if key in NOT_OURS else [option for option in options if f"`{option}`" not in text]
            assert not missing, f"{name}.{key}"
    assert set(FORMAT_CHOICES) <= set(nodes[FORMAT_HELP].options["format"])


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_message_that_help_quotes_is_one_the_pack_writes(nodes, language, said):
    stale = {}
    for name in nodes:
        failures = items(section(page(name, language), SECTIONS[language][4]))
        assert len(failures) >= 2, name
        fragments = [part for symptom in failures for part in quoted(symptom) if len(part) > 3]
        stale[name] = [part for part in fragments if part not in said]
    assert not {name: parts for name, parts in stale.items() if parts}


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_nodes_that_help_names_exist_under_that_name(nodes, language, locale, core_names):
    ours = {entry["display_name"] for entry in locale(language, "nodeDefs.json").values()}
    for name in nodes:
        for bold in re.findall(r"\*\*(.+?)\*\*", page(name, language)):
            if "Lowbit" in bold:
                assert bold in ours, f"{name} names {bold}"
            elif language == "en" and bold[0].isupper():
                assert bold in core_names, f"{name} names {bold}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_table_of_auto_is_the_codes(language):
    rows = [text for first, text in items(page(FORMAT_HELP, language)).items() if first[:1].isdigit() or "CPU" in first]
    assert [re.findall(r"`(.+?)`", text) for text in rows] == [[row.eight_bits, row.four_bits] for row in AUTO_ROWS]


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_list_of_attention_backends_is_the_codes(language):
    """Names, GPUs and error classes, in the order of the table."""
    unbounded, newer, form = {
        "en": ("not bounded", " or newer", "GPU: {}. Error: {}."),
        "zh": ("无上限", " 及以上", "GPU：{}。误差：{}。"),
    }[language]
    explained = items(page("LowbitAttention", language).split(BACKEND_HEADING[language])[1])
    assert list(explained)[: len(BACKENDS)] == [f"`{backend.name}`" for backend in BACKENDS]
    for backend in BACKENDS:
        gpu = backend.needed_capability.replace(" or newer", newer)
        if language == "zh":
            gpu = gpu.replace("any", "任意").replace(", ", "、").replace(" or ", "、")
        error = unbounded if backend.error_class == "unbounded" else backend.error_class
        assert explained[f"`{backend.name}`"].endswith(form.format(gpu, error))


@pytest.mark.parametrize("name", [path.stem for path in sorted(DOCS.glob("*.md"))])
def test_chinese_help_says_what_the_english_one_says(name, half_width):
    """The same names, formats and numbers of entries; Chinese punctuation."""
    english, chinese = page(name, "en"), page(name, "zh")
    assert set(re.findall(r"`([^`\n]+)`", english)) == set(re.findall(r"`([^`\n]+)`", chinese))
    assert len(items(english)) == len(items(chinese))
    assert english.count("\n- ") == chinese.count("\n- ")
    assert english.count("\n## ") == chinese.count("\n## ")
    prose = re.sub(r"```.*?```|`[^`\n]+`", "", chinese, flags=re.DOTALL)
    assert not half_width(prose)
    # Bold that ends in a bracket is shown as asterisks where a letter follows at once.
    assert not re.findall(r"）\*\*\w", prose)
