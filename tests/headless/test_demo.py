"""The demo in ComfyUI: its bundled prompts run, leave pictures and a table, and the trained model shows what was asked."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from demo import in_comfyui, report
from demo.__main__ import collect
from demo.clips import MODEL


@pytest.fixture(scope="module")
def demo(comfyui_path, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo-output")
    rows = collect(in_comfyui.run(comfyui_path, out, ["int8", "fp4_scaled"]), out)
    report.write(out, rows, "ComfyUI")
    return out, rows


def test_demo_leaves_pictures_and_a_table(demo):
    out, rows = demo
    for plain, int8, fp4 in (rows[3:6], rows[6:]):
        assert plain.error is None
        assert 0 < int8.error < 0.01 < fp4.error < 0.1
    for plain, int8, fp4 in (rows[:3], rows[3:6], rows[6:]):
        assert plain.disk_bytes > int8.disk_bytes > fp4.disk_bytes
        assert plain.resident_bytes > int8.resident_bytes > fp4.resident_bytes
    assert len(json.loads((out / "table.json").read_text())["rows"]) == 9
    assert {path.suffix for path in out.glob("wan_t2v.*")} == {".png", ".webp"}
    assert len(list(out.glob("*.png"))) == 7


def test_the_trained_model_shows_what_was_asked_in_every_format(demo):
    out, rows = demo
    plain, int8, fp4 = rows[:3]
    assert {row.model for row in (plain, int8, fp4)} == {MODEL}
    assert [row.recognised for row in (plain, int8, fp4)] == ["4 of 4"] * 3
    assert plain.psnr is None
    assert int8.psnr > 40
    assert int8.psnr > fp4.psnr > 25
    animation = Image.open(out / "shapes.webp")
    assert animation.n_frames == 13
    sheet = Image.open(out / "shapes.png").convert("RGB")
    assert sheet.height > 3 * 64
    colours = [colour for count, colour in sheet.getcolors(1 << 24) for _ in range(count)]
    for known in ((230, 41, 46), (41, 191, 77), (46, 102, 242), (250, 209, 38)):
        close = sum(max(abs(a - b) for a, b in zip(known, colour, strict=True)) < 40 for colour in colours)
        assert close > 3 * 3 * 100, f"{known} fills little of the sheet"
