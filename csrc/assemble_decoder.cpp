// assemble_decoder and its gradient: formulas in adamae_fast/ops/assemble_decoder.py.
#include "common.h"

namespace adamae {
namespace {

// Columns of the mask token's gradient that one thread sums: whole cache lines, and few enough accumulators.
constexpr int64_t kColumns = 64;

Tensor assemble_decoder(const Tensor& visible, const Tensor& mask_token, const Tensor& positions,
                        const Tensor& visible_ids, const Tensor& masked_ids) {
  check_dim("visible", visible, 3);
  check_dim("positions", positions, 2);
  const int64_t batch_size = visible.size(0), num_visible = visible.size(1), width = visible.size(2);
  const int64_t num_tokens = positions.size(0);
  check_shape("mask_token", mask_token, {width});
  check_shape("positions", positions, {num_tokens, width});
  check_shape("visible_ids", visible_ids, {batch_size, num_visible});
  const Tensor visible_ids_BK = ascending_ids("visible_ids", visible_ids, batch_size, num_tokens);
  const Tensor masked_ids_BM = ascending_ids("masked_ids", masked_ids, batch_size, num_tokens);
  const int64_t num_masked = masked_ids_BM.size(1), num_rows = num_visible + num_masked;
  const ScalarType compute = accumulate_type(visible.scalar_type());
  const Tensor visible_BKE = row_major(visible);
  const Tensor mask_token_E = row_major_as(mask_token, compute), positions_NE = row_major_as(positions, compute);
  Tensor out_BNE = torch::stable::new_empty(visible, {batch_size, num_rows, width});
  with_floating_type("visible", visible.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using C = Compute<T>;
    const auto* shown = data<T>(visible_BKE);
    const auto* mask = data<C>(mask_token_E);
    const auto* all_positions = data<C>(positions_NE);
    const auto *shown_ids = data<int64_t>(visible_ids_BK), *hidden_ids = data<int64_t>(masked_ids_BM);
    auto* all_out = mutable_data<T>(out_BNE);
    parallel_rows(batch_size * num_rows, width, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / num_rows, row = i % num_rows;
        T* out = all_out + i * width;
        if (row < num_visible) {
          const int64_t k = b * num_visible + row;
          const C* position = all_positions + shown_ids[k] * width;
          for (int64_t e = 0; e < width; ++e) {
            out[e] = static_cast<T>(static_cast<C>(shown[k * width + e]) + position[e]);
          }
        } else {
          const C* position = all_positions + hidden_ids[b * num_masked + row - num_visible] * width;
          for (int64_t e = 0; e < width; ++e) out[e] = static_cast<T>(mask[e] + position[e]);
        }
      }
    });
  });
  return out_BNE;
}

std::tuple<Tensor, Tensor> assemble_decoder_backward(const Tensor& grad, int64_t num_visible,
                                                     ScalarType mask_token_dtype) {
  check_dim("grad", grad, 3);
  const int64_t batch_size = grad.size(0), num_rows = grad.size(1), width = grad.size(2);
  check(0 <= num_visible && num_visible <= num_rows, "num_visible=", num_visible, ": choose 0 to ", num_rows,
        ", the number of tokens");
  const Tensor grad_BNE = row_major(grad);
  Tensor grad_visible_BKE = torch::stable::new_empty(grad, {batch_size, num_visible, width});
  // Summed in fp64, so that the order of thousands of rows costs no digits of the result.
  Tensor sum_E = torch::stable::new_empty(grad, {width}, ScalarType::Double);
  with_floating_type("grad", grad.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto* rows = data<T>(grad_BNE);
    auto* out = mutable_data<T>(grad_visible_BKE);
    auto* sum = mutable_data<double>(sum_E);
    for (int64_t b = 0; b < batch_size; ++b) {
      std::copy_n(rows + b * num_rows * width, num_visible * width, out + b * num_visible * width);
    }
    const int64_t num_blocks = (width + kColumns - 1) / kColumns;
    parallel_rows(num_blocks, batch_size * num_rows * kColumns, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * kColumns, size = std::min(kColumns, width - first);
        double total[kColumns] = {};
        for (int64_t b = 0; b < batch_size; ++b) {
          for (int64_t n = num_visible; n < num_rows; ++n) {
            const T* row = rows + (b * num_rows + n) * width + first;
            for (int64_t e = 0; e < size; ++e) total[e] += static_cast<Compute<T>>(row[e]);
          }
        }
        std::copy_n(total, size, sum + first);
      }
    });
  });
  return {grad_visible_BKE, row_major_as(sum_E, mask_token_dtype)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adamae_fast, CPU, m) {
  m.impl("assemble_decoder", TORCH_BOX(&assemble_decoder));
  m.impl("assemble_decoder_backward", TORCH_BOX(&assemble_decoder_backward));
}

}  // namespace adamae
