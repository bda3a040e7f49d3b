"""The demo without ComfyUI: every named format gives pictures and a row in the table."""

from __future__ import annotations

import json
import sys

import pytest

from demo import __main__ as demo
from demo import report
from testing import tiny

pytest.importorskip("diffusers")


@pytest.fixture
def run_demo(monkeypatch, tmp_path):
    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["demo", "--without-comfyui", "--out", str(tmp_path), *arguments])
        return demo.main()

    return run


def test_demo_on_diffusers_models_leaves_pictures_and_a_table(run_demo, tmp_path):
    assert run_demo("--formats", "int8,fp4_scaled") == 0
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [(row["model"], row["format"]) for row in rows] == [
        (model, name) for model in ("Wan t2v", "Qwen-Image") for name in ("none", "int8", "fp4_scaled")
    ]
    for plain, int8, fp4 in (rows[:3], rows[3:]):
        assert plain["error"] is None
        assert 0 < int8["error"] < 0.01 < fp4["error"] < 0.1
        assert plain["disk_bytes"] > int8["disk_bytes"] > fp4["disk_bytes"]
        assert plain["resident_bytes"] > int8["resident_bytes"] > fp4["resident_bytes"]
    pictures = {path.name for path in tmp_path.iterdir()} - {"table.md", "table.json"}
    assert pictures == {
        *(f"{model}.{name}.png" for model in ("wan_t2v", "qwen_image") for name in ("none", "int8", "fp4_scaled")),
        *(f"wan_t2v.{name}.webp" for name in ("none", "int8", "fp4_scaled")),
    }


def test_unknown_format_is_refused_with_the_names_there_are(run_demo, capsys):
    assert run_demo("--formats", "int8,fp3") == 2
    message = capsys.readouterr().err
    assert "fp3" in message
    assert "fp4_scaled" in message


def test_table_shows_a_problem_in_place_of_its_numbers():
    text = report.markdown([report.Row("Wan t2v", "int8", problem="the reason")])
    assert "the reason" in text
    assert len({len(line) for line in text.splitlines()}) == 1


def test_tiny_checkpoints_are_the_same_on_every_machine_and_run():
    first = tiny.draw(tiny.wan.shapes(tiny.WAN_SMALL))
    second = tiny.draw(tiny.wan.shapes(tiny.WAN_SMALL))
    assert all(first[key].equal(second[key]) for key in first)
    weight = tiny.wan_tensors()["blocks.0.ffn.0.weight"].float()
    assert weight.std() * 16 == pytest.approx(1, abs=0.05)
