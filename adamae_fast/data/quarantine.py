"""Remembers which videos could not be read, and stops a run that has too many of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from adamae_fast.errors import RunStoppedError


class BadVideo(NamedTuple):
    """A video that could not be read."""

    path: str
    """As in the manifest, with the root in front."""

    reason: str
    """What the decoders said, or the signal that ended them."""

    crashed: bool = False
    """Decoding it ends the process, so that it must not be opened again."""


class DataStoppedError(RunStoppedError):
    """A run that had to stop for its data."""

    bad: Sequence[BadVideo] = ()
    """Videos found unreadable that no batch has told of; they belong in quarantine before the run ends."""


class TooManyBadVideosError(DataStoppedError):
    """More than the allowed share of the videos is unreadable."""


class Quarantine:
    """The file ``quarantine.jsonl``: one line {path, reason, time} for each video that turned out unreadable.

    The line of a video that crashed its decoder says ``"crashed": true`` as well. Other keys are left alone. A resumed
    run goes on with the file of the run before. A last line that a killed process left unfinished is removed.

    Args:
        path: the file; it appears with the first bad video.
        num_videos: videos of the manifest, of which ``max_share`` may be bad.
        max_share: largest allowed share (data.max_bad_share).
        writes: whether this process writes the file; of several that are told of the same videos, one does.

    Raises:
        ValueError: a line of the file is not what this class writes.
    """

    def __init__(self, path: str | Path, num_videos: int, max_share: float, *, writes: bool = True) -> None:
        self._path = Path(path)
        self._num_videos = num_videos
        self._max_share = max_share
        self._writes = writes
        self._videos = self._load()

    @property
    def count(self) -> int:
        """Different videos in quarantine."""
        return len(self._videos)

    @property
    def crashers(self) -> dict[str, str]:
        """Path and reason of those that crashed their decoder, for ``known_crashers`` of clip_batches."""
        return {video.path: video.reason for video in self._videos.values() if video.crashed}

    def add(self, videos: Iterable[BadVideo]) -> None:
        """Write down those that are new. Raises TooManyBadVideosError if all together are more than the allowed share.

        Nothing happens for an empty list: a run may begin above its limit, but does not survive another bad video.
        """
        seen = list(videos)
        new: dict[str, BadVideo] = {}
        for video in seen:
            known = self._videos.get(video.path)
            # A crash is news even of a listed video: a resumed run must not decode it again.
            if known is None or (video.crashed and not known.crashed):
                new.setdefault(video.path, video)
        if new:
            if self._writes:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write("".join(map(_to_line, new.values())))
            self._videos.update(new)
        if seen and self.count > self._max_share * self._num_videos:
            raise TooManyBadVideosError(
                f"{self.count} of {self._num_videos} videos ({self.count / self._num_videos:.1%}) are unreadable, more "
                f"than data.max_bad_share={self._max_share:g} allows; {self._path} lists them with reasons. Repair "
                "them or take them out of the manifest (and remove that file), or raise data.max_bad_share"
            )

    def _load(self) -> dict[str, BadVideo]:
        if not self._path.exists():
            return {}
        content = self._path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        if len(complete) < len(content):
            with self._path.open("r+b") as file:
                file.truncate(len(complete))
        videos = {}
        for number, line in enumerate(complete.splitlines(), start=1):
            try:
                record = json.loads(line)
                video = BadVideo(str(record["path"]), str(record.get("reason", "")), record.get("crashed") is True)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self._path}, line {number}: not a quarantined video; remove the line") from error
            videos[video.path] = video
        return videos


def _to_line(video: BadVideo) -> str:
    record: dict[str, object] = {"path": video.path, "reason": video.reason}
    record["time"] = datetime.now(UTC).isoformat(timespec="seconds")
    if video.crashed:
        record["crashed"] = True
    return json.dumps(record) + "\n"
