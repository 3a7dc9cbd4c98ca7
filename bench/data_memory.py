"""Resident memory of a process that opens one video after another: a decoder that leaks shows after thousands."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np

from adamae_fast.config import DecoderName
from adamae_fast.data.decode import open_video
from adamae_fast.data.synthetic import synthesize

NUM_OPENS = 5000
FRAMES_READ = 4


class Resident(NamedTuple):
    """One look at the process."""

    num_opens: int
    mib: float


def resident_mib() -> float:
    """Memory of this process that is in RAM; Linux only."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def resident_over_opens(
    paths: Sequence[str | Path], decoder: DecoderName, num_opens: int = NUM_OPENS, every: int = 100
) -> list[Resident]:
    """Open ``num_opens`` videos in turn, read some frames of each as a data worker does, and look every so often."""
    rng = np.random.default_rng(0)
    looks = []
    for number in range(num_opens):
        with closing(open_video(str(paths[number % len(paths)]), decoder)) as video:
            video.read(np.sort(rng.integers(video.num_frames, size=FRAMES_READ)))
        if (number + 1) % every == 0:
            looks.append(Resident(number + 1, resident_mib()))
    return looks


def bytes_per_open(looks: Sequence[Resident]) -> float:
    """Slope of a straight line through the second half of the looks; the first half fills caches."""
    half = np.array(looks[len(looks) // 2 :])
    return float(np.polyfit(half[:, 0], half[:, 1], 1)[0] * 2**20)


def main() -> None:
    """Print the memory of each decoder over its opens."""
    options = argparse.ArgumentParser(prog="python -m bench.data_memory", description=__doc__)
    options.add_argument("--opens", type=int, default=NUM_OPENS)
    options.add_argument("--decoder", default="auto", choices=["auto", "decord", "pyav"])
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        manifest = synthesize(f"{folder}/set", num_videos=8, num_frames=24, width=160, height=120)
        paths = [manifest.parent / line.split()[0] for line in manifest.read_text().splitlines()]
        looks = resident_over_opens(paths, chosen.decoder, chosen.opens)
    for look in looks[:: max(1, len(looks) // 10)]:
        print(f"{look.num_opens:6d} opens  {look.mib:8.1f} MiB")
    print(f"{chosen.decoder}: {bytes_per_open(looks):.0f} bytes an open in the second half")


if __name__ == "__main__":
    main()
