// patchify: formula in adamae_fast/ops/patchify.py.
#include "tubelets.h"

namespace adamae {
namespace {

// Writes scale · v + shift of a token's pixels in one channel and returns where the next channel goes.
template <class T, class C, class Stride>
T* write_channel(const Tubelets& tubelets, const uint8_t* corner, C scale, C shift, Stride stride, T* out) {
  const int64_t width = tubelets.patch_size, step = stride;
  for (int64_t t = 0; t < tubelets.tubelet_size; ++t) {
    for (int64_t h = 0; h < width; ++h) {
      const uint8_t* row = corner + t * tubelets.stride_t + h * tubelets.stride_h;
      for (int64_t w = 0; w < width; ++w) {
        out[w] = static_cast<T>(std::fma(static_cast<C>(static_cast<int32_t>(row[w * step])), scale, shift));
      }
      out += width;
    }
  }
  return out;
}

Tensor patchify(const Tensor& video, int64_t tubelet_size, int64_t patch_size, std::vector<double> mean,
                std::vector<double> std, ScalarType dtype) {
  const Tubelets tubelets(video, tubelet_size, patch_size);
  check(mean.size() == kChannels && std.size() == kChannels, "mean has ", mean.size(), " and std ", std.size(),
        " values; pass one for each of 3 channels");
  const int64_t num_tokens = tubelets.num_tokens(), size = tubelets.pixels_per_token();
  Tensor out_BNP = torch::stable::new_empty(video, {tubelets.batch_size, num_tokens, size}, dtype);
  with_floating_type("dtype", dtype, [&](auto type) {
    using T = decltype(type);
    using C = Compute<T>;
    C scale[kChannels], shift[kChannels];
    for (int64_t c = 0; c < kChannels; ++c) {
      scale[c] = static_cast<C>(1 / (255 * std[c]));
      shift[c] = static_cast<C>(-mean[c] / std[c]);
    }
    auto* all_out = mutable_data<T>(out_BNP);
    parallel_rows(tubelets.batch_size * num_tokens, size, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const uint8_t* corner = tubelets.corner(i / num_tokens, i % num_tokens);
        T* out = all_out + i * size;
        for (int64_t c = 0; c < kChannels; ++c) {
          const uint8_t* first = corner + c * tubelets.stride_c;
          // A constant stride is the usual case and the faster loop.
          out = tubelets.stride_w == 1
                    ? write_channel(tubelets, first, scale[c], shift[c], std::integral_constant<int64_t, 1>(), out)
                    : write_channel(tubelets, first, scale[c], shift[c], tubelets.stride_w, out);
        }
      }
    });
  });
  return out_BNP;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adamae_fast, CPU, m) { m.impl("patchify", TORCH_BOX(&patchify)); }

}  // namespace adamae
