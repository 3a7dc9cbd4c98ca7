from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from adamae_fast.data.check import check_manifest
from adamae_fast.data.manifest import ManifestError
from adamae_fast.data.prepare import prepare


@pytest.fixture
def manifest(
    tmp_path: Path,
    write_video: Callable[..., Path],
    write_images: Callable[..., Path],
    write_unknown_codec: Callable[[Path], Path],
) -> Path:
    """Two videos, images, a file that is no video, a missing one, an unknown codec; the first video twice."""
    write_video(tmp_path / "a.mp4", 30)
    write_video(tmp_path / "b.ts", 5, height=32)
    write_images(tmp_path / "images", range(1, 5))
    (tmp_path / "text.mp4").write_text("no video")
    path = tmp_path / "train.csv"
    path.write_text("a.mp4 1\nb.ts 0\nimages 1 4\ntext.mp4 0\nmissing 3\na.mp4 1\nunknown.mp4 2\n")
    write_unknown_codec(tmp_path / "unknown.mp4")
    return path


def test_json(manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_manifest(str(manifest), json=True) == 1
    printed = json.loads(capsys.readouterr().out)
    assert {key: printed[key] for key in ("manifest", "videos", "readable", "unreadable")} == {
        "manifest": str(manifest),
        "videos": 6,
        "readable": 3,
        "unreadable": 3,
    }
    a, b, images, text, missing, unknown = printed["rows"]
    assert a == {
        "path": str(manifest.parent / "a.mp4"),
        "label": 1,
        "codec": "h264",
        "width": 64,
        "height": 48,
        "frames": 30,
        "fps": 25.0,
        "duration": 1.2,
        "decoder": "pyav",
        "problem": None,
    }
    assert (b["height"], b["frames"], b["decoder"]) == (32, 5, "pyav")
    assert (images["codec"], images["frames"], images["fps"], images["decoder"]) == ("png", 4, None, "pillow")
    assert text["problem"].startswith("no video, cut short or damaged")
    assert (missing["path"], missing["problem"]) == (str(manifest.parent / "missing.mp4"), "no such file or directory")
    assert unknown["problem"].startswith("no decoder for codec")
    assert {missing[key] for key in ("codec", "width", "frames", "decoder")} == {None}


def rows_of(text: str) -> dict[str, list[str]]:
    """First word of each line, and the others; empty cells are gone."""
    return {words[0]: words[1:] for line in text.splitlines() if (words := line.split())}


def test_table(manifest: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert check_manifest(str(manifest)) == 1
    text = capsys.readouterr().out
    lines, rows = text.strip().splitlines(), rows_of(text)
    assert rows["file"] == ["label", "codec", "size", "frames", "fps", "duration", "decoder"]
    assert rows["a.mp4"] == ["1", "h264", "64×48", "30", "25.00", "1.20", "s", "pyav"]
    assert rows["images"] == ["png", "64×48", "4", "pillow"]
    assert rows["missing.mp4"] == ["3", "unreadable"]
    folder = manifest.parent
    assert lines[-4].startswith(f"unreadable: {folder}/text.mp4: no video, cut short or damaged")
    assert lines[-3] == f"unreadable: {folder}/missing.mp4: no such file or directory"
    assert lines[-2].startswith(f"unreadable: {folder}/unknown.mp4: no decoder for codec")
    assert lines[-1] == "6 videos, 3 unreadable"


def test_a_line_of_a_prepared_video_fits_80_columns(
    manifest: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = manifest.parent / "prepared"
    prepare(str(manifest), str(out), num_workers=1)
    capsys.readouterr()
    assert check_manifest(str(out)) == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows["00000000.mp4"] == ["1", "h264", "64×48", "30", "25.00", "1.20", "s", "pyav"]


def test_everything_readable(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    write_video(tmp_path / "a.mp4", 3)
    assert check_manifest(str(tmp_path)) == 0
    (tmp_path / "list.txt").write_text("a.mp4")
    assert check_manifest(str(tmp_path / "list.txt"), root=str(tmp_path), decoder="pyav") == 0


def test_damage_in_the_middle_is_found(shared_clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.txt").write_text("corrupted.mp4\nrotated_90.mov\n")
    assert check_manifest(str(tmp_path / "list.txt"), root=str(shared_clips / "bad"), json=True) == 1
    corrupted, rotated = json.loads(capsys.readouterr().out)["rows"]
    assert "damaged" in corrupted["problem"]
    assert (corrupted["codec"], corrupted["frames"], corrupted["height"]) == ("h264", 50, 720)
    assert (rotated["width"], rotated["height"], rotated["problem"]) == (320, 568, None)


def test_errors_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ManifestError, match="MANIFEST='nowhere': no such file or folder"):
        check_manifest("nowhere")
    with pytest.raises(ManifestError, match="--root='x': has no effect on a folder of videos"):
        check_manifest(str(tmp_path), root="x")
    (tmp_path / "list.txt").write_text("a.mp4\n")
    with pytest.raises(ManifestError, match="set --root to the folder that they really start from"):
        check_manifest(str(tmp_path / "list.txt"))
    with pytest.raises(ManifestError, match="no videos in this folder"):
        check_manifest(str(tmp_path))
    monkeypatch.setattr("adamae_fast.data.decode.decord_is_installed", lambda: False)
    with pytest.raises(ValueError, match="decord is not installed"):
        check_manifest(str(tmp_path), decoder="decord")
