// Floating-point numbers as integers of the same order, for host and CUDA.
#pragma once

#include <type_traits>

#include "gumbel.h"

namespace adamae {

// An integer with the order that a descending sort of torch sees: NaN above every number, -0 equal to +0.
template <class C>
ADAMAE_HOST_DEVICE auto ordered(C key) {
  using Bits = std::conditional_t<sizeof(C) == 8, uint64_t, uint32_t>;
  if (key != key) return static_cast<Bits>(~Bits{0});
  key += C{0};  // -0 becomes +0
  Bits bits;
  memcpy(&bits, &key, sizeof bits);
  const Bits sign = Bits{1} << (8 * sizeof bits - 1);
  return bits & sign ? static_cast<Bits>(~bits) : bits | sign;
}

// The number that `ordered` made these bits of.
ADAMAE_HOST_DEVICE float from_ordered(uint32_t bits) {
  bits = bits >> 31 ? bits & 0x7FFFFFFFu : ~bits;
  float number;
  memcpy(&number, &bits, sizeof number);
  return number;
}

}  // namespace adamae
