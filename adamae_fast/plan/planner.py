"""A plan: what a run takes, figure by figure, and for each whether it was measured or is modelled."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from adamae_fast.config import PretrainConfig, Recompute
from adamae_fast.config_distributed import check_world, distributed_without_effect
from adamae_fast.plan import network, work
from adamae_fast.plan.calibration import Calibration
from adamae_fast.plan.decoding import clip_cost
from adamae_fast.plan.estimate import (
    Basis,
    Range,
    is_measured_model,
    measured_step,
    memory_of,
    step_times,
    usable_bytes,
)
from adamae_fast.plan.hardware import GPUS
from adamae_fast.plan.options import PlanOptions
from adamae_fast.plan.shares import STATES, Parameters, gathered_bytes, gradient_bytes, share_of, state_bytes
from adamae_fast.train.schedule import Schedule

FEW_SECONDS = 300
"""Between two checkpoints; more often costs more than it saves."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number, or the two ends of a range."""

    group: str
    name: str
    value: float
    high: float | None = None
    """The other end, where the model has two."""
    unit: str = ""
    basis: Basis
    how: str = ""


def shown(figure: Figure) -> str:
    """Value or range, and the unit."""
    ends = [_digits(x) for x in (figure.value, figure.high) if x is not None]
    if len(ends) == 2 and ends[0] == ends[1]:
        ends.pop()
    return " ".join(filter(None, [" – ".join(ends), figure.unit]))


def _digits(value: float) -> str:
    """Three figures that count; whole numbers whole."""
    if float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All figures by their key, and what to look at before paying."""

    title: str
    figures: dict[str, Figure]
    warnings: list[str] = field(default_factory=list)

    def value(self, key: str) -> float:
        """Of a figure; the first end of a range."""
        return self.figures[key].value


def make_plan(config: PretrainConfig, options: PlanOptions, calibration: Calibration) -> Plan:
    """All figures of the recipe on these machines.

    Raises ValueError, with the remedy, for a batch that does not fit into the memory and for a precision that the model
    of time does not know.
    """
    check_world(config, options.num_gpus)
    if config.train.precision == "fp32":
        raise ValueError("train.precision='fp32': plans model products of 16 bits; choose bf16 or fp16")
    plan = _Builder(config, options, calibration)
    plan.run()
    plan.memory()
    plan.time()
    plan.data()
    plan.storage()
    plan.cost()
    return plan.done()


class _Builder:
    """Adds the figures group by group; later groups build upon earlier ones."""

    def __init__(self, config: PretrainConfig, options: PlanOptions, calibration: Calibration) -> None:
        self.config, self.options, self.calibration = config, options, calibration
        self.gpu = GPUS[options.gpu]
        self.parameters = Parameters.of(config)
        self.clip = clip_cost(calibration, options, config.model, config.data)
        self.figures: dict[str, Figure] = {}
        self.warnings: list[str] = [*config.without_effect(), *distributed_without_effect(config, options.num_gpus)]
        self.group = ""

    def add(
        self, key: str, name: str, value: float | Range, unit: str, basis: Basis, how: str = "", scale: float = 1.0
    ) -> None:
        """Put a figure in the current group, divided by ``scale``."""
        ends = (value.fast, value.slow) if isinstance(value, Range) else (value, value)
        low, high = sorted(end / scale for end in ends)
        self.figures[key] = Figure(
            group=self.group, name=name, value=low, high=high if high > low else None, unit=unit, basis=basis, how=how
        )

    def run(self) -> None:
        self.group = "run"
        train, num_gpus = self.config.train, self.options.num_gpus
        schedule = Schedule.from_config(self.config, self.options.videos.num_videos, num_gpus)
        self.total_batch, self.num_steps = schedule.total_batch, schedule.total_steps
        num_clips = self.options.videos.num_videos * self.config.data.repeat
        if self.total_batch > num_clips:
            raise ValueError(
                f"train.batch_size={train.batch_size}: {self.total_batch} clips in a step on {num_gpus} GPUs, but an "
                f"epoch has {num_clips}; choose a smaller batch"
            )
        self.epochs = self.num_steps / schedule.steps_per_epoch
        flops = work.step_flops(self.config.model, self.config.mask)
        sizes = work.sizes_of(self.config.model, self.config.mask)
        self.add("parameters", "parameters", self.parameters.total, "", "exact")
        self.add("visible_tokens", "visible tokens of a clip", sizes.num_visible, f"of {sizes.num_tokens}", "exact")
        self.add("clip_flops", "operations of a clip", flops, "GFLOP", "exact", "forward and backward", 1e9)
        how = f"{train.batch_size} × {train.accumulate} passes × {num_gpus} GPUs, repeated crops counted"
        self.add("total_batch", "clips of a step", self.total_batch, "", "exact", how)
        how = f"{self.epochs:.4g} epochs of {schedule.steps_per_epoch:.4g}"
        self.add("steps", "steps", self.num_steps, "", "exact", how)

    def memory(self) -> None:
        self.group = "memory of a GPU"
        train, mask, model = self.config.train, self.config.mask, self.config.model
        how = "a formula that equals what saved-tensor hooks count (tests/bench/test_predict.py)"
        kept = work.kept_bytes(model, mask, train.recompute, "bf16").total()
        if train.compile:
            how = "without compilation, which keeps less"
        by_hooks: Basis = "modelled" if train.compile else "measured"
        self.add("kept_bytes", "kept for the backward, a clip", kept, "MB", by_hooks, how, 1e6)
        num_gpus = self.options.num_gpus
        memory = memory_of(self.config, self.parameters, num_gpus, train.recompute)
        found = measured_step(self.calibration, self.options, self.config)
        total: float = memory.of(train.batch_size)
        basis: Basis = "modelled"
        how = f"{memory.fixed / 1e9:.2f} GB whatever the batch, {memory.per_clip / 1e6:.0f} MB a clip"
        is_whole = num_gpus == 1 or self.config.distributed.mode == "ddp"  # as where it was measured
        if found is not None and is_whole and is_measured_model(model, mask) and found.batch == train.batch_size:
            total, basis, how = found.allocated_bytes, "measured", f"{found.source}, {found.arm}, one GPU"
        states = state_bytes(self.config, self.parameters, num_gpus, rank=0)
        self.add("state_bytes", "weights, gradients, moments", states, "GB", "exact", self._who_has_most(), 1e9)
        self.add("memory_bytes", "allocated peak", total, "GB", basis, how, 1e9)
        largest = memory.largest_batch(self.gpu, self.config.data.repeat)
        usable = usable_bytes(self.gpu)
        how = f"{usable / 1e9:.0f} of {self.gpu.memory / 1e9:.0f} GB; the rest: context, libraries, gaps"
        self.add("largest_batch", "largest batch that fits", largest, "clips", "modelled", how)
        if train.batch_size > largest:
            others: dict[Recompute, int] = {
                policy: memory_of(self.config, self.parameters, num_gpus, policy).largest_batch(
                    self.gpu, self.config.data.repeat
                )
                for policy in work.BLOCK_ELEMENTS
            }
            remedies = ", ".join(f"{clips} with train.recompute={policy}" for policy, clips in others.items())
            raise ValueError(
                f"train.batch_size={train.batch_size}: needs {total / 1e9:.0f} GB of the {usable / 1e9:.0f} GB that a "
                f"process can use of an {self.options.gpu}; what fits: {remedies}; train.accumulate keeps the total"
            )

    def _who_has_most(self) -> str:
        if self.config.distributed.mode == "ddp" or self.options.num_gpus == 1:
            return "all of them, in fp32"
        shapes, size = self.parameters.shapes, self.options.num_gpus
        last = STATES * share_of(shapes, size, size - 1)
        return f"the first process has most, the last one {last / 1e9:.3g} GB"

    def time(self) -> None:
        self.group = "time of a step"
        train, options = self.config.train, self.options
        one_pass, update, basis, how = step_times(self.calibration, options, self.config, self.parameters.total)
        alone = one_pass.map(train.accumulate).plus(update)
        self.add("step_alone", "computation", alone, "ms", basis if train.accumulate == 1 else "modelled", how, 1e-3)
        traffic = [self._traffic(end) for end in (one_pass.fast, one_pass.slow)]
        seconds = Range(fast=traffic[0].seconds, slow=traffic[1].seconds)
        exposed = Range(fast=traffic[0].exposed_seconds, slow=traffic[1].exposed_seconds)
        self.step = alone.plus(exposed)
        rate = network.ring_rate(self.gpu, options.num_nodes, options.node_network_gbit)
        way = "NVLink" if options.num_nodes == 1 else f"{options.num_nodes} nodes"
        how = f"ring at {rate / 1e9:.0f} GB/s, {way}"
        sent = traffic[0].sent_bytes
        self.add("sent_bytes", "sent by a GPU", sent, "GB", "exact", self._what_is_sent(), 1e9)
        self.add("network", "its time alone", seconds, "ms", "modelled", how, 1e-3)
        self.add("exposed", "of that not behind the backward", exposed, "ms", "modelled", "", 1e-3)
        self.add("step", "step", self.step, "ms", "modelled" if options.num_gpus > 1 else basis, "", 1e-3)
        clips = train.batch_size * train.accumulate
        self.rate = self.step.per_second(clips)
        self.add("clips_per_s", "clips of a GPU", self.rate, "clips/s", "modelled", "computation and network")
        flops = work.step_flops(self.config.model, self.config.mask)
        self.add("mfu", "of the stated peak", self.rate.map(100 * flops / self.gpu.peak), "%", "modelled")
        if exposed.fast > 0.1 * self.step.fast:
            self.warnings.append(
                f"the GPUs wait {exposed.fast / self.step.fast:.0%} of a step for the network: a faster one, a larger "
                "--batch, or more passes before an update (train.accumulate)"
            )

    def _traffic(self, pass_seconds: float) -> network.Traffic:
        config, options, parameters = self.config, self.options, self.parameters
        rate = network.ring_rate(self.gpu, options.num_nodes, options.node_network_gbit)
        gradients = gradient_bytes(config, parameters)
        if config.distributed.mode == "ddp" or options.num_gpus == 1:
            return network.ddp_traffic(options.num_gpus, gradients, rate, pass_seconds)
        return network.fsdp_traffic(
            options.num_gpus,
            gathered_bytes(config, parameters),
            gradients,
            parameters.largest_block / parameters.total,
            rate,
            pass_seconds,
            config.train.accumulate,
        )

    def _what_is_sent(self) -> str:
        distributed = self.config.distributed
        gradients = f"{'bf16' if distributed.gradient_compression == 'bf16' else 'fp32'} gradients, once for each step"
        return f"weights twice for each pass; {gradients}" if distributed.mode == "fsdp2" else gradients

    def data(self) -> None:
        self.group = "data path"
        config, clip, options = self.config, self.clip, self.options
        basis: Basis = "measured" if clip.measured else "modelled"
        repeat = f", {config.data.repeat} crops of a range" if config.data.repeat > 1 else ""
        self.add("clip_frames", "decoded for a clip", clip.frames, "frames", basis, f"{options.files} videos{repeat}")
        frames = self.rate.map(clip.frames)
        self.add("decode_rate", "to be decoded for a GPU", frames, "frames/s", "modelled")
        pixels = work.sizes_of(config.model, config.mask).pixels
        self.add("upload", "uploaded to a GPU", self.rate.map(pixels), "GB/s", "modelled", "uint8 clips", 1e9)
        read = self.rate.map(clip.read_bytes * min(options.num_gpus, options.gpus_per_node))
        self.add("read", "read by a node", read, "GB/s", "modelled", "every video is read whole", 1e9)
        self.fed = math.inf
        if config.data.decoder == "dali":
            engines = frames.map(1 / self.gpu.decoders)
            how = f"{self.gpu.decoders} engines; what one delivers: not measured"
            self.add("engine_rate", "to be decoded by an NVDEC engine", engines, "frames/s", "modelled", how)
            self.warnings.append("data.decoder=dali: what NVDEC delivers was not measured, and no hours take it in")
        else:
            decoder = "decord" if config.data.decoder == "decord" else "pyav"
            how = f"{decoder}, {clip.source}"
            self.add("clip_cpu", "CPU time of a clip", clip.seconds, "ms", basis, how, 1e-3)
            cores = self.rate.map(clip.seconds)
            self.add("cores", "CPU cores for a GPU", cores, "cores", "modelled", "at the rate of the step")
            workers = max(1, config.data.num_workers)
            self.fed = workers / clip.seconds
            how = f"data.num_workers={config.data.num_workers}, a core for each"
            self.add("fed", "clips that its workers deliver", self.fed, "clips/s", "modelled", how)
            if self.fed < self.rate.fast:
                self._warn_of_data(cores, workers)
        dataset_bytes = options.videos.num_videos * clip.read_bytes * config.data.repeat
        how = f"{options.videos.num_videos} videos like {self.calibration.video_bytes_source}"
        self.add("dataset_bytes", "data set", dataset_bytes, "GB", "modelled", how, 1e9)
        if options.dataset and config.data.stride != options.videos.stride:
            self.warnings.append(
                f"data.stride={config.data.stride}, but the recipe of {options.dataset} has {options.videos.stride}: "
                f"--config configs/pretrain_{options.dataset}_vitb.yaml"
            )

    def _warn_of_data(self, cores: Range, workers: int) -> None:
        remedies = [f"data.num_workers={math.ceil(cores.fast)}"]
        if self.config.data.repeat < 4:
            remedies.append("data.repeat=4")
        if self.options.files == "original":
            remedies.append("adamae-fast data prepare")
        remedies.append("data.decoder=dali")
        self.warnings.append(
            f"the data path is the limit, not the step: {workers} workers feed {self.fed:.0f} clips/s to a GPU that "
            f"takes {self.rate.slow:.0f} to {self.rate.fast:.0f}; one or several of {', '.join(remedies)}"
        )

    def storage(self) -> None:
        self.group = "storage"
        keep = self.config.checkpoint.keep
        checkpoint = 12 * self.parameters.total
        self.add("checkpoint_bytes", "checkpoint", checkpoint, "GB", "exact", "fp32 weights and two moments", 1e9)
        how = f"{keep} are kept, and one is being written"
        self.add("run_bytes", "run", (keep + 1) * checkpoint, "GB", "exact", how, 1e9)
        clips = self.config.train.batch_size * self.config.train.accumulate
        self.paced = Range(fast=max(self.step.fast, clips / self.fed), slow=max(self.step.slow, clips / self.fed))
        every = self.paced.map(self.config.checkpoint.every)
        how = f"checkpoint.every={self.config.checkpoint.every}"
        self.add("checkpoint_minutes", "between two checkpoints", every, "min", "modelled", how, 60)
        if every.slow < FEW_SECONDS < self.paced.slow * self.num_steps:
            enough = math.ceil(FEW_SECONDS / self.paced.slow / 1000) * 1000
            self.warnings.append(f"a checkpoint every {every.slow:.0f} s: checkpoint.every={enough} is often enough")

    def cost(self) -> None:
        self.group = "length and cost"
        options = self.options
        alone, hours = (x.map(self.num_steps / 3600) for x in (self.step, self.paced))
        self.add("hours_alone", "hours, were the data path no limit", alone, "h", "modelled", "steps alone")
        how = "the data path is the limit" if self.paced.fast > self.step.fast else "the step is the limit"
        if self.fed == math.inf:
            how = "without the data path"
        self.add("hours", "hours", hours, "h", "modelled", f"{how}; without start and validation")
        gpu_hours = hours.map(options.num_gpus)
        self.add("gpu_hours", "GPU hours", gpu_hours, "h", "modelled")
        self.add("gpu_hours_per_epoch", "GPU hours of an epoch", gpu_hours.map(1 / self.epochs), "h", "modelled")
        if options.price_per_gpu_hour is not None:
            cost = gpu_hours.map(options.price_per_gpu_hour)
            how = f"{options.price_per_gpu_hour:g} a GPU hour"
            self.add("cost", "cost", cost, "", "modelled", how)
            self.add("cost_per_epoch", "cost of an epoch", cost.map(1 / self.epochs), "", "modelled", how)

    def done(self) -> Plan:
        config, options = self.config, self.options
        model, train = config.model, config.train
        nodes = f"{options.num_nodes} node{'s' * (options.num_nodes > 1)}"
        title = (
            f"{model.size}, {model.num_frames}×{model.frame_size}², {config.mask.strategy} {config.mask.ratio:g}, "
            f"{train.precision}, recompute {train.recompute}; {options.num_gpus} × {options.gpu} in {nodes}, "
            f"{config.distributed.mode if options.num_gpus > 1 else 'one process'}"
        )
        return Plan(title=title, figures=self.figures, warnings=self.warnings)
