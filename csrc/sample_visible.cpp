// sample_visible and split_tokens: formulas in adamae_fast/ops/sample_visible.py.
//
// The K largest keys are found by selection, without a sort; ids come out ascending because they are written in order.
#include <cstring>
#include <functional>

#include "common.h"

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

// An integer with the order that a descending sort of torch sees: NaN above every number, -0 equal to +0.
template <class C>
auto ordered(C key) {
  using Bits = std::conditional_t<sizeof(C) == 8, uint64_t, uint32_t>;
  if (std::isnan(key)) return ~Bits{0};
  key += C{0};  // -0 becomes +0
  Bits bits;
  std::memcpy(&bits, &key, sizeof bits);
  const Bits sign = Bits{1} << (8 * sizeof bits - 1);
  return bits & sign ? ~bits : bits | sign;
}

template <class C>
void sample(const Tensor& logits_BN, const Tensor& noise_BN, int64_t num_visible, const Split& split) {
  const int64_t num_tokens = logits_BN.size(1);
  const auto* logits = data<C>(logits_BN);
  const auto* noise = data<C>(noise_BN);
  // Selection reads a key several times.
  parallel_rows(logits_BN.size(0), 16 * num_tokens, [&](int64_t begin, int64_t end) {
    using Bits = decltype(ordered(C{}));
    std::vector<Bits> keys(num_tokens), scratch(num_tokens);
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t n = 0; n < num_tokens; ++n) {
        keys[n] = ordered(logits[b * num_tokens + n] + noise[b * num_tokens + n]);
      }
      scratch = keys;
      const auto last = scratch.begin() + (num_visible - 1);
      std::nth_element(scratch.begin(), last, scratch.end(), std::greater<>());
      const Bits smallest = *last;
      // Of the keys that equal the smallest visible one, those of the lowest ids are visible.
      int64_t ties = num_visible - std::count_if(scratch.begin(), last, [&](Bits key) { return key > smallest; });
      split.write(b, [&](int64_t n) { return keys[n] > smallest || (keys[n] == smallest && ties-- > 0); });
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> sample_visible(const Tensor& logits, const Tensor& noise, int64_t num_visible) {
  check_dim("logits", logits, 2);
  const int64_t batch_size = logits.size(0), num_tokens = logits.size(1);
  check_shape("noise", noise, {batch_size, num_tokens});
  check(1 <= num_visible && num_visible <= num_tokens, "num_visible=", num_visible, ": choose 1 to ", num_tokens,
        ", the number of tokens");
  for (const auto& [name, tensor] : {std::pair{"logits", logits}, {"noise", noise}}) {
    with_floating_type(name, tensor.scalar_type(), [](auto) {});
  }
  const bool is_double = logits.scalar_type() == ScalarType::Double || noise.scalar_type() == ScalarType::Double;
  const ScalarType compute = is_double ? ScalarType::Double : ScalarType::Float;
  const Tensor logits_BN = contiguous_as(logits, compute), noise_BN = contiguous_as(noise, compute);
  const Split split(logits, batch_size, num_visible, num_tokens);
  is_double ? sample<double>(logits_BN, noise_BN, num_visible, split)
            : sample<float>(logits_BN, noise_BN, num_visible, split);
  return split.tensors();
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
