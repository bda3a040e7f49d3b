"""The README's tables say what the results files say."""

from __future__ import annotations

import json
import re

from benchmarks import readme, readme_linear
from benchmarks.readme import ROOT, TABLES, rendered


def test_tables_are_what_the_results_say():
    text = (ROOT / "README.md").read_text()
    assert rendered(text) == text, "run python -m benchmarks.readme"


def test_every_table_has_its_place():
    text = (ROOT / "README.md").read_text()
    assert sorted(re.findall(r"<!-- table:(\w+) -->", text)) == sorted(TABLES)


def test_pictures_and_links_exist():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)", text):
        assert (ROOT / target).exists(), target


def test_the_memory_table_says_what_was_measured(monkeypatch, tmp_path):
    gib = 2**30
    usage = {
        "vram": 23 * gib,
        "resident": gib,
        "anonymous": gib,
        "unreclaimable": 41 * gib,
        "charged": None,
        "kills": 0,
    }
    row = {
        "case": "qwen_image",
        "contender": "memory manager, bf16 files",
        "steps": 20,
        "vram_cap": 24 * gib,
        "host_cap": 60 * gib,
        "host_cap_by": "cgroup",
        "files": "disk",
        "completed": True,
        "error": None,
        "usage": usage,
        "finite": True,
        "report": {"stepping_seconds": 20.0, "measuring_steps_seconds": 0.5},
        "load_seconds": 31.23,
        "seconds_per_step": 1.234,
        "step_seconds": [1.3, 1.1, 1.234],
        "total_seconds": 66.6,
    }
    failed = {
        "contender": "stock ComfyUI",
        "completed": False,
        "error": "GraphFailedError: a | b",
        "vram_cap": 32 * gib,
    }
    result = {
        "environment": {"gpu": "NVIDIA H200", "torch": "2.11", "comfyui": "0.33.0", "comfy-aimdo": "0.4.13"},
        "rows": [row, row | failed],
        "growth": [
            {
                "case": "infinitetalk",
                "runs": 5,
                "steps": 1,
                "error": None,
                "growth_over_third": {"allocated": 0.001, "reserved": 0, "host_resident": 0.25},
                "marks": [{"host_resident": size * gib} for size in (3, 3, 4, 4.5, 5)],
            }
        ],
        "overhead": [
            {"slower_by": 0.004, "error": None, "seconds_per_step": {"no manager": [0.5], "manager, auto": [0.502]}}
        ],
    }
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert "has not run" in readme.memory()
    (tmp_path / "memory.json").write_text(json.dumps(result))
    text = readme.memory()
    assert "has not run" not in text
    assert "| completed | 23.0 GiB | 41.0 GiB | 1.23 | 1.10 |\n" in text
    assert "Load times are left out" in text
    assert "| stock ComfyUI | **failed**: GraphFailedError: a / b |" in text
    assert text.index("32 GiB | stock") < text.index("24 GiB | memory")
    assert "| 5 | 1 | +0.10 % | +0.00 % | +25.00 % |" in text
    assert "512 MiB of main memory a window" in text
    assert "0.50 s beside 20.0 s of steps (2.5 %)" in text
    assert "+0.40 %" in text
    # What was measured before the memory was touched keeps its load times to itself, whatever it is merged with.
    result["rows"].append(row | {"vram_cap": 16 * gib, "memory_touched_gib": 256})
    (tmp_path / "memory.json").write_text(json.dumps(result))
    text = readme.memory()
    assert (
        "| 16 GiB | memory manager, bf16 files | completed | 23.0 GiB | 41.0 GiB | 1.23 | 1.10 | 31.2 | 66.6 |" in text
    )
    assert "| 24 GiB | memory manager, bf16 files | completed | 23.0 GiB | 41.0 GiB | 1.23 | 1.10 |  |  |" in text
    result["rows"][-1]["memory_touched_gib"] = 59
    (tmp_path / "memory.json").write_text(json.dumps(result))
    assert "66.6" not in readme.memory()
    assert "Load times are left out" in text
    # A step that did not wait for the GPU says nothing.
    assert "earlier run" not in text
    del result["rows"][0]["step_seconds"]
    (tmp_path / "memory.json").write_text(json.dumps(result))
    text = readme.memory()
    assert "earlier run" in text
    assert "| 24 GiB | memory manager, bf16 files | completed | 23.0 GiB | 41.0 GiB | ~1.23 |  |\n" in text


def test_the_first_table_takes_a_run_without_cgroups_too(monkeypatch, tmp_path):
    gib = 2**30
    row = {"case": "qwen_image", "completed": True, "vram_cap": 16 * gib, "seconds_per_step": 1.0}
    row["usage"] = {"anonymous": 41 * gib, "unreclaimable": None}
    rows = [row | {"contender": name} for name in ("stock ComfyUI", "memory manager, format auto")]
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    (tmp_path / "memory.json").write_text(json.dumps({"rows": rows}))
    assert "bf16 file: 1.00 s/step, 41 GiB of RAM" in readme.headline()
    rows[0]["step_seconds"] = [0.7, 1.0, 1.4]
    (tmp_path / "memory.json").write_text(json.dumps({"rows": rows}))
    assert "bf16 file: 1.00 s/step (the fastest 0.70), 41 GiB of RAM" in readme.headline()


def test_goals_say_which_were_missed_and_what_the_hardware_would_allow():
    """The worst of a goal's rows counts, whichever way is worse; what was not measured is left out."""
    few = {"contender": "lowbit", "k": 4096, "n": 14336, "ratio_to_bf16": None}
    rate = {"us": 16.0, "tflops": 1.0, "weight_bytes_per_second": 4.0e12}
    rows = [
        few | rate | {"case": "decode", "m": 1, "format": "fp8_e4m3fn_scaled"},
        few | rate | {"case": "decode", "m": 1, "format": "int8", "us": 20.0, "weight_bytes_per_second": 2.0e12},
        few | rate | {"case": "decode", "m": 1, "format": "int8", "contender": "comfy-kitchen", "us": 99.0},
        few | rate | {"case": "qwen_modulation", "m": 1, "format": "int8", "weight_bytes_per_second": 3.5e12},
        few | rate | {"case": "wan_qkv", "m": 32760, "format": "mxfp8_fast", "ratio_to_bf16": 0.5},
    ]
    text = readme_linear.goals({"results": rows, "bandwidth_limit_bytes_per_second": 4e12})
    assert "| FP8, INT8, 1 row, 4,096 to 14,336 | 18 us | **20.0** | 10.0 | 50 % |" in text
    assert "| INT8, 1 row, 3,072 to 18,432 | 3.4 TB/s | 3.50 | 4.00 | 88 % |" in text
    assert "| MXFP8 fast, 32,760 x 5,120 x 5,120 | 1.04 x bf16 | 0.500 |  |  |" in text
    assert "99" not in text
    assert "16 rows" not in text
