import logging

import torch

from adamae_fast.config import DataConfig, PretrainConfig
from adamae_fast.config_finetune import FinetuneConfig, LabelledDataConfig
from adamae_fast.data.batch import Batch
from adamae_fast.data.dataset import DecodeCost
from adamae_fast.train import stalls
from adamae_fast.train.stalls import LoadFigures, StallWatch, advice


def figures(share, **others):
    return {"data_wait_share": share, "batches_ready": 0.0, **others}


def warnings_of(caplog, shares, steps=10, **data):
    """How many steps had been seen at each warning."""
    caplog.clear()
    watch = StallWatch(PretrainConfig(data=DataConfig(**data)), "cpu")
    warned = []
    with caplog.at_level(logging.WARNING, "adamae_fast"):
        for number, share in enumerate(shares, start=1):
            watch.observe(steps, figures(share))
            if len(caplog.records) > len(warned):
                warned.append(number * steps)
    return warned


def test_200_steps_in_a_row_are_one_warning(caplog):
    assert warnings_of(caplog, [0.3] * 60) == [200]
    assert "30 % of the time of the last 200 steps was waiting for data" in caplog.text
    assert warnings_of(caplog, [0.3] * 19 + [0.1] + [0.3] * 19) == []
    assert warnings_of(caplog, [0.3] * 19 + [0.1] + [0.2] * 20) == [400]
    assert "20 % of the time of the last 200 steps" in caplog.text
    assert warnings_of(caplog, [0.11] * 3, steps=1000) == [1000]


def test_the_knob_follows_from_what_is_known(monkeypatch, caplog):
    def knob(device="cuda", num_cores=8, decoded_frames=61.0, dali_share=None, **data):
        metrics = figures(0.5, decoded_frames=decoded_frames)
        if dali_share is not None:
            metrics["dali_share"] = dali_share
        return advice(PretrainConfig(data=DataConfig(**data)), device, metrics, num_cores)

    assert knob(num_workers=2) == "raise data.num_workers=2: this process may use 8 cores"
    assert "data.repeat=2 or 4" in knob(num_workers=8)
    # 16 frames, 4 apart, span 61; half a group of 250 is decoded in front of them.
    long_way = knob(num_workers=8, repeat=4, decoded_frames=186 / 4)
    assert (
        "data prepare: key frames are so far apart that 186 frames are decoded for a clip, which spans 61" in long_way
    )
    # Frames of all of a video are meant to be far apart.
    segments = FinetuneConfig(data=LabelledDataConfig(sampling="segments", num_workers=8, repeat=4))
    assert "data.decoder=dali" in advice(segments, "cuda", figures(0.5, decoded_frames=186 / 4), 8)
    assert "data.decoder=dali" in knob(num_workers=8, repeat=4, decoded_frames=70 / 4)
    assert "data prepare: smaller pictures" in knob("cpu", num_workers=9, repeat=4, decoded_frames=70 / 4)
    assert "--codec h264: DALI decodes only 40% of them" in knob(decoder="dali", dali_share=0.4)
    assert "--codec vp9: DALI decodes only 0% of them" in knob("cpu", decoder="dali", dali_share=0.0)
    assert "data.repeat=2 or 4" in knob(decoder="dali", dali_share=0.9)
    monkeypatch.setattr(stalls, "num_usable_cores", lambda: 5)
    warnings_of(caplog, [1.0], steps=200, num_workers=3)
    assert "data.num_workers=3: this process may use 5 cores" in caplog.text


def test_figures_are_means_over_clips_and_batches():
    def batch(clips, decode, ready):
        return Batch(torch.zeros(clips, 3, 2, 8, 8, dtype=torch.uint8), [], decode, ready)

    load = LoadFigures()
    load.add(batch(4, DecodeCost(2.0, 60), 3))
    load.add(batch(1, DecodeCost(0.5, 40), 0))
    assert load.lap() == {"batches_ready": 1.5, "decode_seconds": 0.5, "decoded_frames": 20.0}
    load.add(batch(4, None, 2))
    assert load.lap() == {"batches_ready": 2.0}
    assert load.lap() == {"batches_ready": 0.0}
