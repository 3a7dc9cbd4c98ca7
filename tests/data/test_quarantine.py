from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from adamae_fast.data.quarantine import BadVideo, Quarantine, TooManyBadVideosError
from adamae_fast.errors import RunStoppedError

A, B, C = (BadVideo(f"/d/{name}.mp4", f"{name} is broken") for name in "abc")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_video_is_written_once(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(path, 100, 0.05)
    quarantine.add([])
    assert not path.exists()
    quarantine.add([A, A])
    quarantine.add((B, A._replace(reason="another reason")))
    assert quarantine.count == 2
    lines = _lines(path)
    assert [(line["path"], line["reason"]) for line in lines] == [A[:2], B[:2]]
    assert {tuple(line) for line in lines} == {("path", "reason", "time")}
    assert all(datetime.fromisoformat(line["time"]).tzinfo for line in lines)


def test_goes_on_with_the_file_of_the_run_before(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path, 100, 0.05).add([A])
    again = Quarantine(path, 100, 0.05)
    assert again.count == 1
    again.add([A, B])
    assert again.count == 2
    assert [line["path"] for line in _lines(path)] == [A.path, B.path]


def test_a_torn_last_line_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path, 100, 0.05).add([A, B])
    whole = path.read_bytes()
    for cut in range(whole.index(b"\n") + 1, len(whole)):
        path.write_bytes(whole[:cut])
        quarantine = Quarantine(path, 100, 0.05)
        assert quarantine.count == 1
        quarantine.add([C])
        assert [line["path"] for line in _lines(path)] == [A.path, C.path]


@pytest.mark.parametrize("line", ["no json", "[1]", '{"file": "a"}', "3"])
def test_a_foreign_line_is_an_error(tmp_path: Path, line: str) -> None:
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path, 100, 0.05).add([A])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"quarantine\.jsonl, line 2: not a quarantined video"):
        Quarantine(path, 100, 0.05)


def test_crashers_are_marked(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(path, 100, 0.05)
    quarantine.add([A, B._replace(crashed=True)])
    assert [line.get("crashed") for line in _lines(path)] == [None, True]
    for one in (quarantine, Quarantine(path, 100, 0.05)):
        assert one.crashers == {B.path: B.reason}
        assert one.count == 2


def test_other_keys_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    path.write_text('{"note": [1], "path": "a"}\n{"path": "b", "reason": "r", "crashed": true, "x": null}\n')
    quarantine = Quarantine(path, 100, 0.05)
    assert (quarantine.count, quarantine.crashers) == (2, {"b": "r"})
    quarantine.add([BadVideo("a", "again"), C])
    assert [line["path"] for line in _lines(path)] == ["a", "b", C.path]


def test_stops_above_the_share_and_not_at_it(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(path, 40, 0.05)
    quarantine.add([A])
    quarantine.add([B])  # exactly 5 %
    with pytest.raises(TooManyBadVideosError) as caught:
        quarantine.add([C])
    for part in ("3 of 40 videos (7.5%)", "data.max_bad_share=0.05", str(path)):
        assert part in str(caught.value)
    assert isinstance(caught.value, RunStoppedError)
    assert caught.value.bad == ()
    assert len(_lines(path)) == 3  # what stopped the run is on record


def test_a_run_above_its_share_ends_with_the_next_bad_video(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path, 2, 1.0).add([A, B])
    strict = Quarantine(path, 2, 0.5)
    strict.add([])
    with pytest.raises(TooManyBadVideosError):
        strict.add([A])


def test_no_bad_video_is_allowed_with_share_0(tmp_path: Path) -> None:
    with pytest.raises(TooManyBadVideosError, match="1 of 1000"):
        Quarantine(tmp_path / "quarantine.jsonl", 1000, 0.0).add([A])


def test_a_crash_of_a_listed_video_is_written_down(tmp_path: Path) -> None:
    file = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(file, 10, 1.0)
    quarantine.add([BadVideo("a.mp4", "damaged")])
    quarantine.add([BadVideo("a.mp4", "crashed the decoder", crashed=True)])
    quarantine.add([BadVideo("a.mp4", "crashed the decoder", crashed=True)])
    again = Quarantine(file, 10, 1.0)
    assert again.crashers == {"a.mp4": "crashed the decoder"}
    assert again.count == 1
    assert len(file.read_text().splitlines()) == 2
