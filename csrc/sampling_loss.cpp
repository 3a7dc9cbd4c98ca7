// sampling_loss with its closed-form gradient: formulas in adamae_fast/ops/sampling_loss.py.
#include "common.h"
#include "exponential.h"

namespace adamae {
namespace {

// Part of the loss, not a guard of the arithmetic: see PROBABILITY_EPS in Python.
constexpr double kProbabilityEps = 1.1920929e-07;

std::tuple<Tensor, Tensor> sampling_loss(const Tensor& logits, const Tensor& masked_ids, const Tensor& error) {
  check_dim("logits", logits, 2);
  const int64_t batch_size = logits.size(0), num_tokens = logits.size(1);
  const Tensor ids_BM = ascending_ids("masked_ids", masked_ids, batch_size, num_tokens);
  const int64_t num_masked = ids_BM.size(1);
  check(num_masked >= 1, "masked_ids has no columns; the loss is a mean over at least one masked token");
  check_shape("error", error, {batch_size, num_masked});
  const ScalarType compute = accumulate_type(logits.scalar_type());
  const Tensor logits_BN = row_major(logits), error_BM = row_major_as(error, compute);
  Tensor loss_B = torch::stable::new_empty(logits, {batch_size}, compute);
  Tensor gradient_BN = torch::stable::new_empty(logits, {batch_size, num_tokens}, compute);
  const double lowest = std::log(kProbabilityEps), highest = std::log1p(-kProbabilityEps);
  with_floating_type("logits", logits.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using C = Compute<T>;
    const C count = static_cast<C>(num_masked), eps = static_cast<C>(kProbabilityEps);
    const C one_less_eps = static_cast<C>(1 - kProbabilityEps);
    const auto* all_logits = data<T>(logits_BN);
    const auto* all_ids = data<int64_t>(ids_BM);
    const auto* all_errors = data<C>(error_BM);
    auto* loss = mutable_data<C>(loss_B);
    auto* gradients = mutable_data<C>(gradient_BN);
    parallel_rows(batch_size, num_tokens, [&](int64_t begin, int64_t end) {
      std::vector<C> weight(num_tokens);
      for (int64_t b = begin; b < end; ++b) {
        const T* row = all_logits + b * num_tokens;
        const int64_t* ids = all_ids + b * num_masked;
        const C* errors = all_errors + b * num_masked;
        C* p = gradients + b * num_tokens;  // the gradient's memory holds p until p has become the gradient

        C largest = static_cast<C>(row[0]);
#pragma omp simd reduction(max : largest)
        for (int64_t n = 0; n < num_tokens; ++n) {
          p[n] = static_cast<C>(row[n]);
          largest = largest < p[n] ? p[n] : largest;
        }
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t n = 0; n < num_tokens; ++n) {
          p[n] = exp_of_negative(p[n] - largest);
          sum += p[n];
        }
        const C normalizer = static_cast<C>(sum);
        for (int64_t n = 0; n < num_tokens; ++n) p[n] /= normalizer;

        // Spread over all tokens, where a visible one has an error of 0, the sums are plain loops that vectorise.
        std::fill(weight.begin(), weight.end(), C{0});
        for (int64_t i = 0; i < num_masked; ++i) weight[ids[i]] = errors[i];
        // In fp64, log p needs no logarithm of its own: it loses no digits that fp32 has.
        const double log_normalizer = static_cast<double>(largest) + std::log(sum);
        double total = 0, sum_of_weights = 0;
#pragma omp simd reduction(+ : total, sum_of_weights)
        for (int64_t n = 0; n < num_tokens; ++n) {
          double log_p = static_cast<double>(row[n]) - log_normalizer;
          // Written so that a p that is not a number is no clamped one, and its NaN spreads.
          log_p = log_p < lowest ? lowest : log_p;
          log_p = log_p > highest ? highest : log_p;
          total += log_p * weight[n];
          weight[n] = p[n] < eps || p[n] > one_less_eps ? C{0} : weight[n] / count;
          sum_of_weights += weight[n];
        }
        loss[b] = static_cast<C>(-total / count);
        const C sum_w = static_cast<C>(sum_of_weights);
        for (int64_t n = 0; n < num_tokens; ++n) p[n] = p[n] * sum_w - weight[n];
      }
    });
  });
  return {loss_B, gradient_BN};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adamae_fast, CPU, m) { m.impl("sampling_loss", TORCH_BOX(&sampling_loss)); }

}  // namespace adamae
