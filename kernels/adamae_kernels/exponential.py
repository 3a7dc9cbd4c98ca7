"""An exponential for softmax. That of the GPU, which tl.exp takes, is two rounding steps off."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exp_of_negative(x):
    """exp(x) for fp32 x <= 0 or NaN, within a rounding step; 0 where the result is below the smallest normal number.

    exp(x) = 2ⁿ · exp(r), where r = x - n · ln 2 is at most ln 2 / 2: Taylor's series up to r⁷ leaves out less than
    6e-9 of exp(r), a tenth of a rounding step. 1.5 · 2²³ is added to round to an integer, and holds n in its last bits.
    ln 2 is taken in two parts, of which the first has so few digits that its product with n is exact.
    """
    bounded = tl.where(x < -87.33654, -87.33654, x)
    shifted = bounded * 1.4426950 + 12582912.0
    n = shifted - 12582912.0
    r = (bounded - n * 0.693145751953125) - n * 1.4286068203094173e-06
    series = r * 0.0001984127 + 0.0013888889
    series = series * r + 0.008333333
    series = series * r + 0.041666667
    series = series * r + 0.16666667
    series = series * r + 0.5
    series = series * r + 1.0
    series = series * r + 1.0
    power = ((shifted.to(tl.int32, bitcast=True) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < -87.33654, 0.0, series * power)
