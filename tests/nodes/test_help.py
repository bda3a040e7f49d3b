"""Every node has a help page in both languages that names all of its inputs, outputs and choices, and nothing stale."""

from __future__ import annotations

import ast
import re

import pytest

from demo import comfyui
from lowbit.attention.backends import BACKENDS, ERROR_LIMITS
from lowbit.ops.auto_format import AUTO_ROWS
from lowbit.ops.formats import FORMAT_CHOICES

pytestmark = pytest.mark.headless

PACK = comfyui.CHECKOUT
DOCS = PACK / "web" / "docs"
LANGUAGES = ("en", "zh")
SECTIONS = {
    "en": ("When to use it", "Inputs", "Outputs", "Example", "When something goes wrong"),
    "zh": ("何时使用", "输入", "输出", "示例", "出错时怎么办"),
}
# Choices that are explained in the help of one node, and those that are core's or the user's own files.
FORMAT_HELP = "LowbitLoadDiffusionModel"
NOT_OURS = ("type", "unet_name", "clip_name", "vae_name", "name")
OUR_FOLDERS = ("nodes", "host", "ops", "attention", "memory", "kernels")


def page(node: str, language: str) -> str:
    """The help that ComfyUI shows: a page of the language's own, else the one without a language."""
    path = DOCS / f"{node}.md" if language == "en" else DOCS / node / f"{language}.md"
    return path.read_text(encoding="utf-8")


def section(text: str, title: str) -> str:
    """What stands below the heading `title`, up to the next heading of the same level."""
    assert f"\n## {title}\n" in text, f"no section {title}"
    return text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def rows(text: str) -> list[list[str]]:
    """The cells of every table row in `text`, without the heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rules = {index for index, row in enumerate(cells) if all(re.fullmatch(r":?-+:?", cell) for cell in row)}
    return [row for index, row in enumerate(cells) if index not in rules and index + 1 not in rules]


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


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_input_is_explained_in_the_order_of_the_node(nodes, language):
    for name, node in nodes.items():
        explained = rows(section(page(name, language), SECTIONS[language][1]))
        assert [row[0] for row in explained] == [f"`{key}`" for key in node.inputs], name
        assert all(row[1] for row in explained), name


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
        failures = rows(section(page(name, language), SECTIONS[language][4]))
        assert len(failures) >= 2, name
        fragments = [part for row in failures for part in quoted(row[0]) if len(part) > 3]
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
    written = [row[1:] for row in rows(page(FORMAT_HELP, language)) if row[0][:1].isdigit() or "CPU" in row[0]]
    assert written == [[f"`{row.eight_bits}`", f"`{row.four_bits}`"] for row in AUTO_ROWS]


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_table_of_attention_backends_is_the_codes(language):
    unbounded, any_gpu = {"en": ("not bounded", "any"), "zh": ("无上限", "任意")}[language]
    newer = {"en": "{} or newer", "zh": "{} 及以上"}[language]
    written = {row[0].strip("`"): row[2:] for row in rows(page("LowbitAttention", language)) if len(row) == 4}
    expected = {}
    for backend in BACKENDS:
        gpu = backend.needed_capability.replace("any", any_gpu)
        if gpu.endswith(" or newer"):
            gpu = newer.format(gpu.removesuffix(" or newer"))
        gpu = gpu if language == "en" else gpu.replace(", ", "、").replace(" or ", "、")
        expected[backend.name] = [gpu, unbounded if backend.error_class == "unbounded" else backend.error_class]
    assert written == expected
    assert set(ERROR_LIMITS) >= {row[1] for row in written.values()} - {unbounded}


@pytest.mark.parametrize("name", [path.stem for path in sorted(DOCS.glob("*.md"))])
def test_chinese_help_says_what_the_english_one_says(name, half_width):
    """The same names, formats, numbers of rows and code blocks; Chinese punctuation."""
    english, chinese = page(name, "en"), page(name, "zh")
    assert set(re.findall(r"`([^`\n]+)`", english)) == set(re.findall(r"`([^`\n]+)`", chinese))
    assert len(rows(english)) == len(rows(chinese))
    assert english.count("\n## ") == chinese.count("\n## ")
    prose = re.sub(r"```.*?```|`[^`\n]+`", "", chinese, flags=re.DOTALL)
    assert not half_width(prose)
    # Bold that ends in a bracket is shown as asterisks where a letter follows at once.
    assert not re.findall(r"）\*\*\w", prose)
