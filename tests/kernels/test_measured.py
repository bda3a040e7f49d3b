"""Claims about measured numbers on disk: kept, merged, never believed when damaged, and never in the way."""

from __future__ import annotations

import json
import threading

import pytest

from lowbit.kernels.measured import MeasuredNumbers

FILE_NAME = "numbers.json"


def test_numbers_are_kept_and_merged(tmp_path):
    first, second = MeasuredNumbers(tmp_path, FILE_NAME), MeasuredNumbers(tmp_path, FILE_NAME)
    first.put("gpu a", {"shape 1": {"cudnn": 1.0}})
    second.put("gpu a", {"shape 2": {"cudnn": 2.0}})
    fresh = MeasuredNumbers(tmp_path, FILE_NAME)
    assert fresh.get("gpu a", "shape 1") == {"cudnn": 1.0}
    assert fresh.get("gpu a", "shape 2") == {"cudnn": 2.0}
    assert fresh.get("gpu b", "shape 1") is None
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"version": 0, "measured": {}}',
        '{"version": 3, "measured": {"gpu": 3}}',
        '{"version": 3, "measured": {"gpu": {"shape": {"cudnn": -1}}}}',
        '{"version": 3, "measured": {"gpu": {"shape": {"cudnn": "fast"}}}}',
        '{"version": 3, "measured": {"gpu": {"shape": {"cudnn": NaN}}}}',
        "[" * 100_000,
        "\xff\xfe",
    ],
)
def test_a_damaged_file_is_replaced(tmp_path, content):
    (tmp_path / FILE_NAME).write_bytes(content.encode("latin-1"))
    cache = MeasuredNumbers(tmp_path, FILE_NAME)
    assert cache.get("gpu", "shape") is None
    cache.put("gpu", {"shape": {"cudnn": 1.5}})
    assert json.loads((tmp_path / FILE_NAME).read_text())["measured"] == {"gpu": {"shape": {"cudnn": 1.5}}}


def test_many_writers_leave_a_whole_file(tmp_path):
    def write(number):
        MeasuredNumbers(tmp_path, FILE_NAME).put("gpu", {f"shape {number}": {"cudnn": 1.0 + number}})

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = json.loads((tmp_path / FILE_NAME).read_text())["measured"]["gpu"]
    assert entries == {f"shape {number}": {"cudnn": 1.0 + number} for number in range(8)}


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    cache = MeasuredNumbers(blocked / "below", FILE_NAME)
    cache.put("gpu", {"shape": {"cudnn": 1.0}})
    assert cache.get("gpu", "shape") == {"cudnn": 1.0}
    assert "not kept" in caplog.text
