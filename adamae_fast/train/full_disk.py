"""A disk that is full costs a run its newest steps, not the checkpoint before them."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from adamae_fast.errors import RunStoppedError
from adamae_fast.run_folder import RunFolder
from adamae_fast.train.checkpoint import remove_unfinished

_FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskFullError(RunStoppedError):
    """There is no space for another checkpoint."""


@contextmanager
def full_disk_told(run: RunFolder) -> Iterator[None]:
    """Around the writing of a checkpoint: where the disk is full, remove what was begun and say what there is.

    Raises DiskFullError with folder, free space and remedy.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not _is_full(error):
            raise
        remove_unfinished(run)
        checkpoints = run.list_checkpoints()
        kept = f"{checkpoints[-1]} is kept" if checkpoints else "there was none before it"
        free = shutil.disk_usage(run.path).free
        raise DiskFullError(
            f"output_dir={str(run.path)!r}: no space for another checkpoint ({free / 2**20:.0f} MiB are free); {kept}. "
            "Make room (older checkpoints, or checkpoint.keep), then run the same command again, with resume=auto"
        ) from error


def _is_full(error: Exception) -> bool:
    # safetensors has a text in place of the number: "I/O error: No space left on device (os error 28)".
    return getattr(error, "errno", None) in _FULL or any(f"(os error {number})" in str(error) for number in _FULL)
