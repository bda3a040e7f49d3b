"""The benchmark of writing text runs on a CPU, and keeps what a results file has of other models."""

from __future__ import annotations

import json
import sys

from benchmarks import textgen, textgen_rivals

SMALL = ["random:64,128,2,2,1", "--prefill", "12", "--decode", "8", "--window", "3", "--heavy-hitters", "3"]


def test_three_modes_are_measured_and_judged(tmp_path, monkeypatch):
    out = tmp_path / "textgen.json"
    monkeypatch.setattr(textgen, "VOCABULARY", 400)
    monkeypatch.setattr(textgen.torch, "randint", lambda low, high, *rest, **kw: torch_randint(100, 300, *rest, **kw))
    for name in ("first", "second", "first"):
        arguments = [*SMALL, "--name", name, "--runs", "1", "--device", "cpu", "--out", str(out)]
        arguments += ["--rivals"] if name == "second" else []
        monkeypatch.setattr(sys, "argv", ["textgen", *arguments])
        textgen.main()
    record = json.loads(out.read_text())
    ours = [row for row in record["rows"] if row["contender"].startswith("lowbit")]
    assert sorted(row["model"] for row in ours) == ["first"] * 3 + ["second"] * 3
    assert {row["contender"] for row in ours} == {"lowbit, full cache", "lowbit, heavy_hitters cache"}
    assert textgen_rivals.CONTENDER in {row["contender"] for row in record["rows"] if row["model"] == "second"}
    assert all(row["tokens_per_second"] > 0 for row in record["rows"])
    assert len(record["goals"]) == 6
    caches = [row["cache_bytes"] for row in ours if row["model"] == "first"]
    assert caches[0] == caches[1] > caches[2]


torch_randint = textgen.torch.randint
