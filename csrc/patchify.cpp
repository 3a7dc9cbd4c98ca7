// patchify: formula in adamae_fast/ops/patchify.py.
//
// A byte has 256 values, so the arithmetic is done once for each of them and channel, and the clip is looked up.
#include "tubelets.h"

namespace adamae {
namespace {

template <class T, class Stride>
T* copy_channel(const Tubelets& tubelets, const uint8_t* corner, const T* table, Stride stride, T* out) {
  const int64_t step = stride;
  for (int64_t t = 0; t < tubelets.tubelet_size; ++t) {
    for (int64_t h = 0; h < tubelets.patch_size; ++h) {
      const uint8_t* row = corner + t * tubelets.stride_t + h * tubelets.stride_h;
      for (int64_t w = 0; w < tubelets.patch_size; ++w) *out++ = table[row[w * step]];
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
    std::vector<T> tables(kChannels * 256);
    for (int64_t i = 0; i < kChannels * 256; ++i) {
      const C x = static_cast<C>(i % 256) / 255;
      tables[i] = static_cast<T>((x - static_cast<C>(mean[i / 256])) / static_cast<C>(std[i / 256]));
    }
    auto* all_out = mutable_data<T>(out_BNP);
    parallel_rows(tubelets.batch_size * num_tokens, size, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const uint8_t* corner = tubelets.corner(i / num_tokens, i % num_tokens);
        T* out = all_out + i * size;
        for (int64_t c = 0; c < kChannels; ++c) {
          const uint8_t* first = corner + c * tubelets.stride_c;
          const T* table = tables.data() + c * 256;
          // A constant stride is the usual case and the faster loop.
          out = tubelets.stride_w == 1
                    ? copy_channel(tubelets, first, table, std::integral_constant<int64_t, 1>(), out)
                    : copy_channel(tubelets, first, table, tubelets.stride_w, out);
        }
      }
    });
  });
  return out_BNP;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adamae_fast, CPU, m) { m.impl("patchify", TORCH_BOX(&patchify)); }

}  // namespace adamae
