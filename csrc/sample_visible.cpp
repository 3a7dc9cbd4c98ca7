// sample_visible and split_tokens: formulas in adamae_fast/ops/sample_visible.py.
//
// The K largest keys are found by selection, without a sort; ids come out ascending because they are written in order.
#include <functional>

#include "common.h"
#include "exponential.h"
#include "gumbel.h"
#include "ordered.h"

namespace adamae {
namespace {

struct Split {
  Tensor visible_ids_BK, masked_ids_BM, slots_BN;

  Split(const Tensor& like, int64_t batch_size, int64_t num_visible, int64_t num_tokens)
      : visible_ids_BK(torch::stable::new_empty(like, {batch_size, num_visible}, ScalarType::Long)),
        masked_ids_BM(torch::stable::new_empty(like, {batch_size, num_tokens - num_visible}, ScalarType::Long)),
        slots_BN(torch::stable::new_empty(like, {batch_size, num_tokens}, ScalarType::Long)) {}

  // Writes the ids of one clip; exactly K tokens n have is_visible(n), which is asked once for each, in order.
  template <class IsVisible>
  void write(int64_t clip, const IsVisible& is_visible) const {
    const int64_t num_visible = visible_ids_BK.size(1), num_masked = masked_ids_BM.size(1);
    auto* visible = mutable_data<int64_t>(visible_ids_BK) + clip * num_visible;
    auto* masked = mutable_data<int64_t>(masked_ids_BM) + clip * num_masked;
    auto* slots = mutable_data<int64_t>(slots_BN) + clip * (num_visible + num_masked);
    int64_t num_visible_before = 0;
    for (int64_t n = 0; n < num_visible + num_masked; ++n) {
      const int64_t num_masked_before = n - num_visible_before;
      if (is_visible(n)) {
        slots[n] = num_visible_before;
        visible[num_visible_before++] = n;
      } else {
        slots[n] = num_visible + num_masked_before;
        masked[num_masked_before] = n;
      }
    }
  }

  std::tuple<Tensor, Tensor, Tensor> tensors() const { return {visible_ids_BK, masked_ids_BM, slots_BN}; }
};

// Random bits of kLanes blocks of four tokens at a time: as many as a vector register holds.
constexpr int64_t kLanes = 8;

// Writes the noise of a clip's tokens, rounded up to whole groups of 4 · kLanes.
void draw_noise(uint64_t seed, int64_t num_tokens, float* noise) {
  for (int64_t first = 0; first < num_tokens; first += 4 * kLanes) {
    uint32_t words[4][kLanes];
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const Words random = philox(seed, static_cast<uint32_t>(first / 4 + lane));
      for (int64_t i = 0; i < 4; ++i) words[i][lane] = random.word[i];
    }
    for (int64_t i = 0; i < 4; ++i) {
      float group[kLanes];
#pragma omp simd
      for (int64_t lane = 0; lane < kLanes; ++lane) group[lane] = gumbel(words[i][lane]);
      for (int64_t lane = 0; lane < kLanes; ++lane) noise[first + 4 * lane + i] = group[lane];
    }
  }
}

template <class T, class C>
void describe(const T* logits, int64_t num_tokens, C* statistics) {
  C largest = static_cast<C>(logits[0]);
#pragma omp simd reduction(max : largest)
  for (int64_t n = 0; n < num_tokens; ++n) {
    const C logit = static_cast<C>(logits[n]);
    largest = largest < logit ? logit : largest;
  }
  double sum = 0, weighted = 0;
#pragma omp simd reduction(+ : sum, weighted)
  for (int64_t n = 0; n < num_tokens; ++n) {
    const C below = static_cast<C>(logits[n]) - largest;
    const C weight = exp_of_negative(below);
    sum += weight;
    weighted += below * weight;  // 0 · -inf is NaN, as it should be
  }
  statistics[0] = largest;
  statistics[1] = static_cast<C>(static_cast<double>(largest) + std::log(sum));
  statistics[2] = static_cast<C>(std::log(sum) - weighted / sum);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sample_visible(const Tensor& logits, const Tensor& seeds,
                                                          int64_t num_visible) {
  check_dim("logits", logits, 2);
  const int64_t batch_size = logits.size(0), num_tokens = logits.size(1);
  check(seeds.scalar_type() == ScalarType::Long, "seeds is ", torch::headeronly::toString(seeds.scalar_type()),
        "; pass int64 seeds");
  check_shape("seeds", seeds, {batch_size});
  check(1 <= num_visible && num_visible <= num_tokens, "num_visible=", num_visible, ": choose 1 to ", num_tokens,
        ", the number of tokens");
  const Tensor logits_BN = row_major(logits), seeds_B = row_major(seeds);
  const Split split(logits, batch_size, num_visible, num_tokens);
  Tensor statistics_B3 =
      torch::stable::new_empty(logits, {batch_size, int64_t{3}}, accumulate_type(logits.scalar_type()));
  with_floating_type("logits", logits.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using C = Compute<T>;
    using Bits = decltype(ordered(C{}));
    // Noise, logarithms and selection visit a token several times.
    parallel_rows(batch_size, 16 * num_tokens, [&](int64_t begin, int64_t end) {
      std::vector<float> noise((num_tokens + 4 * kLanes - 1) / (4 * kLanes) * (4 * kLanes));
      std::vector<Bits> keys(num_tokens), scratch(num_tokens);
      for (int64_t b = begin; b < end; ++b) {
        const T* row = data<T>(logits_BN) + b * num_tokens;
        draw_noise(static_cast<uint64_t>(data<int64_t>(seeds_B)[b]), num_tokens, noise.data());
        for (int64_t n = 0; n < num_tokens; ++n) keys[n] = ordered(static_cast<C>(row[n]) + noise[n]);
        scratch = keys;
        const auto last = scratch.begin() + (num_visible - 1);
        std::nth_element(scratch.begin(), last, scratch.end(), std::greater<>());
        const Bits smallest = *last;
        // Of the keys that equal the smallest visible one, those of the lowest ids are visible.
        int64_t ties = num_visible - std::count_if(scratch.begin(), last, [&](Bits key) { return key > smallest; });
        split.write(b, [&](int64_t n) { return keys[n] > smallest || (keys[n] == smallest && ties-- > 0); });
        describe(row, num_tokens, mutable_data<C>(statistics_B3) + 3 * b);
      }
    });
  });
  return {split.visible_ids_BK, split.masked_ids_BM, split.slots_BN, statistics_B3};
}

std::tuple<Tensor, Tensor, Tensor> split_tokens(const Tensor& visible_ids, int64_t num_tokens) {
  check_dim("visible_ids", visible_ids, 2);
  const int64_t batch_size = visible_ids.size(0), num_visible = visible_ids.size(1);
  const Tensor ids_BK = checked_ids("visible_ids", visible_ids, batch_size, num_tokens);
  check(num_visible <= num_tokens, "num_visible=", num_visible, ": choose 1 to ", num_tokens, ", the number of tokens");
  const Split split(visible_ids, batch_size, num_visible, num_tokens);  // first: torch refuses sizes that overflow
  std::vector<uint8_t> is_visible(batch_size * num_tokens);
  const auto* ids = data<int64_t>(ids_BK);
  for (int64_t i = 0; i < ids_BK.numel(); ++i) {
    uint8_t& flag = is_visible[i / num_visible * num_tokens + ids[i]];
    check(!flag, "visible_ids names a token twice in one clip; pass distinct ids");
    flag = 1;
  }
  parallel_rows(batch_size, num_tokens, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      split.write(b, [&](int64_t n) { return is_visible[b * num_tokens + n] != 0; });
    }
  });
  return split.tensors();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adamae_fast, CPU, m) {
  m.impl("sample_visible", TORCH_BOX(&sample_visible));
  m.impl("split_tokens", TORCH_BOX(&split_tokens));
}

}  // namespace adamae
