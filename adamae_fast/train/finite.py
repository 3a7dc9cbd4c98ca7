"""Stop at the first non-finite number without making the host wait for the device at every step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from adamae_fast.distributed.world import World
from adamae_fast.errors import RunStoppedError


class NonFiniteError(RunStoppedError):
    """A loss, gradient norm or sampler logit stopped being a number."""


def non_finite(step: int, what: str) -> NonFiniteError:
    """The error for step ``step``, counted from 0."""
    return NonFiniteError(
        f"step {step + 1}: a value is not finite ({what}); no parameter was updated with it. "
        "Lower optim.base_lr, set optim.clip_grad_norm, or use train.precision=bf16 in place of fp16, "
        "and resume from the last checkpoint"
    )


class FiniteGuard:
    """Remembers on the device the first step whose values were not finite, and blocks every update from then on.

    The optimizer gets :meth:`found_inf` (fused AdamW skips its update where it is 1), so parameters are never touched
    by a bad step although the host hears of it only at the next :meth:`check`.

    With several processes, all of them observe the same values, so that all block the same step; what each has of its
    own says whose fault it was.
    """

    def __init__(
        self, names: tuple[str, ...], device: torch.device, world: World | None = None, num_common: int = 0
    ) -> None:
        """``num_common`` of the last names are of all processes together, and no process's own."""
        self._names = names
        self._num_own = len(names) - num_common
        self._world = world or World()
        self._bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self._bad_values = torch.zeros(len(names), device=device)
        self._found_inf = torch.zeros((), device=device)

    def observe(self, step: Tensor, values: Tensor, own: Tensor | None = None) -> None:
        """Look at one value per name, a float tensor on the device; ``step`` is an int64 scalar there.

        ``own`` are this process's values where ``values`` are means over all processes.
        """
        is_first_bad = (self._bad_step < 0) & ~values.isfinite().all()
        # Written in place, which a recorded step does again at each replay.
        self._bad_step.copy_(torch.where(is_first_bad, step, self._bad_step))
        self._bad_values.copy_(torch.where(is_first_bad, values if own is None else own, self._bad_values))
        self._found_inf.copy_(self._bad_step >= 0)

    def found_inf(self) -> Tensor:
        """1.0 once any step was bad, else 0.0: always the same tensor, on the device."""
        return self._found_inf

    def check(self) -> None:
        """Wait for the device and raise NonFiniteError that names the step and the values, if there was a bad one.

        It names the processes whose own values were not finite, too, and is raised on all of them.
        """
        step = int(self._bad_step)
        if step < 0:
            return
        all_values = self._world.gather(self._bad_values.tolist())
        told = [self._tell(values) for values in all_values]
        guilty = [r for r, values in enumerate(all_values) if not all(map(math.isfinite, values[: self._num_own]))]
        what = "; ".join(self._world.named(rank, told[rank]) for rank in guilty) or f"of all together, {told[0]}"
        raise self._world.agreed(non_finite(step, what))

    def _tell(self, values: Sequence[float]) -> str:
        """The first value, which is the loss, and those that are not finite."""
        pairs = enumerate(zip(self._names, values, strict=True))
        return ", ".join(f"{name}={v:.6g}" for number, (name, v) in pairs if number == 0 or not math.isfinite(v))
