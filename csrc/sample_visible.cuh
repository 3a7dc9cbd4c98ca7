// The kernel of sample_visible on the GPU; formulas in adamae_fast/ops/sample_visible.py.
//
// One block draws for one clip, with every key in a register, and nothing is sorted. The K-th key is found eight bits at
// a time: the threads count how often each digit occurs, and each warp looks for the digit in the counts by itself, so
// that a round needs one barrier. One prefix sum then gives every token its place. Six barriers in all.
//
// It includes no header of CUDA's: tests/kernels/emulated_block.cpp runs it on the host.
#pragma once

#include "gumbel.h"
#include "ordered.h"

namespace adamae {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr int kRounds = 4, kDigits = 256;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// How a clip is spread over the threads of its block.
constexpr int64_t kMaxTokens = 8 * kMaxThreads;
constexpr int tokens_of_thread(int64_t num_tokens) { return num_tokens <= 4 * kMaxThreads ? 4 : 8; }
constexpr unsigned threads_of_block(int64_t num_tokens) {
  const int64_t of_warp = kWarp * tokens_of_thread(num_tokens), num_warps = (num_tokens + of_warp - 1) / of_warp;
  return kWarp * static_cast<unsigned>(num_warps < 8 ? 8 : num_warps);
}

__device__ inline float sum_over_warp(float value) {
#pragma unroll
  for (int distance = kWarp / 2; distance; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

// The sum of this lane's value and of those of the lanes below.
__device__ inline uint32_t sum_up_to_lane(uint32_t value) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const uint32_t below = __shfl_up_sync(kAllLanes, value, distance);
    if (lane >= distance) value += below;
  }
  return value;
}

// Of numbers whose digit d occurs counts[d] times, the digit of the one at place `rank` in ascending order, from 1;
// `rank` becomes its place among those of this digit. Called by whole warps, each lane of which gets the result.
__device__ inline uint32_t digit_at(const uint32_t* counts, uint32_t& rank) {
  constexpr int kEach = kDigits / kWarp;
  struct alignas(16) Counts {
    uint32_t of[kEach];
  };
  const int lane = threadIdx.x % kWarp;
  const Counts mine = reinterpret_cast<const Counts*>(counts)[lane];
  uint32_t sum = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) sum += mine.of[i];
  const uint32_t up_to = sum_up_to_lane(sum);
  // All of the search is done by every lane, on its own digits; the lane that holds the place has the answer.
  const int holder = __ffs(__ballot_sync(kAllLanes, up_to >= rank)) - 1;
  uint32_t digit = kEach * lane, below = up_to - sum;
  bool is_past = true;
#pragma unroll
  for (int i = 0; i < kEach - 1; ++i) {
    is_past = is_past && below + mine.of[i] < rank;
    if (is_past) below += mine.of[i], ++digit;
  }
  rank -= __shfl_sync(kAllLanes, below, holder);
  return __shfl_sync(kAllLanes, digit, holder);
}

// Thread t holds the tokens kTokens · t and following; a block has at least num_tokens / kTokens threads.
template <class T, int kTokens>
__global__ void __launch_bounds__(kMaxThreads)
    sample_visible_kernel(const T* logits, const int64_t* seeds, int num_tokens, int num_visible, int64_t* visible_ids,
                          int64_t* masked_ids, int64_t* slots, float* statistics) {
  static_assert(kTokens % 4 == 0, "a thread uses all four words of each random block");
  alignas(16) __shared__ uint32_t counts[kRounds][kDigits];
  __shared__ uint32_t largest_of_warp[kWarp], split_of_warp[kWarp];
  __shared__ float sum_of_warp[kWarp], weighted_of_warp[kWarp];
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp, num_warps = blockDim.x / kWarp;
  const int64_t clip = blockIdx.x;
  const int first = kTokens * thread;

  for (int i = thread; i < kRounds * kDigits; i += blockDim.x) counts[i / kDigits][i % kDigits] = 0;
  float logit[kTokens];
  uint32_t largest_bits = 0;
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    if (first + i >= num_tokens) break;
    logit[i] = static_cast<float>(logits[clip * num_tokens + first + i]);
    const uint32_t bits = ordered(logit[i]);
    if (bits > largest_bits) largest_bits = bits;
  }
  largest_bits = __reduce_max_sync(kAllLanes, largest_bits);
  if (lane == 0) largest_of_warp[warp] = largest_bits;

  // Bits that ascend while keys descend; those past the last token come after all others.
  uint32_t place[kTokens];
#pragma unroll
  for (int block = 0; block < kTokens / 4; ++block) {
    const Words random = philox(static_cast<uint64_t>(seeds[clip]), first / 4 + block);
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const int i = 4 * block + word;
      place[i] = first + i < num_tokens ? ~ordered(logit[i] + gumbel(random.word[word])) : ~0u;
    }
  }
  __syncthreads();

  const float largest = from_ordered(__reduce_max_sync(kAllLanes, lane < num_warps ? largest_of_warp[lane] : 0));
  float sum = 0, weighted = 0;
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    if (first + i >= num_tokens) break;
    const float below = logit[i] - largest, weight = expf(below);
    sum += weight;
    weighted += below * weight;  // 0 · -inf is NaN, as it should be
  }
  sum = sum_over_warp(sum);
  weighted = sum_over_warp(weighted);
  if (lane == 0) sum_of_warp[warp] = sum, weighted_of_warp[warp] = weighted;

  // The last visible key: its digits so far, and its place among the keys that have them.
  uint32_t last = 0, rank = num_visible;
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int shift = 24 - 8 * round;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (round == 0 || place[i] >> (shift + 8) == last) atomicAdd(&counts[round][place[i] >> shift & 0xFF], 1u);
    }
    __syncthreads();
    last = last << 8 | digit_at(counts[round], rank);
  }

  if (warp == 0) {
    sum = sum_over_warp(lane < num_warps ? sum_of_warp[lane] : 0);
    weighted = sum_over_warp(lane < num_warps ? weighted_of_warp[lane] : 0);
    const float log_sum = logf(sum);
    if (lane < 3) {
      statistics[3 * clip + lane] = lane == 0 ? largest : lane == 1 ? largest + log_sum : log_sum - weighted / sum;
    }
  }

  // Counts of keys before the last visible one and of its equals, in the two halves of a word; of the equals, the first
  // `rank` are visible.
  uint32_t split = 0;
#pragma unroll
  for (int i = 0; i < kTokens; ++i) split += place[i] < last ? 1u << 16 : place[i] == last;
  uint32_t up_to = sum_up_to_lane(split);
  if (lane == kWarp - 1) split_of_warp[warp] = up_to;
  __syncthreads();
  up_to += __reduce_add_sync(kAllLanes, lane < warp ? split_of_warp[lane] : 0);

  uint32_t before = (up_to - split) >> 16, equal = (up_to - split) & 0xFFFF;
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    const int token = first + i;
    if (token >= num_tokens) break;
    const int num_visible_before = before + (equal < rank ? equal : rank);
    const bool is_visible = place[i] < last || (place[i] == last && equal < rank);
    const int slot = is_visible ? num_visible_before : num_visible + token - num_visible_before;
    slots[clip * num_tokens + token] = slot;
    if (is_visible) {
      visible_ids[clip * num_visible + slot] = token;
    } else {
      masked_ids[clip * (num_tokens - num_visible) + slot - num_visible] = token;
    }
    before += place[i] < last;
    equal += place[i] == last;
  }
}

}  // namespace adamae
