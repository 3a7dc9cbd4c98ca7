// gather_tokens and its gradient: formulas in adamae_fast/ops/gather_tokens.py.
#include <cstring>

#include "common.h"

namespace adamae {
namespace {

Tensor gather_tokens(const Tensor& tokens, const Tensor& ids, const Tensor&, const Tensor& positions) {
  check_dim("tokens", tokens, 3);
  const int64_t num_tokens = tokens.size(1), width = tokens.size(2);
  const Tensor ids_BK = ascending_ids("ids", ids, tokens.size(0), num_tokens);
  const int64_t num_visible = ids_BK.size(1);
  check_shape("positions", positions, {num_tokens, width});
  // Few tokens are taken, so a copy of all of them is avoided wherever rows are contiguous.
  const Tensor tokens_BND = tokens.stride(2) == 1 ? tokens : row_major(tokens);
  const Tensor positions_ND = row_major_as(positions, accumulate_type(tokens.scalar_type()));
  Tensor out_BKD = torch::stable::new_empty(tokens, {tokens.size(0), num_visible, width});
  with_floating_type("tokens", tokens.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using C = Compute<T>;
    const auto* chosen = data<int64_t>(ids_BK);
    const auto* all_tokens = data<T>(tokens_BND);
    const auto* all_positions = data<C>(positions_ND);
    auto* out = mutable_data<T>(out_BKD);
    const int64_t stride_b = tokens_BND.stride(0), stride_n = tokens_BND.stride(1);
    parallel_rows(ids_BK.numel(), width, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* token = all_tokens + i / num_visible * stride_b + chosen[i] * stride_n;
        const C* position = all_positions + chosen[i] * width;
        for (int64_t d = 0; d < width; ++d) {
          out[i * width + d] = static_cast<T>(static_cast<C>(token[d]) + position[d]);
        }
      }
    });
  });
  return out_BKD;
}

Tensor gather_tokens_backward(const Tensor& grad, const Tensor& slots) {
  check_dim("grad", grad, 3);
  check_dim("slots", slots, 2);
  const int64_t num_visible = grad.size(1), width = grad.size(2), num_tokens = slots.size(1);
  const Tensor slots_BN = checked_ids("slots", slots, grad.size(0), num_tokens);
  const Tensor grad_BKD = row_major(grad);
  Tensor out_BND = torch::stable::new_empty(grad, {grad.size(0), num_tokens, width});
  with_floating_type("grad", grad.scalar_type(), [&](auto type) {
    using T = decltype(type);
    if (width == 0) return;  // memset takes no null pointer, even for no bytes
    const auto* places = data<int64_t>(slots_BN);
    const auto* rows = data<T>(grad_BKD);
    auto* out = mutable_data<T>(out_BND);
    parallel_rows(slots_BN.numel(), width, [&](int64_t begin, int64_t end) {
      int64_t i = begin;
      while (i < end) {
        if (places[i] < num_visible) {
          std::copy_n(rows + (i / num_tokens * num_visible + places[i]) * width, width, out + i * width);
          ++i;
          continue;
        }
        // A run of masked tokens is one long fill, which is faster than a fill for each row.
        const int64_t first = i;
        while (i < end && places[i] >= num_visible) ++i;
        std::memset(out + first * width, 0, (i - first) * width * sizeof(T));
      }
    });
  });
  return out_BND;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adamae_fast, CPU, m) {
  m.impl("gather_tokens", TORCH_BOX(&gather_tokens));
  m.impl("gather_tokens_backward", TORCH_BOX(&gather_tokens_backward));
}

}  // namespace adamae
