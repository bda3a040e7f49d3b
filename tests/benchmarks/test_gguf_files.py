"""A conversion is judged beside a copy that has reached the disk, as it has itself, and beside one that may not have."""

from __future__ import annotations

import shutil

import pytest

pytest.importorskip("gguf")

from benchmarks import gguf_files

ROW = {"kind": "Q8_0", "share_of_copy": 40.0, "share_of_flushed_copy": 90.0}
PRODUCTS = [{"rows": rows, "ms": 1.0, "peer_ms": 5.0} for rows in gguf_files.ROWS]


def test_both_copies_are_goals_of_their_own():
    found = {goal["name"]: goal for goal in gguf_files.goals([ROW], PRODUCTS)}
    flushed = found["Q8_0 to int8_convrot_fast, speed beside a copy of the result that is on the disk as well"]
    plain = found["Q8_0 to int8_convrot_fast, speed beside a copy of the result that may be in memory still"]
    assert (flushed["measured"], flushed["target"], flushed["met"]) == (90.0, 70, True)
    assert (plain["measured"], plain["target"], plain["met"]) == (40.0, 70, False)


def test_only_the_flushed_copy_waits_for_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_files, "LAYER", (64, 256))
    monkeypatch.setattr(gguf_files, "quantize_checkpoint", lambda checkpoint, plan, target, device: target.touch())
    done = []
    monkeypatch.setattr(gguf_files, "flush", lambda path: done.append("flush"))
    monkeypatch.setattr(
        gguf_files.shutil,
        "copyfile",
        lambda source, target, copy=shutil.copyfile: (done.append("copy"), copy(source, target)),
    )
    row = gguf_files.convert(tmp_path, "Q8_0", 2, "cpu")
    assert done == ["copy", "copy", "flush"] * gguf_files.ROUNDS
    assert row["source_mib"] == 2 * 64 * 256 / 32 * 34 / 2**20
    assert row["share_of_flushed_copy"] == 100 * row["flushed_copy_seconds"] / row["seconds"]
    assert list(tmp_path.iterdir()) == []
