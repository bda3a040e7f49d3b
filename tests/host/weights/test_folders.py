"""What loaders offer from the models folders, and folders that go with the process that made them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import types

import pytest
from safetensors.torch import save_file


@pytest.fixture
def models(host, tmp_path, monkeypatch):
    """A models folder named `diffusion_models`, empty, and one elsewhere."""
    import folder_paths

    root, elsewhere = tmp_path / "models", tmp_path / "elsewhere"
    root.mkdir()
    elsewhere.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(root)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return types.SimpleNamespace(
        root=root, elsewhere=elsewhere, names=lambda: host.folders.model_names("diffusion_models")
    )


@pytest.mark.parametrize(("named", "folder"), [("~/quantized", "home/quantized"), ("", "models/lowbit_cache")])
def test_where_quantized_files_go(host, tmp_path, monkeypatch, named, folder):
    import folder_paths

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.setenv(host.folders.CACHE_VARIABLE, named)
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    assert host.folders.cache_folder() == tmp_path / folder


def test_sharded_sets_are_offered_by_their_index_through_links_too(models):
    (models.root / "sub").mkdir()
    (models.root / "sub" / "a.safetensors.index.json").write_text("{}")
    (models.elsewhere / "b.safetensors.index.fp16.json").write_text("{}")
    (models.elsewhere / "notes.json").write_text("{}")
    save_file({}, models.elsewhere / "c.safetensors")
    (models.root / "link").symlink_to(models.elsewhere)
    assert models.names() == [
        "link/b.safetensors.index.fp16.json",
        "link/c.safetensors",
        "sub/a.safetensors.index.json",
    ]


def test_gguf_files_of_comfyui_ggufs_folder_are_offered_and_found(models, host, monkeypatch):
    """As ComfyUI-GGUF registers it, and as an extra_model_paths.yaml does, without endings."""
    import folder_paths

    (models.elsewhere / "sub").mkdir()
    for name in ("sub/a.gguf", "a-mmproj.gguf", "notes.txt"):
        (models.elsewhere / name).write_bytes(b"")
    for endings in ({".gguf"}, set()):
        registered = ([str(models.elsewhere)], endings)
        monkeypatch.setitem(folder_paths.folder_names_and_paths, "unet_gguf", registered)
        monkeypatch.setattr(folder_paths, "filename_list_cache", {})
        assert models.names() == ["sub/a.gguf"]
        assert host.folders.model_path("diffusion_models", "sub/a.gguf") == models.elsewhere / "sub/a.gguf"


def test_the_list_is_read_again_only_when_a_folder_changes(models, monkeypatch):
    assert models.names() == []
    listed = []

    def noted(real):
        return lambda *folder: listed.append(folder) or real(*folder)

    for function in ("listdir", "scandir"):
        monkeypatch.setattr(os, function, noted(getattr(os, function)))
    assert models.names() == []
    assert listed == []
    (models.root / "new.safetensors.index.json").write_text("{}")
    os.utime(models.root, (1, 1))
    assert models.names() == ["new.safetensors.index.json"]


HOLD = """
    import sys, time
    sys.path.append(sys.argv[1])
    from comfy.cli_args import args
    args.cpu = True
    from lowbit.host.weights.temporary import temporary_folder
    folder = temporary_folder()
    (folder / "model.safetensors").write_text("x")
    print(folder, flush=True)
    time.sleep(100 if sys.argv[2] == "stay" else 0)
"""


def process(cache, then: str) -> subprocess.Popen:
    from testing import comfyui

    command = [sys.executable, "-c", textwrap.dedent(HOLD), str(comfyui.find()), then]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"LOWBIT_CACHE_DIR": str(cache)}
    )


def test_a_temporary_folder_lives_as_long_as_its_process_whatever_its_number(host, tmp_path):
    """Another container's process has a number of its own, which here may be nobody's."""
    from lowbit.host.weights.temporary import remove_abandoned

    living = process(tmp_path, "stay")
    folder = tmp_path / living.stdout.readline().strip()
    try:
        remove_abandoned(tmp_path)
        assert (folder / "model.safetensors").exists()
    finally:
        living.kill()
        living.wait()
    assert (folder / "model.safetensors").exists()
    remove_abandoned(tmp_path)
    assert not folder.exists()


def test_a_temporary_folder_goes_when_its_process_ends(host, tmp_path):
    ending = process(tmp_path, "end")
    assert (tmp_path / ending.stdout.readline().strip()).parent == tmp_path
    assert ending.wait(300) == 0
    assert not list(tmp_path.iterdir())


def test_only_what_a_lock_file_stands_for_is_removed(host, tmp_path):
    from lowbit.host.weights.temporary import remove_abandoned

    dead, users = tmp_path / "temporary-dead", tmp_path / "temporary-users-own"
    for folder in (dead, users):
        folder.mkdir()
    for name in ("temporary-dead.lock", "temporary-folder-never-made.lock"):
        (tmp_path / name).touch()
    remove_abandoned(tmp_path)
    assert list(tmp_path.iterdir()) == [users]
