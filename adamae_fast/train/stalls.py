"""Whether a run waits for its data, what loading costs, and which knob to turn."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from adamae_fast.config import RunConfig
from adamae_fast.config_finetune import LabelledDataConfig
from adamae_fast.data.batch import Batch
from adamae_fast.data.labelled import LabelledBatch
from adamae_fast.device import num_usable_cores

log = logging.getLogger("adamae_fast")

STALL_SHARE = 0.1
"""A run that waits for a larger share of its time is slowed down by its data."""

STALL_STEPS = 200
"""So many steps in a row, and it is told so."""

MANY_BY_DALI = 0.9
"""Where DALI decodes a smaller share of the videos, those that fall back are what the run waits for."""

LONG_WAY = 1.5
"""Key frames are far apart where a clip's frames take this many times the decoding that they would take from their
first one on."""


class LoadFigures:
    """What the batches of an interval cost: means over its clips and batches."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._num_batches = self._num_ready = self._num_clips = self._num_frames = 0
        self._num_by_dali = self._num_fell_back = 0
        self._seconds = 0.0

    def add(self, batch: Batch | LabelledBatch) -> None:
        """Count one batch."""
        self._num_batches += 1
        self._num_ready += batch.num_ready
        self._num_by_dali += batch.num_by_dali
        self._num_fell_back += len(batch.fell_back)
        if batch.decode is not None:
            self._num_clips += batch.video.shape[0]
            self._num_frames += batch.decode.frames
            self._seconds += batch.decode.seconds

    def lap(self) -> dict[str, float]:
        """Return batches_ready, and where known decode_seconds and decoded_frames per clip and dali_share, the share of
        the videos that DALI decoded with data.decoder=dali; begin the next interval.

        decode_seconds is one worker's time: w workers deliver w / decode_seconds clips a second at best. With
        data.repeat, each clip has its share of the one decode.
        """
        figures = {"batches_ready": self._num_ready / max(1, self._num_batches)}
        if self._num_clips:
            figures["decode_seconds"] = self._seconds / self._num_clips
            figures["decoded_frames"] = self._num_frames / self._num_clips
        if self._num_by_dali or self._num_fell_back:
            figures["dali_share"] = self._num_by_dali / (self._num_by_dali + self._num_fell_back)
        self._restart()
        return figures


class StallWatch:
    """Warns once when a run has waited for data for more than 10 % of the time over 200 steps in a row."""

    def __init__(self, config: RunConfig, device_type: str) -> None:
        self._config = config
        self._device_type = device_type
        self._num_steps = 0
        self._waited = 0.0
        self._warned = False

    def observe(self, num_steps: int, metrics: Mapping[str, float]) -> None:
        """Take in the figures of the last ``num_steps`` steps."""
        if metrics["data_wait_share"] <= STALL_SHARE:
            self._num_steps, self._waited = 0, 0.0
            return
        self._num_steps += num_steps
        self._waited += num_steps * metrics["data_wait_share"]
        if self._num_steps >= STALL_STEPS and not self._warned:
            self._warned = True
            log.warning(
                "%.0f %% of the time of the last %d steps was waiting for data; %s",
                100 * self._waited / self._num_steps,
                self._num_steps,
                advice(self._config, self._device_type, metrics, num_usable_cores()),
            )


def advice(config: RunConfig, device_type: str, metrics: Mapping[str, float], num_cores: int) -> str:
    """The knob to turn first, from what is known; the next ones show once it is turned."""
    data = config.data
    on_cpu = data.decoder in ("auto", "decord", "pyav")
    if on_cpu and data.num_workers < num_cores:
        return f"raise data.num_workers={data.num_workers}: this process may use {num_cores} cores"
    if metrics.get("dali_share", 1.0) < MANY_BY_DALI:
        codec = "h264" if device_type == "cuda" else "vp9"
        return (
            f"write the videos anew with adamae-fast data prepare --codec {codec}: DALI decodes only "
            f"{metrics['dali_share']:.0%} of them (adamae-fast data check --decoder dali says why)"
        )
    if data.repeat == 1:
        return "set data.repeat=2 or 4, so that each decode serves as many clips (another experiment: in a new run)"
    span = (config.model.num_frames - 1) * data.stride + 1
    num_decoded = metrics.get("decoded_frames", 0.0) * data.repeat
    is_whole_video = isinstance(data, LabelledDataConfig) and data.sampling == "segments"
    if num_decoded > LONG_WAY * span and not is_whole_video:
        return (
            f"write the videos anew with adamae-fast data prepare: key frames are so far apart that {num_decoded:.0f} "
            f"frames are decoded for a clip, which spans {span}"
        )
    if on_cpu and device_type == "cuda":
        return "set data.decoder=dali, which decodes on the GPU"
    return "write the videos anew with adamae-fast data prepare: smaller pictures decode faster"
