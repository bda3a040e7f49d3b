"""What is missing is found by its full name, and the log's sentence says which of the two to update."""

from __future__ import annotations

import sys
import types

import pytest

from lowbit import versions


@pytest.fixture
def package(monkeypatch):
    """A package with a module that something else in the package has the name of, as comfy-kitchen's registry."""
    package, module = types.ModuleType("a_package"), types.ModuleType("a_package.thing")
    package.thing, package.nothing, module.inner = object(), None, type("Inner", (), {"value": 3})
    monkeypatch.setitem(sys.modules, "a_package", package)
    monkeypatch.setitem(sys.modules, "a_package.thing", module)
    return package


def test_names_are_found_in_modules_and_classes(package):
    assert versions.find("a_package.thing.inner.value") == 3
    assert versions.find("a_package.thing.inner.other") is None
    assert versions.find("a_package.nothing") is None


def test_what_is_there_and_none_is_not_missing(package):
    names = (
        "a_package.nothing",
        "a_package.gone",
        "a_package.thing.inner",
        "no_such_package.thing",
        "a_package.nothing.x",
    )
    assert versions.missing(names) == ["a_package.gone", "no_such_package.thing", "a_package.nothing.x"]


def test_a_table_gives_full_names():
    assert versions.dotted({"a.b": "c d", "e": "f"}) == ("a.b.c", "a.b.d", "e.f")


@pytest.mark.parametrize(
    ("installed", "change"),
    [("0.31.0", "update ComfyUI."), ("0.33.0", "update this pack, or "), ("1.0", "update this pack, or ")],
)
def test_an_older_comfyui_is_to_be_updated_and_a_newer_one_wants_a_newer_pack(monkeypatch, installed, change):
    monkeypatch.setitem(sys.modules, "comfyui_version", types.SimpleNamespace(__version__=installed))
    text = versions.lacking(["comfy.ops.CastBiasWeightContext"], "the loaders are left out")
    assert text.startswith("Lowbit: the loaders are left out, for want of comfy.ops.CastBiasWeightContext. ")
    assert f"was made for ComfyUI 0.33, and this is {installed}" in text
    assert change in text


def test_a_long_list_is_cut(monkeypatch):
    assert "for want of a, b, c and 2 more." in versions.lacking(list("abcde"), "nothing works")
