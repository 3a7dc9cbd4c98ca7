// Counter-based Gumbel noise, the same bits on every device and in every implementation: plain C++ for host and CUDA.
//
// Formula and reason in adamae_fast/ops/sample_visible.py. Multiplications and additions are rounded one by one there,
// so they must not be contracted here: -ffp-contract=off, and -fmad=false for nvcc.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define ADAMAE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ADAMAE_HOST_DEVICE inline
#endif

namespace adamae {

struct Words {
  uint32_t word[4];
};

// Philox4x32-10 (Salmon et al., 2011) of the counter (block, 0, 0, 0): the random words of tokens 4 · block … + 3.
ADAMAE_HOST_DEVICE Words philox(uint64_t seed, uint32_t block) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = block, c1 = 0, c2 = 0, c3 = 0;
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c0, product1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// 2 · atanh(s) for |s| below 0.18, by its series.
ADAMAE_HOST_DEVICE float twice_atanh(float s) {
  const float z = s * s;
  float sum = 0.11111111f * z + 0.14285715f;
  sum = sum * z + 0.2f;
  sum = sum * z + 0.33333334f;
  sum = sum * z + 1.0f;
  return 2.0f * s * sum;
}

// The natural logarithm of a positive normal number.
ADAMAE_HOST_DEVICE float log_of(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const int32_t exponent = (bits - 0x3F3504F3) >> 23;  // so that the mantissa lies in [√½, √2)
  bits -= exponent * (1 << 23);
  float mantissa;
  memcpy(&mantissa, &bits, sizeof mantissa);
  return static_cast<float>(exponent) * 0.6931472f + twice_atanh((mantissa - 1.0f) / (mantissa + 1.0f));
}

// Gumbel(0, 1) noise from 32 random bits, between -3.1 and 22.2.
ADAMAE_HOST_DEVICE float gumbel(uint32_t bits) {
  const int32_t r = static_cast<int32_t>(bits >> 1);
  const float v = (static_cast<float>(r) + 0.5f) * 0x1p-31f;
  const float u = (static_cast<float>(0x7FFFFFFF - r) + 0.5f) * 0x1p-31f;  // 1 - v, with all its digits
  // Both are computed, so that a compiler can choose without a branch.
  const float near_zero = twice_atanh(v / (2.0f - v)), elsewhere = -log_of(u);
  return -log_of(v < 0.25f ? near_zero : elsewhere);
}

}  // namespace adamae
