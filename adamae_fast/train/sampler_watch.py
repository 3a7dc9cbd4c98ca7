"""A look at the sampler at each report of a run: does it see what moves, has it collapsed, does it learn?

Shapes: B clips, C channels, T frames, N tokens.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from itertools import islice

import torch
from torch import Tensor

from adamae_fast.config import PretrainConfig
from adamae_fast.data.decode import VideoError
from adamae_fast.data.manifest import Entry
from adamae_fast.data.synthetic import read_boxes
from adamae_fast.grid import TokenGrid
from adamae_fast.model.adamae import AdaMAE
from adamae_fast.report.adaptivity import box_coverage, sampler_logits
from adamae_fast.report.sampler_alarms import REPORTS_IN_A_ROW, Alarm, sampler_alarms
from adamae_fast.report.visualize import read_center_clip
from adamae_fast.train.sampler_figures import lift

log = logging.getLogger("adamae_fast")

NUM_SEARCHED = 64
"""Videos that are searched for known boxes, from the manifest's beginning."""

NUM_CLIPS = 16
"""At most so many of them are looked at."""

BoxedClips = tuple[Tensor, Tensor]
"""uint8 clips (B, C, T, H, W), and the share of each token that moving boxes cover, (B, N) fp32."""


class SamplerWatch:
    """Measures motion_lift, and warns once in a process of each of :mod:`adamae_fast.report.sampler_alarms`.

    Training does not notice: no random number is drawn, and the model's mode is afterwards what it was.

    Args:
        config: of the run.
        model: the one in training, with all its weights in this process where there are ``clips``.
        clips: what motion_lift is measured on; None where no video has known boxes.
    """

    def __init__(self, config: PretrainConfig, model: AdaMAE, clips: BoxedClips | None) -> None:
        self._config = config
        self._model = model
        self._clips = clips
        self._newest: deque[Mapping[str, float]] = deque(maxlen=REPORTS_IN_A_ROW)
        self._told: set[str] = set()

    def measure(self) -> dict[str, float]:
        """Return motion_lift, or nothing without clips; waits for the device.

        It is the mean over clips of Σ_i p_i x_i over the mean of x, where x_i is the share of token i that lies on
        moving boxes: 1 means that p ignores what moves. In eval mode, and fp32 whatever train.precision is.
        """
        if self._clips is None:
            return {}
        video_BCTHW, coverage_BN = self._clips
        # In eval mode it would have to be compiled anew, for a few clips now and then.
        with torch.compiler.set_stance("force_eager"):
            # As many at once as a step has, for which there is memory.
            try:
                logits_BN = sampler_logits(self._model, video_BCTHW, self._config.train.batch_size).cpu()
            except torch.OutOfMemoryError as error:
                log.warning("motion_lift is left out from now on: %s", error)
                self._clips = None
                return {}
        return {"motion_lift": float(lift(logits_BN, coverage_BN).mean())}

    def observe(self, metrics: Mapping[str, float]) -> list[Alarm]:
        """Take in the figures of a report; warn of alarms that are new, and return them."""
        self._newest.append(metrics)
        alarms = sampler_alarms(self._newest, self._config, self._model)
        new = [alarm for alarm in alarms if alarm.name not in self._told]
        for alarm in new:
            self._told.add(alarm.name)
            log.warning("step %d: %s", alarm.step, alarm.message)
        return new


def read_boxed_clips(
    entries: Iterable[Entry], config: PretrainConfig, grid: TokenGrid, left_out: Collection[str] = ()
) -> BoxedClips | None:
    """Read the centre clips of the first videos whose moving boxes are known and in view; None if there are none.

    Searches 64 videos, but for the paths ``left_out``, and reads 16 of them at most. One that cannot be read is told
    in the log and passed over.
    """
    videos: list[Tensor] = []
    coverages: list[Tensor] = []
    for entry in islice(entries, NUM_SEARCHED):
        if len(videos) == NUM_CLIPS:
            break
        if entry.path in left_out:
            continue
        try:
            boxes_TO4 = read_boxes(entry.path)
            if boxes_TO4 is None:
                continue
            clip = read_center_clip(entry, config)
            coverage_N = box_coverage(boxes_TO4, clip.frame_ids, clip.crop, grid)
        except (VideoError, ValueError, OSError) as error:  # a figure beside the training, which goes on without it
            log.warning("motion_lift does without a video: %s", error)
            continue
        if coverage_N.any():
            videos.append(clip.video_CTHW)
            coverages.append(torch.from_numpy(coverage_N).float())
    return (torch.stack(videos), torch.stack(coverages)) if videos else None
