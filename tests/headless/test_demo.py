"""The demo in ComfyUI: its bundled prompts run, and leave pictures and a table."""

from __future__ import annotations

import json

from demo import in_comfyui, report


def test_demo_leaves_pictures_and_a_table(comfyui_path, tmp_path):
    rows = in_comfyui.run(comfyui_path, tmp_path, ["int8", "fp4_scaled"])
    report.write(tmp_path, rows, "ComfyUI")
    for plain, int8, fp4 in (rows[:3], rows[3:]):
        assert plain.error is None
        assert 0 < int8.error < 0.01 < fp4.error < 0.1
        assert plain.disk_bytes > int8.disk_bytes > fp4.disk_bytes
        assert plain.resident_bytes > int8.resident_bytes > fp4.resident_bytes
    assert len(json.loads((tmp_path / "table.json").read_text())["rows"]) == 6
    assert {path.suffix for path in tmp_path.glob("wan_t2v.*")} == {".png", ".webp"}
    assert len(list(tmp_path.glob("*.png"))) == 6
