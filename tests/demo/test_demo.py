"""The demo without ComfyUI: every named format gives pictures and a row in the table."""

from __future__ import annotations

import json
import sys
from functools import partial

import pytest

from demo import __main__ as demo
from demo import report, screen, shapes_in_diffusers
from demo.clips import MODEL, SHEET, SHOWN
from lowbit.ops.formats import FORMATS
from testing import tiny

pytest.importorskip("diffusers")


@pytest.fixture
def run_demo(monkeypatch, tmp_path):
    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["demo", "--without-comfyui", "--out", str(tmp_path), *arguments])
        return demo.main()

    return run


def test_demo_on_diffusers_models_leaves_pictures_and_a_table(run_demo, monkeypatch, tmp_path):
    """Two of the four clips: tests/headless/test_demo.py makes the others."""
    monkeypatch.setattr(shapes_in_diffusers, "measure", partial(shapes_in_diffusers.measure, scenes=SHOWN[:2]))
    assert run_demo("--formats", "bf16,fp4_scaled") == 0
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [(row["model"], row["format"]) for row in rows] == [
        (model, name) for model in (MODEL, "Wan t2v", "Qwen-Image") for name in ("none", "fp4_scaled")
    ]
    assert [row["recognised"] for row in rows[:2]] == ["2 of 2"] * 2
    assert 45 > rows[1]["psnr"] > 25
    for plain, fp4 in (rows[2:4], rows[4:]):
        assert plain["error"] is None
        assert 0.01 < fp4["error"] < 0.1
    for plain, fp4 in (rows[:2], rows[2:4], rows[4:]):
        assert plain["disk_bytes"] > 1.8 * fp4["disk_bytes"] > 0
        assert plain["resident_bytes"] > 1.8 * fp4["resident_bytes"] > 0
    pictures = {path.name for path in tmp_path.iterdir()} - {"table.md", "table.json"}
    assert pictures == {
        SHEET,
        "shapes.webp",
        *(f"{model}.{name}.png" for model in ("wan_t2v", "qwen_image") for name in ("none", "fp4_scaled")),
        *(f"wan_t2v.{name}.webp" for name in ("none", "fp4_scaled")),
    }


def test_bf16_auto_and_the_best_of_8_and_4_bits_are_made_by_default(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(demo, "_run", lambda arguments, formats: (iter(made.append(formats) or ()), "nothing"))
    for arguments in ([], ["--formats", "bf16,auto"], ["--all"]):
        monkeypatch.setattr(sys, "argv", ["demo", "--out", str(tmp_path), *arguments])
        assert demo.main() == 0
    few, two, every = made
    assert few[:2] == ["auto", "fp8_e4m3fn_scaled_fast"]
    assert few[2] in ("int4_asym_fast", "fp4_scaled_fast")
    assert two == ["auto"]
    assert every == list(FORMATS)


def test_the_sheet_is_opened_on_a_screen_and_nowhere_else(monkeypatch, tmp_path):
    opened = []
    monkeypatch.setattr(screen.webbrowser, "open", lambda address: opened.append(address) or True)
    for name in ("SSH_CONNECTION", "CI", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(screen.sys, "platform", "linux")
    picture = tmp_path / "sheet.png"
    picture.touch()
    assert not screen.open_picture(picture), "output that is not a terminal"
    monkeypatch.setattr(screen.sys.stdout, "isatty", lambda: True, raising=False)
    assert not screen.open_picture(picture), "no screen"
    monkeypatch.setenv("DISPLAY", ":0")
    assert not screen.open_picture(tmp_path / "missing.png")
    assert screen.open_picture(picture)
    monkeypatch.delenv("DISPLAY")
    monkeypatch.setattr(screen.sys, "platform", "darwin")
    assert screen.open_picture(picture)
    assert opened == [picture.as_uri()] * 2
    monkeypatch.setenv("SSH_CONNECTION", "somewhere")
    assert not screen.open_picture(picture)


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
