from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from adamae_fast.data.manifest import Entry, ManifestError, numbered_images, read_manifest


def _manifest(folder: Path, text: str, *existing: str) -> str:
    """Write a manifest, and an empty file for each name that is to exist."""
    for name in existing:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    path = folder / "train.csv"
    path.write_bytes(text.encode())
    return str(path)


def _images(folder: Path, name: str, numbers: range) -> None:
    (folder / name).mkdir(parents=True)
    for number in numbers:
        (folder / name / f"img_{number:05}.jpg").touch()


@pytest.mark.parametrize(
    ("line", "path", "label"),
    [
        ("a.mp4 3", "a.mp4", 3),
        ("a.mp4,3", "a.mp4", 3),
        ("a.mp4, 3", "a.mp4", 3),
        ("a.mp4\t3", "a.mp4", 3),
        ("  a.mp4 \t  3  \r", "a.mp4", 3),
        ("a.mp4", "a.mp4", None),
        ("a.mp4,", "a.mp4", None),
        ("a.mp4 -1", "a.mp4", None),
        ("sub/a.webm 0", "sub/a.webm", 0),
        ("a 7", "a.mp4", 7),
        ("a", "a.mp4", None),
        ("a.mp4 0 -1", "a.mp4", None),
        ("a 0 -1", "a.mp4", None),
        ("a.mp4,0,-1", "a.mp4", None),
        ("a.mp4 -1 5", "a.mp4", 5),
        ("my own clip.mp4,3", "my own clip.mp4", 3),
        ("my own clip.mp4\t3", "my own clip.mp4", 3),
        ("my own clip.mp4", "my own clip.mp4", None),
        ("my own clip,", "my own clip.mp4", None),
        ('"one, two.mp4",3', "one, two.mp4", 3),
        ("one,two.mp4 3", "one,two.mp4", 3),
        ("größe.mp4 3", "größe.mp4", 3),
    ],
)
def test_every_way_to_name_a_video(tmp_path: Path, line: str, path: str, label: int | None) -> None:
    manifest = _manifest(tmp_path, f"# a comment, 1 2 3\n\n{line}\n", path)
    assert read_manifest(manifest) == [Entry(str(tmp_path / path), label)]


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    manifest = _manifest(tmp_path, "\ufeffa.mp4 1\r\nb.mp4 2\r\n", "a.mp4")
    assert [(os.path.basename(e.path), e.label) for e in read_manifest(manifest)] == [("a.mp4", 1), ("b.mp4", 2)]


def test_root_and_absolute_paths(tmp_path: Path) -> None:
    other = tmp_path / "videos"
    manifest = _manifest(tmp_path, f"a.mp4 1\n{tmp_path}/b.mp4 2\n", "videos/a.mp4")
    assert [e.path for e in read_manifest(manifest, str(other))] == [f"{other}/a.mp4", f"{tmp_path}/b.mp4"]


def test_missing_files_are_left_to_the_quarantine(tmp_path: Path) -> None:
    lines = "".join(f"{i}.mp4 0\n" for i in range(30))
    assert len(read_manifest(_manifest(tmp_path, lines, "19.mp4"))) == 30


def test_a_wrong_root_is_an_error(tmp_path: Path) -> None:
    lines = "".join(f"{i}.mp4 0\n" for i in range(30))
    manifest = _manifest(tmp_path, lines, "20.mp4")
    with pytest.raises(ManifestError, match=r"none of its first 20 videos exists.*0\.mp4.*data\.root"):
        read_manifest(manifest)


@pytest.mark.parametrize(
    ("text", "line_number", "says"),
    [
        ("a.mp4 1\npath,label\n", 2, "header row"),
        ("path label\na.mp4 1\n", 1, "header row"),
        ("video_name\tclass\na.mp4 1\n", 1, "header row"),
        ("path\na.mp4\n", 1, "header row"),
        ("a.mp4 cat\n", 1, "not a path"),
        ("# c\n\na.mp4 1.5\n", 3, "not a path"),
        ("a.mp4,cat\n", 1, "not a path"),
        ("my clip\n", 1, "not a path"),
        ("a.mp4 1 2 3\n", 1, "not a path"),
        (",3\n", 1, "not a path"),
        (f"a.mp4 1\nb.mp4 {'7' * 5000}\n", 2, "not a path"),
        (f"a.mp4 1\nb,{'c' * 200_000}\n", 2, "field larger than field limit"),
        (f"folder 1 {'7' * 5000}\n", 1, "not a path"),
        ("a.mp4 -2\n", 1, "a label is 0 or more"),
        ("a.mp4 5 -1\n", 1, "'path 0 -1'"),
        ("a.mp4 -1 -1\n", 1, "'path 0 -1'"),
        ("a.mp4 0 120\n", 1, "the path is a video"),
        ("folder 4 -3\n", 1, "0 or more"),
        ("folder 0 0\n", 1, "1 or more"),
        ("folder 0 12\nother 12 0\n", 2, "line 1"),
        ("# columns: folder label total_frames\nfolder 5 7\n", 1, "columns must be"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, text: str, line_number: int, says: str) -> None:
    manifest = _manifest(tmp_path, text, "a.mp4")
    with pytest.raises(ManifestError) as caught:
        read_manifest(manifest)
    message = str(caught.value)
    assert f"{manifest}, line {line_number}: " in message
    assert repr(text.split("\n")[line_number - 1].strip()[:200]) in message
    assert says in message
    assert "folder start_index total_frames" in message.partition("\n")[2]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"# only a comment\n"])
def test_empty_manifest(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "empty.txt"
    path.write_bytes(content)
    with pytest.raises(ManifestError, match=r"empty\.txt: names no video.*\naccepted lines"):
        read_manifest(str(path))


def test_a_video_in_place_of_a_manifest(tmp_path: Path) -> None:
    for content in (b"\x00\x00\x00\x20ftypisom", b"\xff\xd8\xff\xe0", "größe.mp4 3\n".encode("latin-1")):
        path = tmp_path / "clip.mp4"
        path.write_bytes(content)
        with pytest.raises(ManifestError, match=r"clip\.mp4: not a text file"):
            read_manifest(str(path))


@pytest.mark.parametrize("path", ["", "nowhere.txt", "~nobody-of-this-name/a.txt", "a\0b"])
def test_no_manifest(path: str) -> None:
    with pytest.raises(ManifestError, match="no such file or folder"):
        read_manifest(path)


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patched, because root may read everything."""

    def refuse(denied: Path, original: Callable[..., Any], path: Any = ".", *args: Any, **kwargs: Any) -> Any:
        if os.fspath(path) == str(denied):
            raise PermissionError(errno.EACCES, "Permission denied", str(denied))
        return original(path, *args, **kwargs)

    file = Path(_manifest(tmp_path, "a.mp4 1\n", "a.mp4", "private/b.mp4"))
    for name, denied, manifest in (
        ("io.open", file, file),  # what Path.read_text calls
        ("os.stat", file, file),
        ("os.scandir", tmp_path / "private", tmp_path),  # what os.walk calls
        ("os.scandir", tmp_path, tmp_path),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(name, partial(refuse, denied, getattr(sys.modules[name[:2]], name[3:])))
            with pytest.raises(ManifestError, match=f"{denied} cannot be read: permission denied; change"):
                read_manifest(str(manifest))
    assert len(read_manifest(str(tmp_path))) == 2


def test_folder_is_searched(tmp_path: Path) -> None:
    for name in ("b/2.MKV", "b/1.mp4", "a.webm", "notes.txt", "b/c/3.avi", "b/cover.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    entries = read_manifest(str(tmp_path))
    assert [os.path.relpath(e.path, tmp_path) for e in entries] == ["a.webm", "b/1.mp4", "b/2.MKV", "b/c/3.avi"]
    assert {e.label for e in entries} == {None}


def test_folder_without_videos_and_folder_with_root(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ManifestError, match=r"no videos in this folder.*\.mp4"):
        read_manifest(str(tmp_path))
    with pytest.raises(ManifestError, match=r"data\.root='/x': has no effect"):
        read_manifest(str(tmp_path), root="/x")


def test_folders_decided_by_a_number_that_is_0(tmp_path: Path) -> None:
    _images(tmp_path, "x", range(1))
    starts = read_manifest(_manifest(tmp_path, "x 7 9\ny 0 12\n"))
    assert starts[0] == Entry(str(tmp_path / "x"), None, start=7, num_frames=9, kind="frames")
    labels = read_manifest(_manifest(tmp_path, "x 7 9\ny 12 0\n"))
    assert labels[0] == Entry(str(tmp_path / "x"), 9, start=0, num_frames=7, kind="frames")


@pytest.mark.parametrize(
    ("images", "line", "start"),
    [
        (range(1, 13), "x 1 12", 1),  # covers all of them as a start and a total
        (range(12), "x 12 5", 0),  # covers all of them as a total
        (range(12), "x 12 12", 0),
        (range(5, 17), "x 5 12", 5),
        (range(20), "x 2 19", 0),  # only 18 images are numbered 2 or more, but there are 2
        (range(12), "x 30 3", 0),  # neither fits, the next line decides
    ],
)
def test_folders_decided_by_their_images(tmp_path: Path, images: range, line: str, start: int) -> None:
    _images(tmp_path, "x", images)
    _images(tmp_path, "y", range(1, 8))
    entries = read_manifest(_manifest(tmp_path, f"missing 3 4\n{line}\n{'y 7 3' if '30' in line else ''}\n"))
    first, second = (int(field) for field in line.split()[1:])
    is_start = start == first
    expected = (None, first, second) if is_start else (second, 0, first)
    assert (entries[1].label, entries[1].start, entries[1].num_frames) == expected
    assert entries[0].num_frames == (4 if is_start else 3)


def test_folders_that_stay_ambiguous(tmp_path: Path) -> None:
    _images(tmp_path, "x", range(1, 101))
    text = "v.mp4 3\nx 20 30\n"
    with pytest.raises(ManifestError, match=r"line 2: 'x 20 30': ambiguous.*# columns: folder total_frames label"):
        read_manifest(_manifest(tmp_path, text))
    starts = read_manifest(_manifest(tmp_path, "# columns: folder start_index total_frames\n" + text))
    assert (starts[1].start, starts[1].num_frames, starts[1].label) == (20, 30, None)
    labels = read_manifest(_manifest(tmp_path, "# columns: folder total_frames label\n" + text))
    assert (labels[1].start, labels[1].num_frames, labels[1].label) == (0, 20, 30)


def test_numbered_images(tmp_path: Path) -> None:
    for name in ("v2_frame10.jpg", "v2_frame9.PNG", "cover.jpg", "frame11.txt"):
        (tmp_path / name).touch()
    assert list(numbered_images(str(tmp_path)).items()) == [(9, "v2_frame9.PNG"), (10, "v2_frame10.jpg")]
    (tmp_path / "flow_10.jpg").touch()
    with pytest.raises(ValueError, match=r"flow_10\.jpg and v2_frame10\.jpg have the same number"):
        numbered_images(str(tmp_path))
