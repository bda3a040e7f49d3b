"""Claims about the cache of quantized files: found again, rebuilt when it must be, and nothing of the user's removed."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowbit.errors import CheckpointError
from lowbit.ops import cache, plan
from lowbit.ops.cache import cached_path, quantized_file
from lowbit.ops.checkpoint import open_checkpoint
from lowbit.ops.formats import FORMATS
from lowbit.ops.keep_rules import EIGHT_BITS, Rule, detect_family, parse_rules
from lowbit.ops.plan import make_plan
from lowbit.ops.stream import RECIPE_KEY

INT8 = FORMATS["int8"]


def test_the_cache_is_hit_and_rebuilt_when_source_rules_or_file_change(save, wan_tensors, tmp_path):
    folder = tmp_path / "cache"
    source = save(wan_tensors)

    def build(rules: str = "auto") -> tuple[Path, float]:
        checkpoint = open_checkpoint(source)
        path = quantized_file(checkpoint, make_plan(checkpoint, INT8, parse_rules(rules)), folder)
        return path, path.stat().st_mtime_ns

    first = build()
    assert build() == first
    other_rules = build("blocks.0")
    assert other_rules[0] != first[0]
    first[0].write_bytes(first[0].read_bytes()[:-10])
    assert build()[0] == first[0]
    load_file(first[0])
    wan_tensors["head.head.weight"] += 1
    save(wan_tensors)
    changed = build()
    assert changed[0] != first[0]
    assert not first[0].exists(), "the file of the old source is removed"
    assert other_rules[0].exists(), "another recipe's file is not touched"


def test_a_file_of_the_cache_whose_layers_are_no_longer_described_is_made_anew(save, wan_tensors, tmp_path, caplog):
    checkpoint = open_checkpoint(save(wan_tensors))

    def build() -> Path:
        return quantized_file(checkpoint, make_plan(checkpoint, INT8, None), tmp_path / "cache")

    path = build()
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'{"format"', b"\0" * 9))
    assert build() == path
    assert path.read_bytes() == whole
    assert f"The quantized file {path} is damaged: Lowbit makes it anew." in caplog.text
    assert "download" not in caplog.text


@pytest.mark.parametrize("action", ["keep", EIGHT_BITS])
def test_a_file_made_by_a_familys_earlier_rules_is_not_taken(save, wan_tensors, tmp_path, monkeypatch, action):
    checkpoint = open_checkpoint(save(wan_tensors))

    def build() -> Path:
        return quantized_file(checkpoint, make_plan(checkpoint, FORMATS["fp4_scaled"], None), tmp_path / "cache")

    earlier = build()
    family = detect_family({name.rpartition(".")[0] for name in checkpoint.entries})
    changed = replace(family, rules=(Rule("ffn", action), *family.rules))
    monkeypatch.setattr(plan, "detect_family", lambda layers: changed)
    later = build()
    assert later != earlier
    assert load_file(earlier)["blocks.0.ffn.0.weight"].dtype == torch.uint8
    expected = torch.int8 if action == EIGHT_BITS else wan_tensors["blocks.0.ffn.0.weight"].dtype
    assert load_file(later)["blocks.0.ffn.0.weight"].dtype == expected


def test_looking_for_outdated_copies_opens_none_of_another_model(save, wan_tensors, tmp_path, monkeypatch):
    """A folder of large models on a network drive would make every load wait for all of their headers."""
    folder = tmp_path / "cache"

    def build(name: str) -> Path:
        checkpoint = open_checkpoint(save(wan_tensors, name))
        return quantized_file(checkpoint, make_plan(checkpoint, INT8, None), folder)

    other, first = build("other.safetensors"), build("model.safetensors")
    opened: list[Path] = []
    monkeypatch.setattr(cache, "open_checkpoint", lambda path: opened.append(path) or open_checkpoint(path))
    wan_tensors["head.head.weight"] += 1
    changed = build("model.safetensors")
    assert other.exists()
    assert not first.exists()
    assert changed != first
    assert first in opened
    assert other not in opened


def _build(source: Path, folder: Path, barrier) -> None:
    torch.set_num_threads(1)
    checkpoint = open_checkpoint(source)
    barrier.wait()
    quantized_file(checkpoint, make_plan(checkpoint, INT8, None), folder)


def test_two_processes_may_build_the_same_file_at_once(save, wan_tensors, tmp_path):
    source, folder = save(wan_tensors), tmp_path / "cache"
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    processes = [context.Process(target=_build, args=(source, folder, barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    checkpoint = open_checkpoint(source)
    assert [path.name for path in folder.iterdir()] == [
        cached_path(checkpoint, make_plan(checkpoint, INT8, None), folder).name
    ]


def test_half_written_files_of_versions_without_locks_are_removed_after_a_day(save, wan_tensors, tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    old, new = folder / ".lowbit-old.partial", folder / ".lowbit-new.partial"
    old.write_text("x")
    new.write_text("x")
    os.utime(old, (0, 0))
    checkpoint = open_checkpoint(save(wan_tensors))
    quantized_file(checkpoint, make_plan(checkpoint, INT8, None), folder)
    assert not old.exists()
    assert new.exists()


def build(source: Path, folder: Path, name: str = "int8", **options) -> Path:
    checkpoint = open_checkpoint(source)
    return quantized_file(checkpoint, make_plan(checkpoint, FORMATS[name], None), folder, **options)


def change(wan_tensors, save) -> Path:
    wan_tensors["head.head.weight"] = wan_tensors["head.head.weight"] + 1
    return save(wan_tensors)


def test_files_of_other_names_are_the_users_whatever_their_header_says(save, wan_tensors, tmp_path):
    folder = tmp_path / "cache"
    made = build(save(wan_tensors), folder)
    mine = [folder / name for name in ("my_merge.safetensors", "model.int8.safetensors", "model.int8.abc.safetensors")]
    for path in mine:
        shutil.copy(made, path)
        os.utime(path, (0, 0))
    assert RECIPE_KEY in open_checkpoint(mine[0]).metadata
    assert build(change(wan_tensors, save), folder) != made
    assert not made.exists()
    assert all(path.exists() for path in mine)


def test_a_file_that_another_process_made_of_a_later_source_is_left(save, wan_tensors, tmp_path):
    """The slower of two processes began on the earlier source; its own result is refused, the other's stays."""
    folder = tmp_path / "cache"
    source = save(wan_tensors)
    newer = []

    def meanwhile(*progress):
        if not newer:
            newer.append(build(change(wan_tensors, save), folder))

    with pytest.raises(CheckpointError, match="changed while it was read"):
        build(source, folder, progress=meanwhile)
    assert [path.name for path in folder.iterdir()] == [newer[0].name]


def test_a_file_made_after_this_process_began_is_left(save, wan_tensors, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    first = build(save(wan_tensors), folder)
    future = time.time() + 60
    os.utime(first, (future, future))
    build(change(wan_tensors, save), folder)
    assert first.exists()


def test_the_plan_and_the_key_are_of_one_state_of_the_source(save, wan_tensors, tmp_path):
    source = save(wan_tensors)
    checkpoint = open_checkpoint(source)
    plan = make_plan(checkpoint, INT8, None)
    change(wan_tensors, save)
    os.utime(source, (1, 1))
    with pytest.raises(CheckpointError, match="changed while it was read"):
        quantized_file(checkpoint, plan, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_newer_quantizer_takes_the_place_of_an_older_ones_files_but_not_of_a_later_ones(
    save, wan_tensors, tmp_path, monkeypatch
):
    folder = tmp_path / "cache"
    source = save(wan_tensors)
    made = {}
    for version in (2, 1, 3):
        for module in ("cache", "stream"):
            monkeypatch.setattr(f"lowbit.ops.{module}.QUANTIZER_VERSION", version)
        made[version] = build(source, folder)
    assert len(set(made.values())) == 3
    assert [path.name for path in folder.iterdir()] == [made[3].name]
    assert made[2] != made[1]


def test_a_later_quantizers_file_is_left(save, wan_tensors, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    source = save(wan_tensors)
    with monkeypatch.context() as patch:
        for module in ("cache", "stream"):
            patch.setattr(f"lowbit.ops.{module}.QUANTIZER_VERSION", cache.QUANTIZER_VERSION + 1)
        later = build(source, folder)
    build(source, folder)
    assert later.exists()


def test_auto_and_the_same_format_by_name_are_two_files(save, wan_tensors, tmp_path):
    """They differ in what becomes of layers that the source holds quantized."""
    checkpoint = open_checkpoint(save(wan_tensors))
    paths = {
        cached_path(checkpoint, make_plan(checkpoint, INT8, None, named=named), tmp_path) for named in (True, False)
    }
    assert len(paths) == 2


@pytest.mark.parametrize("name", ["a" * 240, "模" * 80])
def test_a_source_with_the_longest_of_names_has_a_file_in_the_cache(save, wan_tensors, tmp_path, name):
    source = save(wan_tensors, f"{name}.safetensors")
    made = build(source, tmp_path / "cache", "int8_convrot_fast")
    assert made.name.startswith(name[:30])
    assert build(source, tmp_path / "cache", "int8_convrot_fast") == made


@pytest.mark.skipif(os.name == "nt", reason="file names are text there")
def test_a_source_whose_name_is_no_text_has_a_file_in_the_cache(save, wan_tensors, tmp_path):
    source = save(wan_tensors).rename(tmp_path / os.fsdecode(b"caf\xe9.safetensors"))
    made = build(source, tmp_path / "cache")
    assert build(source, tmp_path / "cache") == made
    made.name.encode("utf-8")


def test_a_cache_that_cannot_be_looked_into_does_not_break_in_other_words(save, wan_tensors, tmp_path, monkeypatch):
    def forbidden(path, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.exists", forbidden)
    build(save(wan_tensors), tmp_path / "cache")
