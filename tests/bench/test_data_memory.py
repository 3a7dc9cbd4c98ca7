from __future__ import annotations

from mmap import mmap
from pathlib import Path

import pytest

from adamae_fast.data import decode
from adamae_fast.data.decode import decord_is_installed
from bench.data_memory import Resident, bytes_per_open, resident_over_opens

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")


@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_memory_does_not_grow_with_the_videos_opened(tiny_videos: list[Path], decoder: decode.DecoderName) -> None:
    if decoder == "decord" and not decord_is_installed():
        pytest.skip("decord is not installed")
    looks = resident_over_opens(tiny_videos, decoder, 300, every=10)
    assert [look.num_opens for look in looks] == list(range(10, 310, 10))
    assert bytes_per_open(looks) < 8192  # a decoder that is kept open holds about a megabyte


def test_what_is_kept_open_shows(tiny_videos: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[mmap] = []

    def keep(path: str, options: object) -> decode.EncodedVideo:
        video = decode.EncodedVideo(path, "pyav")
        # Pages of its own: what a decoder allocates may fit into what earlier tests have freed.
        kept.append(mmap(-1, 2**16))
        kept[-1].write(bytes(2**16))
        return video

    monkeypatch.setattr("bench.data_memory.open_video", keep)
    looks = resident_over_opens(tiny_videos, "pyav", 100, every=5)
    for pages in kept:
        pages.close()
    assert bytes_per_open(looks) > 8192
    assert bytes_per_open([Resident(10 * n, 5.0 + n) for n in range(1, 9)]) == pytest.approx(2**20 / 10)
