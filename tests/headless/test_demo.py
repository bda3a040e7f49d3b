"""The demo in ComfyUI: its bundled prompts run, leave pictures and a table, and the trained model shows what was asked."""

from __future__ import annotations

import json
from functools import partial

import pytest
from PIL import Image

from demo import in_comfyui, report
from demo.__main__ import collect
from demo.clips import MODEL, SHOWN


@pytest.fixture(scope="module")
def demo(comfyui_path, tmp_path_factory):
    """Two of the four clips: tests/demo/test_demo.py makes the others."""
    out = tmp_path_factory.mktemp("demo-output")
    few = partial(in_comfyui.measure, scenes=SHOWN[2:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_comfyui, "measure", few)
        rows = collect(in_comfyui.run(comfyui_path, out, ["fp4_scaled"]), out)
    report.write(out, rows, "ComfyUI")
    return out, rows


def test_demo_leaves_pictures_and_a_table(demo):
    out, rows = demo
    for plain, fp4 in (rows[2:4], rows[4:]):
        assert plain.error is None
        assert 0.01 < fp4.error < 0.1
    for plain, fp4 in (rows[:2], rows[2:4], rows[4:]):
        assert plain.disk_bytes > 1.5 * fp4.disk_bytes
        assert plain.resident_bytes > 1.5 * fp4.resident_bytes
    assert len(json.loads((out / "table.json").read_text())["rows"]) == 6
    assert {path.suffix for path in out.glob("wan_t2v.*")} == {".png", ".webp"}
    assert len(list(out.glob("*.png"))) == 5


def test_the_trained_model_shows_what_was_asked_in_four_bits_too(demo):
    out, rows = demo
    plain, fp4 = rows[:2]
    assert plain.model == fp4.model == MODEL
    assert plain.recognised == fp4.recognised == "2 of 2"
    assert plain.psnr is None
    assert 40 > fp4.psnr > 25
    animation = Image.open(out / "shapes.webp")
    assert animation.n_frames == 13
    sheet = Image.open(out / "shapes.png").convert("RGB")
    assert sheet.height > 2 * 64
    colours = [colour for count, colour in sheet.getcolors(1 << 24) for _ in range(count)]
    for known in ((46, 102, 242), (250, 209, 38)):
        close = sum(max(abs(a - b) for a, b in zip(known, colour, strict=True)) < 40 for colour in colours)
        assert close > 2 * 3 * 100, f"{known} fills little of the sheet"
