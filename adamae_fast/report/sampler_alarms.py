"""Has the sampler collapsed, or does it not learn? Told from the lines of metrics.jsonl alone.

So a run warns while it goes on, and its report tells the same afterwards, however often the run was resumed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from adamae_fast.config import PretrainConfig
from adamae_fast.model.adamae import AdaMAE
from adamae_fast.ops.sampling_loss import PROBABILITY_EPS
from adamae_fast.report.figures import finite

REPORTS_IN_A_ROW = 3
"""Reports, one after another, that an alarm takes: one batch alone says little."""

MANY_CLAMPED = 0.5
"""Of a larger share of the masked tokens, the sampling loss says nothing."""

ADAM_EPS = 1e-8
"""AdamW divides by the square root of its second moment plus this: a smaller gradient moves less than others."""

VANISHING = ADAM_EPS / 10
"""Below it, an update is less than a tenth of what it would be. The published recipe stays a few times above eps."""


FEWEST = 1.5
"""Tokens that p is to lie on where a single one is drawn: it cannot lie on less than one."""


class Alarm(NamedTuple):
    """What is wrong with a sampler."""

    name: str
    """Which of the alarms: collapsed, clamped or vanishing."""

    step: int
    """Step of the report that completed three in a row."""

    message: str
    """The figure, its value, and the key of the configuration to change."""


def sampler_alarms(lines: Iterable[Mapping[str, Any]], config: PretrainConfig, model: AdaMAE) -> list[Alarm]:
    """Return the first alarm of each kind among the logged ``lines`` of a run, which are in order.

    * collapsed: exp(probability_entropy) below the number of visible tokens (:data:`FEWEST` where that is one), and
      below a quarter of all;
    * clamped: clamped_share above a half;
    * vanishing: the sampler's gradient, as AdamW is given it (after clipping), has a root mean square below a tenth of
      its eps.

    Each takes three lines in a row; a line without the figure, or where it is not finite, is not one of them. There is
    none for a model without a sampler, and none with loss.sampling_weight=0, which leaves it untrained on purpose.
    """
    if model.sampler is None or config.loss.sampling_weight == 0:
        return []
    checks: dict[str, Callable[[Mapping[str, Any], PretrainConfig, AdaMAE], str | None]] = {
        "collapsed": _collapsed,
        "clamped": _clamped,
        "vanishing": _vanishing,
    }
    found: dict[str, Alarm] = {}
    in_a_row = dict.fromkeys(checks, 0)
    for line in lines:
        for name, check in checks.items():
            message = check(line, config, model)
            in_a_row[name] = 0 if message is None else in_a_row[name] + 1
            if message is not None and in_a_row[name] == REPORTS_IN_A_ROW and name not in found:
                found[name] = Alarm(name, int(line["step"]), message)
    return sorted(found.values(), key=lambda alarm: alarm.step)


def _collapsed(line: Mapping[str, Any], config: PretrainConfig, model: AdaMAE) -> str | None:
    entropy = finite(line, "probability_entropy")
    limit = max(FEWEST, min(model.num_visible, model.grid.num_tokens / 4))
    if entropy is None or math.exp(entropy) >= limit:
        return None
    what = "" if limit == FEWEST else " (the visible tokens of a clip, or a quarter of all)"
    return (
        f"the sampler has collapsed: exp(probability_entropy)={math.exp(entropy):.3g}, the number of tokens that its "
        f"probability lies on, is below {limit:g}{what}; {_calm(config)}"
    )


def _clamped(line: Mapping[str, Any], config: PretrainConfig, model: AdaMAE) -> str | None:
    share = finite(line, "clamped_share")
    if share is None or share <= MANY_CLAMPED:
        return None
    return (
        f"the sampler does not learn: clamped_share={share:.3g} of the masked tokens have a probability below "
        f"{PROBABILITY_EPS:.2g}, where the sampling loss has no gradient; {_calm(config)}"
    )


def _vanishing(line: Mapping[str, Any], config: PretrainConfig, model: AdaMAE) -> str | None:
    norm, total, limit = finite(line, "sampler_grad_norm"), finite(line, "grad_norm"), config.optim.clip_grad_norm
    if norm is None or total is None or model.sampler is None:
        return None
    kept = 1.0 if limit is None or total <= limit else limit / total
    size = kept * norm / math.sqrt(sum(parameter.numel() for parameter in model.sampler.parameters()))
    if size >= VANISHING:
        return None
    clipping = "" if kept == 1 else f" or optim.clip_grad_norm={limit:g}"
    return (
        f"the sampler hardly learns: sampler_grad_norm={norm:.3g} is {size:.2g} for a parameter (root mean square), "
        f"below a tenth of AdamW's eps={ADAM_EPS:g}, which damps its updates more than tenfold; raise "
        f"loss.sampling_weight={config.loss.sampling_weight:g}{clipping}"
    )


def _calm(config: PretrainConfig) -> str:
    """What slows the sampler down. Not its loss's weight: AdamW divides a constant factor of a gradient out again."""
    knobs = f"go back to an earlier checkpoint and lower optim.sampler_lr_scale={config.optim.sampler_lr_scale:g}"
    if config.loss.sampling_baseline > 0:
        knobs += f" or loss.sampling_baseline={config.loss.sampling_baseline:g}, which sharpens it"
    if config.model.sampler.kind == "attention":
        knobs += f" or raise model.sampler.dropout={config.model.sampler.dropout:g}"
    return knobs
