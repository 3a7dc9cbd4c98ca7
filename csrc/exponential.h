// An exponential for softmax, which a compiler vectorises.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace adamae {

inline double exp_of_negative(double x) { return std::exp(x); }

// exp(x) for x <= 0 or NaN, in plain arithmetic that the compiler vectorises, as it cannot a call of std::exp. At most
// one rounding step off; 0 where the result is below the smallest normal number.
//
// exp(x) = 2^n · exp(r), where r = x - n · ln 2 is at most ln 2 / 2: Taylor's series up to r^7 leaves out less than
// 6e-9 of exp(r), a tenth of a rounding step. 1.5 · 2^23 is added to round to an integer, and holds n in its last bits.
inline float exp_of_negative(float x) {
  constexpr float kRound = 12582912.0f, kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f, kSmallest = -87.33654f;
  const float shifted = std::fma(x, 0x1.715476p0f, kRound), n = shifted - kRound;
  const float r = std::fma(-n, kLn2Low, std::fma(-n, kLn2High, x));
  float series = std::fma(1.0f / 5040, r, 1.0f / 720);
  series = std::fma(series, r, 1.0f / 120);
  series = std::fma(series, r, 1.0f / 24);
  series = std::fma(series, r, 1.0f / 6);
  series = std::fma(series, r, 0.5f);
  series = std::fma(series, r, 1.0f);
  series = std::fma(series, r, 1.0f);
  // Unsigned, because a NaN's bits may be the largest integer.
  const float power = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) + 127u) << 23);
  return x < kSmallest ? 0.0f : series * power;
}

}  // namespace adamae
