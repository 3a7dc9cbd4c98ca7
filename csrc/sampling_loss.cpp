// sampling_loss and its closed-form gradient: formulas in adamae_fast/ops/sampling_loss.py.
#include "common.h"

namespace adamae {
namespace {

// Part of the loss, not a guard of the arithmetic: see PROBABILITY_EPS in Python.
constexpr double kProbabilityEps = 1.1920929e-07;

// An exponential costs about as much as this many elements of a plain loop.
constexpr int64_t kCostOfExp = 8;

struct Arguments {
  Tensor logits_BN, ids_BM, error_BM;
  int64_t num_tokens, num_masked;

  Arguments(const Tensor& logits, const Tensor& masked_ids, const Tensor& error) {
    check_dim("logits", logits, 2);
    num_tokens = logits.size(1);
    logits_BN = contiguous(logits);
    ids_BM = checked_ids("masked_ids", masked_ids, logits.size(0), num_tokens);
    num_masked = ids_BM.size(1);
    check(num_masked >= 1, "masked_ids has no columns; the loss is a mean over at least one masked token");
    check_shape("error", error, {logits.size(0), num_masked});
    error_BM = contiguous_as(error, accumulate_type(logits.scalar_type()));
  }
};

std::tuple<Tensor, Tensor> sampling_loss(const Tensor& logits, const Tensor& masked_ids, const Tensor& error) {
  const Arguments arguments(logits, masked_ids, error);
  const int64_t batch_size = logits.size(0), num_tokens = arguments.num_tokens, num_masked = arguments.num_masked;
  const ScalarType compute = accumulate_type(logits.scalar_type());
  Tensor loss_B = torch::stable::new_empty(logits, {batch_size}, compute);
  Tensor normalizer_B2 = torch::stable::new_empty(logits, {batch_size, int64_t{2}}, compute);
  const double lowest = std::log(kProbabilityEps), highest = std::log1p(-kProbabilityEps);
  with_floating_type("logits", logits.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using C = Compute<T>;
    const auto* all_ids = data<int64_t>(arguments.ids_BM);
    const auto* errors = data<C>(arguments.error_BM);
    auto* loss = mutable_data<C>(loss_B);
    auto* normalizer = mutable_data<C>(normalizer_B2);
    parallel_rows(batch_size, kCostOfExp * num_tokens, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const T* row = data<T>(arguments.logits_BN) + b * num_tokens;
        C largest = static_cast<C>(row[0]);
        for (int64_t n = 1; n < num_tokens; ++n) largest = std::max(largest, static_cast<C>(row[n]));
        double sum = 0;
        for (int64_t n = 0; n < num_tokens; ++n) sum += std::exp(static_cast<C>(row[n]) - largest);
        normalizer[2 * b] = largest;
        normalizer[2 * b + 1] = static_cast<C>(sum);
        // In fp64, log p needs no exponential of its own: it loses no digits that fp32 has.
        const double log_normalizer = static_cast<double>(largest) + std::log(sum);
        const int64_t* ids = all_ids + b * num_masked;
        double total = 0;
        for (int64_t i = 0; i < num_masked; ++i) {
          const double log_p = static_cast<double>(row[ids[i]]) - log_normalizer;
          total += std::clamp(log_p, lowest, highest) * errors[b * num_masked + i];
        }
        loss[b] = static_cast<C>(-total / num_masked);
      }
    });
  });
  return {loss_B, normalizer_B2};
}

Tensor sampling_loss_backward(const Tensor& grad, const Tensor& logits, const Tensor& masked_ids, const Tensor& error,
                              const Tensor& normalizer) {
  const Arguments arguments(logits, masked_ids, error);
  const int64_t batch_size = logits.size(0), num_tokens = arguments.num_tokens, num_masked = arguments.num_masked;
  const ScalarType compute = accumulate_type(logits.scalar_type());
  check_shape("grad", grad, {batch_size});
  check_shape("normalizer", normalizer, {batch_size, 2});
  const Tensor grad_B = contiguous_as(grad, compute), normalizer_B2 = contiguous_as(normalizer, compute);
  Tensor out_BN = torch::stable::new_empty(logits, logits.sizes());
  with_floating_type("logits", logits.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using C = Compute<T>;
    const C eps = static_cast<C>(kProbabilityEps), one_less_eps = static_cast<C>(1 - kProbabilityEps);
    const auto* all_ids = data<int64_t>(arguments.ids_BM);
    const auto* errors = data<C>(arguments.error_BM);
    const auto* normalizers = data<C>(normalizer_B2);
    const auto* grads = data<C>(grad_B);
    parallel_rows(batch_size, kCostOfExp * num_tokens, [&](int64_t begin, int64_t end) {
      std::vector<C> p(num_tokens), weight(num_tokens);
      for (int64_t b = begin; b < end; ++b) {
        const T* row = data<T>(arguments.logits_BN) + b * num_tokens;
        for (int64_t n = 0; n < num_tokens; ++n) {
          p[n] = std::exp(static_cast<C>(row[n]) - normalizers[2 * b]) / normalizers[2 * b + 1];
        }
        std::fill(weight.begin(), weight.end(), C{0});
        double sum_of_weights = 0;
        for (int64_t i = b * num_masked; i < (b + 1) * num_masked; ++i) {
          const int64_t id = all_ids[i];
          // Written so that a p that is not a number is no clamped one, and its NaN spreads.
          const C w = p[id] < eps || p[id] > one_less_eps ? C{0} : errors[i] / num_masked;
          weight[id] = w;
          sum_of_weights += w;
        }
        const C sum_w = static_cast<C>(sum_of_weights);
        T* out = mutable_data<T>(out_BN) + b * num_tokens;
        for (int64_t n = 0; n < num_tokens; ++n) out[n] = static_cast<T>((p[n] * sum_w - weight[n]) * grads[b]);
      }
    });
  });
  return out_BN;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adamae_fast, CPU, m) {
  m.impl("sampling_loss", TORCH_BOX(&sampling_loss));
  m.impl("sampling_loss_backward", TORCH_BOX(&sampling_loss_backward));
}

}  // namespace adamae
