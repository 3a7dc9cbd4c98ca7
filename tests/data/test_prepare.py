from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from adamae_fast.cli import main
from adamae_fast.config import DataConfig
from adamae_fast.data import prepare as prepare_module
from adamae_fast.data.check import check_manifest
from adamae_fast.data.dataset import PretrainClips
from adamae_fast.data.decode import EncodedVideo, decord_is_installed, open_entry
from adamae_fast.data.encode import Settings, encode
from adamae_fast.data.manifest import Entry, read_manifest
from adamae_fast.data.prepare import prepare
from adamae_fast.errors import RunStoppedError

WriteVideo = Callable[..., Path]
Numbers = Callable[[Any], list[int]]
DECODERS = ("pyav", "decord") if decord_is_installed() else ("pyav",)

SOURCES: dict[str, dict[str, Any]] = {
    "long.mp4": {"num_frames": 70, "options": {"g": "250"}},
    "open.mp4": {"num_frames": 40, "options": {"g": "8", "x264-params": "open-gop=1:bframes=3:b-adapt=0:scenecut=0"}},
    "guessed.avi": {"num_frames": 20, "codec": "mpeg4", "options": {"g": "8", "bf": "2", "b": "2M"}},
    "vp9.webm": {"num_frames": 33, "codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "one.mp4": {"num_frames": 1},
    "turned.mp4": {"num_frames": 18, "height": 80, "rotation": 180},
    "odd.mkv": {"num_frames": 17, "codec": "ffv1", "pix_fmt": "bgr0", "height": 49, "width": 67},
}
IMAGES = 12
UNREADABLE = {"text.mp4": "no video, cut short or damaged", "missing.mp4": "no such file or directory"}


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """A killed process leaves to the system what it has written; only a power cut asks for more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def manifest(
    tmp_path_factory: pytest.TempPathFactory, write_video: WriteVideo, write_images: Callable[..., Path]
) -> Path:
    """Videos of every kind, images, two unreadable files; labels are places."""
    folder = tmp_path_factory.mktemp("sources")
    for name, how in SOURCES.items():
        write_video(folder / name, **how)
    write_images(folder / "images", range(IMAGES))
    (folder / "text.mp4").write_text("no video\n" * 50)
    names = [*SOURCES, *UNREADABLE]
    names.insert(3, names.pop())  # one in the middle, one at the end
    lines = [f"{name} {place}" for place, name in enumerate(names)]
    lines.insert(2, f"images {IMAGES} 100")
    path = folder / "train.txt"
    path.write_text("# columns: folder total_frames label\n" + "\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module", params=["h264", "vp9"])
def prepared(request: pytest.FixtureRequest, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / request.param
    assert prepare(str(manifest), str(out), codec=request.param, keyint=8, shards="20kB", num_workers=2) == 1
    return out


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _small(manifest: Path, out: Path, **changed: Any) -> int:
    return prepare(str(manifest), str(out), **{"short_side": 32, "shards": "8kB", "num_workers": 1, **changed})


@pytest.fixture(scope="module")
def undisturbed(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What :func:`_small` makes."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert _small(manifest, out) == 1
    contents = _contents(out)
    assert sum(name.endswith(".tar") for name in contents) >= 3
    return contents


def test_every_frame_is_there_under_its_number(prepared: Path, numbers: Numbers) -> None:
    entries = read_manifest(str(prepared))
    expected = [how["num_frames"] for how in SOURCES.values()]
    expected.insert(2, IMAGES)
    assert [entry.prepared.num_frames for entry in entries if entry.prepared] == expected
    rng = np.random.default_rng(0)
    for entry, num_frames in zip(entries, expected, strict=True):
        frames = {}
        for decoder in DECODERS:
            with closing(open_entry(entry, decoder)) as video:
                assert video.num_frames == num_frames
                assert video.codec == prepared.name
                ids = np.concatenate([rng.integers(num_frames, size=4), [num_frames - 1]])
                turned = entry.label == list(SOURCES).index("turned.mp4") + 1
                frames[decoder] = video.read(np.arange(num_frames))
                upright = frames[decoder][:, ::-1, ::-1] if turned else frames[decoder]
                assert numbers(upright) == list(range(num_frames))
                assert np.array_equal(video.read(ids), frames[decoder][ids])
        assert all(np.array_equal(read, frames["pyav"]) for read in frames.values())


def test_labels_sources_and_sizes_are_kept(prepared: Path, manifest: Path) -> None:
    entries = read_manifest(str(prepared))
    assert [entry.label for entry in entries] == [0, 1, 100, 2, 4, 5, 6, 7]
    sizes = [(entry.prepared.height, entry.prepared.width) for entry in entries if entry.prepared]
    assert sizes == [(48, 64)] * 6 + [(80, 64), (48, 66)]
    lines = [json.loads(line) for line in (prepared / "prepared.jsonl").read_text().splitlines()]
    videos = [video for line in lines[1:] for video in line["videos"]]
    sources = [str(manifest.parent / name) for name in SOURCES]
    sources.insert(2, str(manifest.parent / "images"))
    assert [video["source"] for video in videos] == sources
    assert [video["fps"] for video in videos] == [25.0] * len(videos)
    shards = [path for path in prepared.iterdir() if path.suffix == ".tar"]
    assert len(shards) > 1
    # A shard ends before the video that would not fit; only a single video is larger.
    assert all(shard.stat().st_size < 20_000 + 11_000 for shard in shards)


def test_unreadable_videos_are_listed(prepared: Path, manifest: Path) -> None:
    lines = [json.loads(line) for line in (prepared / "quarantine.jsonl").read_text().splitlines()]
    assert {Path(line["path"]).name for line in lines} == set(UNREADABLE)
    assert all(UNREADABLE[Path(line["path"]).name] in line["reason"] for line in lines)


def test_no_trap_and_a_key_frame_every_eight(prepared: Path, tmp_path: Path) -> None:
    for entry in read_manifest(str(prepared)):
        assert entry.prepared is not None
        (tmp_path / "a.mp4").write_bytes(entry.prepared.read())
        with closing(EncodedVideo(str(tmp_path / "a.mp4"), "auto")) as video:
            assert video._decord_trap is None
            assert video.num_frames == entry.prepared.num_frames
        with av.open(str(tmp_path / "a.mp4")) as container:
            assert [stream.type for stream in container.streams] == ["video"]
            packets = [packet for packet in container.demux(video=0) if packet.size]
            keys = [place for place, packet in enumerate(packets) if packet.is_keyframe]
            assert keys == list(range(0, len(packets), 8))
            times = sorted(packet.pts for packet in packets)
            assert len({b - a for a, b in pairwise(times)}) <= 1  # type: ignore[operator]
        content = (tmp_path / "a.mp4").read_bytes()
        assert content.index(b"moov") < content.index(b"mdat")  # a reader need not jump to its end first


def test_dali_decodes_frames_by_their_numbers(prepared: Path, numbers: Numbers) -> None:
    dali = pytest.importorskip("nvidia.dali")
    if prepared.name == "h264":
        pytest.skip("DALI decodes H.264 on a GPU only")
    entry = read_manifest(str(prepared))[0].prepared
    assert entry is not None

    @dali.pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def pipeline() -> Any:
        shard = Path(entry.shard)
        video, label = dali.fn.readers.webdataset(
            paths=[str(shard)], index_paths=[str(shard.with_suffix(".idx"))], ext=["mp4", "cls"]
        )
        return dali.fn.decoders.video(video, device="cpu", start_frame=13, stride=4, sequence_length=8), label

    built = pipeline()
    built.build()
    frames, label = built.run()
    assert numbers(frames.at(0)) == list(range(13, 45, 4))
    assert label.at(0).tobytes() == b"0"


def test_a_second_call_has_nothing_to_do(prepared: Path, manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in prepared.iterdir()}
    assert prepare(str(manifest), str(prepared), codec=prepared.name, keyint=8, shards="0.02MB") == 1  # type: ignore[arg-type]
    assert {path: path.stat().st_mtime_ns for path in prepared.iterdir()} == before
    printed = capsys.readouterr().out
    assert "8 videos" in printed
    assert f"2 unreadable; {prepared}/quarantine.jsonl says why" in printed


def test_check_and_training_read_it(
    prepared: Path, tmp_path: Path, numbers: Numbers, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_manifest(str(prepared), json=True) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["problem"] for row in rows] == [None] * 8
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name, content in _contents(prepared).items():
        (damaged / name).write_bytes(content)
    entries = read_manifest(str(damaged))
    victim = entries[4].prepared
    assert victim is not None
    with open(victim.shard, "r+b") as shard:
        shard.seek(victim.offset + victim.length // 2)
        byte = shard.read(1)[0]
        shard.seek(-1, os.SEEK_CUR)
        shard.write(bytes([byte ^ 16]))
    assert check_manifest(str(damaged), json=True) == 1
    problems = {row["path"]: row["problem"] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert [path for path, problem in problems.items() if problem] == [victim.path]
    assert "its bytes have changed" in problems[victim.path]

    config = DataConfig(stride=1, crop="center")
    clean = PretrainClips(read_manifest(str(prepared)), config, 4, 32, seed=0)
    clips = PretrainClips(entries, config, 4, 32, seed=0)
    bad = []
    for position in range(len(entries)):
        sample = clips[position]
        assert sample.video.shape == (1, 3, 4, 32, 32)
        bad += sample.bad
        assert bool((sample.video == clean[position].video).all()) == (not sample.bad)
    assert {video.path for video in bad} == {victim.path}


def test_only_the_first_seconds(manifest: Path, tmp_path: Path, numbers: Numbers) -> None:
    _small(manifest, tmp_path / "out", max_seconds=0.5)
    kept = []
    for entry in read_manifest(str(tmp_path / "out")):
        with closing(open_entry(entry)) as video:
            kept.append(video.num_frames)
            if entry.label != 6:  # lies on its head
                assert numbers(video.read(np.arange(video.num_frames))) == list(range(video.num_frames))
    assert kept == [13, 13, 12, 13, 13, 1, 13, 13]


def test_bytes_do_not_depend_on_workers(manifest: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    assert _small(manifest, tmp_path / "out", num_workers=3) == 1
    assert _contents(tmp_path / "out") == undisturbed


def test_other_sizes_of_shards_hold_the_same_videos(
    manifest: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    assert _small(manifest, tmp_path / "out", shards="1GB") == 1
    lines = undisturbed["prepared.jsonl"].splitlines()[1:]
    sums = [video["sha256"] for line in lines for video in json.loads(line)["videos"]]
    assert [entry.prepared.sha256 for entry in read_manifest(str(tmp_path / "out")) if entry.prepared] == sums


# A run is killed: by itself, at a chosen line, or by its parent.


def _in_a_process(run: Callable[[], object]) -> multiprocessing.Process:
    def target() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # as a process has it that a shell starts
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 2)
        os._exit(int(run() or 0))  # type: ignore[call-overload]

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    return process  # type: ignore[return-value]


def _suicide(*args: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _half_a_line(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line[: len(line) // 2])
    _suicide()


@pytest.mark.parametrize(
    ("name", "act"),
    [
        ("read_index", _suicide),  # the header is written
        ("append_line", _suicide),  # a shard is in its place, the index does not know of it
        ("append_line", _half_a_line),
        ("_tidy", _suicide),  # everything is in a shard
        ("shutil.rmtree", _suicide),
    ],
)
def test_killed_at_a_line(
    manifest: Path,
    tmp_path: Path,
    undisturbed: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    act: Callable[..., None],
) -> None:
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(f"adamae_fast.data.prepare.{name}", act)
            process = _in_a_process(lambda: _small(manifest, tmp_path / "out"))
            process.join()
            assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "out" / ".unfinished").is_dir()
    _wait_until(lambda: _small(manifest, tmp_path / "out") == 1)
    assert _contents(tmp_path / "out") == undisturbed


def _wait_until(condition: Callable[[], bool]) -> None:
    """Until it holds; a ValueError, of a folder that is still locked, counts as no."""
    for _ in range(2000):
        with suppress(ValueError):
            if condition():
                return
        time.sleep(0.005)
    pytest.fail("never happened")


def test_killed_while_encoding(manifest: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    """From outside, at several moments; what was encoded before is not encoded again."""
    out = tmp_path / "out"
    for awaited in ("00000000.json", "00000001.json", "shard-00001.tar"):
        process = _in_a_process(lambda: _small(manifest, out, num_workers=2))
        _wait_until(lambda path=awaited: bool(list(out.rglob(path)) + list(out.glob("shard-00001.tar"))))  # type: ignore[misc]
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
    _wait_until(lambda: _small(manifest, out) == 1)
    assert _contents(out) == undisturbed


def test_what_was_encoded_is_used_again(
    manifest: Path, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run cannot encode: it finds all videos, but for a damaged one, which it encodes anew."""
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module._Assembler, "finish", _suicide)
        process = _in_a_process(lambda: _small(manifest, tmp_path / "out", shards="1GB"))
        process.join()
        assert process.exitcode == -signal.SIGKILL
    damaged = tmp_path / "out" / ".unfinished" / "00000001.video"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")

    def only_one(entry: Entry, path: Path, settings: Settings) -> dict[str, Any]:
        if entry.path.endswith(("long.mp4", "webm")):
            pytest.fail("encoded twice")
        return encode(entry, path, settings)

    monkeypatch.setattr(prepare_module, "encode", only_one)
    assert _small(manifest, tmp_path / "out", shards="1GB") == 1
    sums = [e.prepared.sha256 for e in read_manifest(str(tmp_path / "out")) if e.prepared]
    assert len(sums) == 8
    assert all(checksum.encode() in undisturbed["prepared.jsonl"] for checksum in sums)


def test_what_another_preparation_left_is_not_used(manifest: Path, tmp_path: Path) -> None:
    """``rm -r out/*``, which spares hidden names, between two runs."""
    out, left = tmp_path / "out", tmp_path / "out" / ".unfinished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module._Assembler, "finish", _suicide)
        process = _in_a_process(lambda: _small(manifest, out, shards="1GB"))
        process.join()
    (out / "prepared.jsonl").unlink()
    assert len(list(left.glob("*.video"))) == 8
    other = manifest.parent / "one.txt"
    other.write_text("turned.mp4\n")
    _wait_until(lambda: _small(other, out, short_side=16) == 0)
    (entry,) = read_manifest(str(out))
    assert entry.prepared is not None
    assert (entry.prepared.num_frames, entry.prepared.height, entry.prepared.width) == (18, 20, 16)


def test_ctrl_c_ends_the_workers_and_the_next_run_goes_on(
    manifest: Path, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def hang(entry: Entry, path: Path, settings: Settings) -> dict[str, Any]:
        if entry.path.endswith("vp9.webm"):
            (out / "pid").write_text(str(os.getpid()))
            time.sleep(60)
        return encode(entry, path, settings)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "encode", hang)
        process = _in_a_process(lambda: _small(manifest, out))
        _wait_until(lambda: bool((out / "pid").exists() and (out / "pid").read_text()))
        os.kill(process.pid or 0, signal.SIGINT)
        process.join()
    assert process.exitcode == 130
    with pytest.raises(ProcessLookupError):
        os.kill(int((out / "pid").read_text()), 0)
    (out / "pid").unlink()
    assert _small(manifest, out) == 1
    assert _contents(out) == undisturbed


def test_a_video_that_crashes_the_decoder(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(entry: Entry, path: Path, settings: Settings) -> dict[str, Any]:
        if entry.path.endswith("open.mp4"):
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)  # pytest's handler would print a page
            os.kill(os.getpid(), signal.SIGSEGV)
        return encode(entry, path, settings)

    monkeypatch.setattr(prepare_module, "encode", crash)
    assert _small(manifest, tmp_path / "out", num_workers=2) == 1
    lines = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    reasons = {Path(line["path"]).name: line["reason"] for line in lines}
    assert reasons["open.mp4"] == "crashed the decoder (SIGSEGV)"
    assert len(reasons) == 3
    assert [entry.label for entry in read_manifest(str(tmp_path / "out"))] == [0, 100, 2, 4, 5, 6, 7]


def test_a_video_that_keeps_the_decoder(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(entry: Entry, path: Path, settings: Settings) -> dict[str, Any]:
        if entry.path.endswith("open.mp4"):
            time.sleep(3600)
        return encode(entry, path, settings)

    monkeypatch.setattr(prepare_module, "encode", hang)
    monkeypatch.setattr(prepare_module, "LOOK_SECONDS", 0.02)
    assert _small(manifest, tmp_path / "out", num_workers=2, timeout=5.0) == 1
    lines = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    reasons = {Path(line["path"]).name: line["reason"] for line in lines}
    assert reasons["open.mp4"] == "took longer than 5 s"
    assert len(reasons) == 3
    assert [entry.label for entry in read_manifest(str(tmp_path / "out"))] == [0, 100, 2, 4, 5, 6, 7]


def test_a_killed_worker_ends_the_run(
    manifest: Path, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "encode", _suicide)
        with pytest.raises(RunStoppedError, match=r"long\.mp4: the process that encoded it died \(SIGKILL\)"):
            _small(manifest, tmp_path / "out")
    assert _small(manifest, tmp_path / "out") == 1
    assert _contents(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("full", ["shard-00001.tar", "00000005.video"])
def test_a_full_disk(
    manifest: Path, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    """/dev/full says to every write that no space is left; once to a shard, once to the encoder."""
    begin = prepare_module._begin

    def begin_with_full(*arguments: Any) -> Any:
        index = begin(*arguments)
        (tmp_path / "out" / ".unfinished" / full).symlink_to("/dev/full")
        return index

    def to_full(entry: Entry, path: Path, settings: Settings) -> dict[str, Any]:
        return encode(entry, Path("/dev/full") if path.name.startswith(full.split(".")[0]) else path, settings)

    with monkeypatch.context() as patch:
        if full.endswith(".tar"):
            patch.setattr(prepare_module, "_begin", begin_with_full)
        else:
            patch.setattr(prepare_module, "encode", to_full)
        with pytest.raises(
            RunStoppedError, match=r"no space left on device; \d shards? with \d videos? stand\. Make room"
        ):
            _small(manifest, tmp_path / "out")
    whole = [name for name in undisturbed if name.startswith("shard-00000")]
    assert {name: _contents(tmp_path / "out").get(name) for name in whole} == {n: undisturbed[n] for n in whole}
    assert not list((tmp_path / "out" / ".unfinished").glob("shard-*"))
    assert _small(manifest, tmp_path / "out") == 1
    assert _contents(tmp_path / "out") == undisturbed


def test_hostile_names_stay_inside(tmp_path: Path, write_video: WriteVideo) -> None:
    sources = tmp_path / "sources"
    names = ["../outside.mp4", "a'b\"c;$(x).mp4", "-rf.mp4", "größe\u202e.mp4", "x" * 200 + ".mp4"]
    (sources / "sub").mkdir(parents=True)
    for name in names:
        write_video(sources / name, 2)
    (sources / "list.csv").write_text("".join(f'"{name.replace(chr(34), chr(34) * 2)}",1\n' for name in names))
    before = set(_contents(tmp_path))
    out = tmp_path / "sub" / "out"
    assert _small(sources / "list.csv", out, shards="1MB") == 0
    assert set(_contents(out)) == {"prepared.jsonl", "shard-00000.tar", "shard-00000.idx"}
    assert set(_contents(tmp_path)) - before == {f"sub/out/{name}" for name in _contents(out)}
    members = [entry.prepared.name for entry in read_manifest(str(out)) if entry.prepared]
    assert members == [f"{place:08d}.mp4" for place in range(len(names))]


def test_a_folder_of_another_preparation_is_refused(manifest: Path, prepared: Path, tmp_path: Path) -> None:
    settings = {"codec": prepared.name, "keyint": 8, "shards": "20kB", "num_workers": 1}
    for change, says in (
        ({"short_side": 256}, r"other settings \(short_side=320, not 256\)"),
        ({"keyint": 4}, r"other settings \(keyint=8, not 4\)"),
        ({"shards": "1MB"}, r"other settings \(shards=20000, not 1000000\)"),
        ({"max_seconds": 1.5}, r"other settings \(max_seconds=0\.0, not 1\.5\)"),
    ):
        with pytest.raises(ValueError, match=says):
            prepare(str(manifest), str(prepared), **{**settings, **change})  # type: ignore[arg-type]
    other = manifest.parent / "other.txt"
    for text in ("long.mp4 0\n", manifest.read_text().replace("long.mp4 0", "long.mp4 1")):
        other.write_text(text)
        with pytest.raises(ValueError, match=r"prepared from another manifest \(.*train\.txt, 10 videos; now"):
            prepare(str(other), str(prepared), **settings)  # type: ignore[arg-type]


def test_errors_of_the_user(manifest: Path, tmp_path: Path) -> None:
    for arguments, says in (
        ({"short_side": 31}, "short_side=31: choose an even number"),
        ({"keyint": 0}, "keyint=0"),
        ({"max_seconds": -1.0}, "max_seconds=-1.0"),
        ({"max_seconds": float("nan")}, "max_seconds=nan"),
        ({"num_workers": 0}, "num_workers=0"),
        ({"timeout": 0.0}, "timeout=0.0"),
        ({"codec": "av1"}, "codec='av1': choose h264 or vp9"),
        ({"shards": "big"}, "shards='big'"),
        ({"shards": "0MB"}, "shards='0MB'"),
        ({"shards": "5 TB"}, "shards='5 TB'"),
    ):
        with pytest.raises(ValueError, match=says):
            prepare(str(manifest), str(tmp_path / "out"), **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"already holds something \(train\.txt\)|already holds something \(guessed"):
        _small(manifest, manifest.parent)
    with pytest.raises(ValueError, match=r"train\.txt': not a folder"):
        _small(manifest, manifest)
    with (
        prepare_module._locked(tmp_path / "locked"),
        pytest.raises(ValueError, match="another process prepares videos in it"),
    ):
        _small(manifest, tmp_path / "locked")


def test_command_line(manifest: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    arguments = ["--short-side", "32", "--shards=8kB", "--num-workers", "1"]
    assert main(["data", "prepare", str(manifest), str(tmp_path / "out"), *arguments]) == 1
    assert _contents(tmp_path / "out") == undisturbed
