"""A disk that is full costs a run its newest steps, not the checkpoint before them."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from adamae_fast.distributed.world import World
from adamae_fast.errors import RunStoppedError
from adamae_fast.run_folder import RunFolder

_FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskFullError(RunStoppedError):
    """There is no space for another checkpoint."""


@contextmanager
def full_disk_told(run: RunFolder, world: World) -> Iterator[None]:
    """Around the writing of a checkpoint by all processes: say what there is where the disk is full.

    Raises DiskFullError with folder, free space and remedy.
    """
    try:
        yield
    except OSError as error:
        if not _is_full(error):
            raise
        checkpoints = run.list_checkpoints()
        kept = f"{checkpoints[-1]} is kept" if checkpoints else "there was none before it"
        free = shutil.disk_usage(run.path).free
        raise world.agreed(
            DiskFullError(
                f"output_dir={str(run.path)!r}: no space for another checkpoint ({free / 2**20:.0f} MiB are free); "
                f"{kept}. Make room (older checkpoints, or a smaller checkpoint.keep), then run the same command again"
            )
        ) from error


def _is_full(error: OSError) -> bool:
    # safetensors has a text in place of the number: "I/O error: No space left on device (os error 28)".
    return error.errno in _FULL or any(f"(os error {number})" in str(error) for number in _FULL)
