"""Links inside a checkpoint, of the hub's cache, and those that a person answers for; all others are refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dconv.checkpoint.files import check_link, stamps
from dconv.errors import Damaged
from dconv.pipeline import Request, convert
from tests.models import tensors


def cached(model: Path, hub: Path) -> Path:
    """A model as the hub's cache has it: files in ``blobs``, links to them in ``snapshots``."""
    blobs, snapshot = hub / "blobs", hub / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(model.iterdir())):
        (blobs / f"{number:064x}").write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    return snapshot


def test_the_hubs_cache_converts(model: Path, tmp_path: Path) -> None:
    convert(Request(cached(model, tmp_path / "models--someone--something"), "hf", tmp_path / "out"))
    assert tensors(tmp_path / "out") == tensors(model)


def test_past_the_blobs_of_the_cache_is_outside(model: Path, tmp_path: Path) -> None:
    snapshot = cached(model, tmp_path / "hub")
    (tmp_path / "hub" / "secret").write_text("{}")
    (tmp_path / "hub" / "snapshots" / "other").mkdir()
    (tmp_path / "hub" / "snapshots" / "other" / "config.json").write_text("{}")
    for target in ("../../secret", "../../blobs/../secret", "../other/config.json", str(model / "config.json")):
        (snapshot / "config.json").unlink()
        (snapshot / "config.json").symlink_to(target)
        with pytest.raises(Damaged, match="leads out"):
            convert(Request(snapshot, "hf", tmp_path / "out"))
        assert not (tmp_path / "out").exists()


def test_links_inside_and_a_directory_that_is_one(model: Path, tmp_path: Path) -> None:
    first = sorted(model.glob("*.safetensors"))[0]
    (model / "kept").mkdir()
    first.rename(model / "kept" / "x")
    first.symlink_to("kept/x")
    (tmp_path / "latest").symlink_to(model)
    convert(Request(tmp_path / "latest", "hf", tmp_path / "out"))
    assert tensors(tmp_path / "out") == tensors(model)


def test_links_of_ones_own(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    farm = tmp_path / "farm"
    farm.mkdir()
    for path in model.iterdir():
        (farm / path.name).symlink_to(path)
    with pytest.raises(Damaged, match="leads out") as caught:
        convert(Request(farm, "hf", tmp_path / "out"))
    assert "DCONV_LINKS=follow" in caught.value.do
    monkeypatch.setenv("DCONV_LINKS", "follow")
    convert(Request(farm, "hf", tmp_path / "out"))
    assert tensors(tmp_path / "out") == tensors(model)


def test_links_to_nowhere(tmp_path: Path) -> None:
    """One that dangles is no file, as before; one to itself is told."""
    (tmp_path / "a.bin").symlink_to("gone.bin")
    assert stamps(tmp_path, (".bin",)) == {}
    (tmp_path / "b.bin").symlink_to("b.bin")
    with pytest.raises(Damaged, match="leads nowhere"):
        stamps(tmp_path, (".bin",))
    os.unlink(tmp_path / "b.bin")
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "c.bin").symlink_to(tmp_path / "nearby.bin")
    with pytest.raises(Damaged, match="leads out"):  # a neighbour whose name begins alike
        check_link(tmp_path / "near" / "c.bin")


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
def test_a_side_file_that_is_a_link_to_nothing_is_not_left_out_without_a_word(
    model: Path, tmp_path: Path, name: str
) -> None:
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to("gone")
    with pytest.raises(Damaged, match="a file is missing") as caught:
        convert(Request(model, "hf", tmp_path / "out"))
    assert caught.value.where == str(model / name)
    assert not (tmp_path / "out").exists()
