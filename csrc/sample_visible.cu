// sample_visible in CUDA C++: checks and launch; the kernel is in sample_visible.cuh.
#include "sample_visible.cuh"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/shim_utils.h>

#include "common.h"

namespace adamae {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> sample_visible(const Tensor& logits, const Tensor& seeds,
                                                          int64_t num_visible) {
  check_dim("logits", logits, 2);
  const int64_t batch_size = logits.size(0), num_tokens = logits.size(1);
  check(seeds.scalar_type() == ScalarType::Long, "seeds is ", torch::headeronly::toString(seeds.scalar_type()),
        "; pass int64 seeds");
  check_shape("seeds", seeds, {batch_size});
  check(seeds.is_cuda() && seeds.get_device_index() == logits.get_device_index(), "seeds is on another device than ",
        "logits; move it to cuda:", logits.get_device_index());
  check(1 <= num_visible && num_visible <= num_tokens, "num_visible=", num_visible, ": choose 1 to ", num_tokens,
        ", the number of tokens");
  check(num_tokens <= kMaxTokens, "logits has ", num_tokens, " tokens; the CUDA operation takes at most ", kMaxTokens,
        ", pass impl='reference'");
  check(logits.scalar_type() != ScalarType::Double,
        "logits is Double; the CUDA operation takes Float, BFloat16 and Half: convert it, or pass impl='reference'");
  const Tensor logits_BN = row_major(logits), seeds_B = row_major(seeds);
  const auto make = [&](int64_t size, ScalarType type) {
    return torch::stable::new_empty(logits, {batch_size, size}, type);
  };
  const Tensor visible_ids_BK = make(num_visible, ScalarType::Long);
  const Tensor masked_ids_BM = make(num_tokens - num_visible, ScalarType::Long);
  const Tensor slots_BN = make(num_tokens, ScalarType::Long), statistics_B3 = make(3, ScalarType::Float);
  with_floating_type("logits", logits.scalar_type(), [&](auto type) {
    using T = decltype(type);
    if constexpr (!std::is_same_v<T, double>) {
      if (batch_size == 0) return;
      const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
      void* stream = nullptr;
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(logits.get_device_index(), &stream));
      const auto kernel = tokens_of_thread(num_tokens) == 4 ? sample_visible_kernel<T, 4> : sample_visible_kernel<T, 8>;
      kernel<<<static_cast<unsigned>(batch_size), threads_of_block(num_tokens), 0, static_cast<cudaStream_t>(stream)>>>(
          data<T>(logits_BN), data<int64_t>(seeds_B), static_cast<int>(num_tokens), static_cast<int>(num_visible),
          mutable_data<int64_t>(visible_ids_BK), mutable_data<int64_t>(masked_ids_BM), mutable_data<int64_t>(slots_BN),
          mutable_data<float>(statistics_B3));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  });
  return {visible_ids_BK, masked_ids_BM, slots_BN, statistics_B3};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adamae_fast, CUDA, m) { m.impl("sample_visible.cuda", TORCH_BOX(&sample_visible)); }

}  // namespace adamae
