from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adamae_fast.config import DecoderName
from adamae_fast.data.decode import VideoError, decord_is_installed, open_entry, open_video
from adamae_fast.data.manifest import Entry, ManifestError, read_manifest
from adamae_fast.data.shards import FORMAT, INDEX_NAME, ShardWriter, find_index, read_index

NUM_FRAMES = 40
LABELS = (3, None, 0)
DECODERS: tuple[DecoderName, ...] = ("auto", "pyav", "decord") if decord_is_installed() else ("auto", "pyav")


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> Path:
    """A file such as data prepare writes: one distance between frames, nothing out of order."""
    path = tmp_path_factory.mktemp("video") / "a.mp4"
    return write_video(path, NUM_FRAMES, options={"g": "8", "bf": "0"})


@pytest.fixture
def folder(tmp_path: Path, video: Path) -> Path:
    """Three videos in two shards, written with this test's own idea of the index."""
    content = video.read_bytes()
    lines: list[dict[str, Any]] = [{"format": FORMAT, "version": 1, "entries": 3}]
    for number, positions in enumerate(((0, 1), (2,))):
        writer = ShardWriter(tmp_path / f"shard-{number:05d}.tar")
        videos = []
        for position in positions:
            label = LABELS[position]
            parts = {"mp4": content, "json": b"{}", **({} if label is None else {"cls": b"%d" % label})}
            facts = {"codec": "h264", "frames": NUM_FRAMES, "height": 48, "width": 64, "fps": 25.0, "label": label}
            facts |= {"name": f"{position:08d}.mp4", "sha256": hashlib.sha256(content).hexdigest()}
            videos.append({**facts, "offset": writer.add(f"{position:08d}", parts), "length": len(content)})
        writer.close()
        lines.append({"shard": writer.path.name, "end": positions[-1] + 1, "videos": videos, "unreadable": []})
    _write_index(tmp_path, lines)
    return tmp_path


def _write_index(folder: Path, lines: list[dict[str, Any]]) -> None:
    (folder / INDEX_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))


def _index_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / INDEX_NAME).read_text().splitlines()]


def test_python_reads_the_tar_file(folder: Path, video: Path) -> None:
    with tarfile.open(folder / "shard-00000.tar") as tar:
        assert tar.getnames() == ["00000000.mp4", "00000000.json", "00000000.cls", "00000001.mp4", "00000001.json"]
        for entry, member in zip(read_manifest(str(folder)), ("00000000.mp4", "00000001.mp4"), strict=False):
            assert entry.prepared is not None
            assert tar.getmember(member).offset_data == entry.prepared.offset
            extracted = tar.extractfile(member)
            assert extracted is not None
            assert extracted.read() == entry.prepared.read() == video.read_bytes()


def test_dali_reads_the_tar_file(folder: Path, video: Path) -> None:
    dali = pytest.importorskip("nvidia.dali")
    from wds2idx import IndexCreator  # comes with DALI

    shard = folder / "shard-00000.tar"
    with IndexCreator(str(shard), str(folder / "theirs.idx"), verbose=False) as creator:
        creator.create_index()
    assert (folder / "theirs.idx").read_text() == (folder / "shard-00000.idx").read_text()

    @dali.pipeline_def(batch_size=2, num_threads=1, device_id=None)
    def pipeline() -> Any:
        return tuple(
            dali.fn.readers.webdataset(
                paths=[str(shard)],
                index_paths=[str(shard.with_suffix(".idx"))],
                ext=["mp4", "cls"],
                missing_component_behavior="empty",
            )
        )

    built = pipeline()
    built.build()
    contents, labels = built.run()
    assert contents.at(0).tobytes() == contents.at(1).tobytes() == video.read_bytes()
    assert (labels.at(0).tobytes(), labels.at(1).tobytes()) == (b"3", b"")


def test_a_prepared_folder_is_a_manifest(folder: Path) -> None:
    entries = read_manifest(str(folder))
    assert [entry.label for entry in entries] == list(LABELS)
    assert [entry.path for entry in entries] == [
        f"{folder}/shard-{shard:05d}.tar:{place:08d}.mp4" for place, shard in enumerate((0, 0, 1))
    ]
    assert {entry.kind for entry in entries} == {"prepared"}
    assert read_manifest(str(folder / INDEX_NAME)) == entries
    assert find_index(str(folder.parent)) is None
    with pytest.raises(ManifestError, match="has no effect on prepared videos"):
        read_manifest(str(folder), str(folder))


@pytest.mark.parametrize("decoder", DECODERS)
def test_frames_are_those_of_the_file(
    folder: Path, video: Path, decoder: DecoderName, numbers: Callable[[Any], list[int]]
) -> None:
    rng = np.random.default_rng(0)
    with closing(open_video(str(video), "pyav")) as original:
        for entry in read_manifest(str(folder)):
            with closing(open_entry(entry, decoder)) as opened:
                assert (opened.num_frames, opened.fps, opened.codec, opened.path) == (40, 25.0, "h264", entry.path)
                assert opened.decoder == ("decord" if decoder == "decord" else "pyav")
                for ids in ([0], [39, 0, 39], rng.integers(NUM_FRAMES, size=6), np.arange(3, 40, 4)):
                    frames = opened.read(ids)
                    assert numbers(frames) == list(ids)
                    assert np.array_equal(frames, original.read(ids))
                with pytest.raises(IndexError, match="from 0 to 39"):
                    opened.read([40])


def test_opening_decodes_and_lists_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import av

    monkeypatch.setattr(av, "open", lambda *args, **kwargs: pytest.fail("opened with PyAV"))
    with closing(open_entry(read_manifest(str(folder))[0], "auto")) as opened:
        assert opened.num_frames == NUM_FRAMES


def test_in_order_of_a_prepared_video(folder: Path, numbers: Callable[[Any], list[int]]) -> None:
    with closing(open_entry(read_manifest(str(folder))[2])) as opened:
        frames = np.stack(list(opened.in_order(24)))
        assert frames.shape[1:] == (24, 32, 3)
        assert numbers(frames) == list(range(NUM_FRAMES))


@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_a_flipped_bit_is_found(folder: Path, place: float) -> None:
    damaged, *others = read_manifest(str(folder))
    assert damaged.prepared is not None
    shard = bytearray((folder / "shard-00000.tar").read_bytes())
    shard[damaged.prepared.offset + int(place * (damaged.prepared.length - 1))] ^= 1
    (folder / "shard-00000.tar").write_bytes(shard)
    for decoder in DECODERS:
        with pytest.raises(VideoError, match=r"shard-00000\.tar:00000000\.mp4: its bytes have changed: SHA-256"):
            open_entry(damaged, decoder)
    for entry in others:
        open_entry(entry).close()


def test_a_shard_that_shrinks_or_goes_after_the_index_was_read(folder: Path) -> None:
    entries = read_manifest(str(folder))
    (folder / "shard-00000.tar").unlink()
    content = (folder / "shard-00001.tar").read_bytes()
    (folder / "shard-00001.tar").write_bytes(content[:1000])
    with pytest.raises(VideoError, match="its shard cannot be read: no such file"):
        open_entry(entries[0])
    with pytest.raises(VideoError, match="its bytes have changed"):
        open_entry(entries[2])


HOSTILE_SHARDS = {
    "shard": ["../x.tar", "/etc/passwd", "shard-00000.tar\0", "a/shard-00000.tar", "shard-00000.tar\n", "..", 7, None],
    "end": [0, 4, -1, True, "3", 10**30],
    "videos": [None, {}, ["a"], [[]]],
    "unreadable": [None, {}],
}
HOSTILE_VIDEOS = {
    "name": ["../../x.mp4", "/x.mp4", "00000000.mp4\0", "00000000", "", 7],
    "offset": [-1, 0, 511, 10**18, 10**30, True, 512.0, "512"],
    "length": [0, -1, 10**18, None],
    "sha256": ["", "g" * 64, "A" * 64, "a" * 63, 7],
    "frames": [0, -1, 10**15, "40"],
    "height": [0, 2**16, "48"],
    "width": [0, 10**9],
    "fps": [0, -1, None, "25", float("nan"), float("inf")],
    "codec": ["av1", None, []],
    "label": [-1, "3", True, 0.5],
}


@pytest.mark.parametrize("key", HOSTILE_SHARDS)
def test_hostile_shards_are_refused(folder: Path, key: str) -> None:
    lines = _index_lines(folder)
    for value in HOSTILE_SHARDS[key]:
        _write_index(folder, [lines[0], {**lines[1], key: value}, lines[2]])
        with pytest.raises(ManifestError, match=rf"{INDEX_NAME}, line [23]: "):
            read_manifest(str(folder))


@pytest.mark.parametrize("key", HOSTILE_VIDEOS)
def test_hostile_videos_are_refused(folder: Path, key: str) -> None:
    lines = _index_lines(folder)
    for value in HOSTILE_VIDEOS[key]:
        lines[2]["videos"] = [{**lines[2]["videos"][0], key: value}]
        _write_index(folder, lines)
        with pytest.raises(ManifestError, match=rf"{INDEX_NAME}, line 3: "):
            read_manifest(str(folder))
        lines[2] = _index_lines(folder)[2]


def test_wrong_facts_are_the_videos_fault(folder: Path) -> None:
    """A checksum that fits does not make the other facts true."""
    lines = _index_lines(folder)
    for facts in ({"frames": 39}, {"frames": 41}, {"height": 40}, {"width": 66}):
        _write_index(folder, [*lines[:2], {**lines[2], "videos": [{**lines[2]["videos"][0], **facts}]}])
        for decoder in DECODERS:
            with closing(open_entry(read_manifest(str(folder))[2], decoder)) as opened, pytest.raises(VideoError):
                opened.read([5])


def test_a_range_past_the_shards_end(folder: Path) -> None:
    content = (folder / "shard-00001.tar").read_bytes()
    (folder / "shard-00001.tar").write_bytes(content[:2000])
    with pytest.raises(ManifestError, match=r"00000002\.mp4 ends at byte \d+, .*shard-00001\.tar at 2000"):
        read_manifest(str(folder))


def test_missing_shards_and_shards_that_are_no_files(folder: Path) -> None:
    (folder / "shard-00001.tar").unlink()
    with pytest.raises(ManifestError, match=r"shard-00001\.tar: no such file or directory; bring the shard back"):
        read_manifest(str(folder))
    (folder / "shard-00001.tar").mkdir()
    with pytest.raises(ManifestError, match=r"shard-00001\.tar is not a file"):
        read_manifest(str(folder))


@pytest.mark.parametrize(
    ("first", "says"),
    [
        (b"", "not the index"),
        (b"\xff\n", "not the index"),
        (b"[]\n", "not the index"),
        (b"[" * 100_000 + b"\n", "not the index"),
        (b'{"format": "other"}\n', "not the index"),
        (json.dumps({"format": FORMAT, "version": 1, "entries": 0}).encode() + b"\n", "not the index"),
        (json.dumps({"format": FORMAT, "version": 2, "entries": 3}).encode() + b"\n", "version 2"),
    ],
)
def test_other_headers_are_refused(folder: Path, first: bytes, says: str) -> None:
    rest = (folder / INDEX_NAME).read_bytes().partition(b"\n")[2]
    (folder / INDEX_NAME).write_bytes(first + (rest if first else b""))
    with pytest.raises(ManifestError, match=says):
        read_manifest(str(folder))


def test_an_unfinished_preparation_is_no_manifest(folder: Path) -> None:
    index = folder / INDEX_NAME
    content = index.read_bytes()
    index.write_bytes(content[:-1])  # the last line was being written
    assert [len(shard.videos) for shard in read_index(index).shards] == [2]
    with pytest.raises(ManifestError, match=r"2 of 3 videos are prepared; .*data prepare"):
        read_manifest(str(folder))
    index.write_bytes(content)
    assert len(read_manifest(str(folder))) == 3


def test_no_video_was_readable(folder: Path) -> None:
    line = {"shard": None, "end": 3, "videos": [], "unreadable": [{"path": "a", "reason": "b"}] * 3}
    _write_index(folder, [_index_lines(folder)[0], line])
    with pytest.raises(ManifestError, match=r"holds no videos; quarantine\.jsonl"):
        read_manifest(str(folder))


def test_entries_differ(folder: Path) -> None:
    assert len({*read_manifest(str(folder)), Entry("a.mp4", 1)}) == 4
