// masked_patch_loss, its gradient, patch_targets and patch_loss_step: formulas in adamae_fast/ops/masked_patch_loss.py
// and head_patch_loss.py.
//
// Each thread builds the target of one token at a time, a few KB that stay in its cache; no target reaches memory.
#include "tubelets.h"

namespace adamae {
namespace {

enum class Target { kNormalized, kMaeSt, kRaw };

Target parse_target(const std::string& name) {
  if (name == "normalized") return Target::kNormalized;
  if (name == "mae_st") return Target::kMaeSt;
  check(name == "raw", "target='", name, "': choose one of normalized, raw, mae_st");
  return Target::kRaw;
}

bool parse_is_squared(const std::string& name) {
  check(name == "mse" || name == "l1", "error='", name, "': choose one of mse, l1");
  return name == "mse";
}

// Builds the target of one token after another, values ordered (t, h, w, c), in C (float or double).
//
// x - mean = (count · v - Σ v) / (255 · count), where the numerator is an exact integer, so that nothing cancels.
template <class C>
class TargetBuilder {
 public:
  TargetBuilder(const Tubelets& tubelets, Target target)
      : tubelets_(tubelets),
        target_(target),
        row_size_(kChannels * tubelets.patch_size),
        pixels_(tubelets.pixels_per_token()),
        subtract_(row_size_),
        divide_(row_size_),
        values_(tubelets.pixels_per_token()) {}

  const C* build(int64_t clip, int64_t token) {
    const uint8_t* corner = tubelets_.corner(clip, token);
    // A constant stride lets the compiler vectorise the usual case.
    tubelets_.stride_w == 1 ? read(corner, std::integral_constant<int64_t, 1>()) : read(corner, tubelets_.stride_w);
    const int64_t count = normalizers();
    C* out = values_.data();
    const uint8_t* pixel = pixels_.data();
    for (int64_t row = 0; row < tubelets_.tubelet_size * tubelets_.patch_size; ++row) {
      for (int64_t i = 0; i < row_size_; ++i) {
        out[i] = static_cast<C>(static_cast<int32_t>(count) * pixel[i] - subtract_[i]) / divide_[i];
      }
      out += row_size_;
      pixel += row_size_;
    }
    return values_.data();
  }

 private:
  // Interleaves the channels and sums v and v² of each of them.
  template <class Stride>
  void read(const uint8_t* corner, Stride stride) {
    uint8_t* out = pixels_.data();
    std::fill(sum_, sum_ + kChannels, 0);
    std::fill(sum_of_squares_, sum_of_squares_ + kChannels, 0);
    const int64_t width = tubelets_.patch_size, step = stride;
    for (int64_t t = 0; t < tubelets_.tubelet_size; ++t) {
      for (int64_t h = 0; h < width; ++h) {
        const uint8_t* first = corner + t * tubelets_.stride_t + h * tubelets_.stride_h;
        for (int64_t c = 0; c < kChannels; ++c) {
          const uint8_t* row = first + c * tubelets_.stride_c;
          uint32_t sum = 0, sum_of_squares = 0;
          for (int64_t w = 0; w < width; ++w) {
            const uint32_t v = row[w * step];
            sum += v;
            sum_of_squares += v * v;
          }
          sum_[c] += sum;
          sum_of_squares_[c] += sum_of_squares;
        }
        const uint8_t *red = first, *green = first + tubelets_.stride_c, *blue = green + tubelets_.stride_c;
        for (int64_t w = 0; w < width; ++w) {
          out[kChannels * w] = red[w * step];
          out[kChannels * w + 1] = green[w * step];
          out[kChannels * w + 2] = blue[w * step];
        }
        out += row_size_;
      }
    }
  }

  // Fills what is subtracted from count · v and what divides it, for a row of pixels; returns count.
  int64_t normalizers() {
    int64_t count = 1;
    int32_t subtract[kChannels] = {0, 0, 0};
    double divide[kChannels] = {255, 255, 255};
    if (target_ != Target::kRaw) {
      const bool per_channel = target_ == Target::kNormalized;
      count = per_channel ? tubelets_.pixels_per_channel() : tubelets_.pixels_per_token();
      for (int64_t c = 0; c < kChannels; ++c) {
        const int64_t sum = per_channel ? sum_[c] : sum_[0] + sum_[1] + sum_[2];
        const int64_t squares =
            per_channel ? sum_of_squares_[c] : sum_of_squares_[0] + sum_of_squares_[1] + sum_of_squares_[2];
        // Σ (count · v - Σ v)² = count · (count · Σ v² - (Σ v)²), exact in integers.
        const double variance =
            static_cast<double>(count) * static_cast<double>(count * squares - sum * sum) / (count - 1.0);
        const double unit = 255.0 * count;
        subtract[c] = static_cast<int32_t>(sum);
        divide[c] = per_channel ? std::sqrt(variance) + unit * 1e-6 : std::sqrt(variance + unit * unit * 1e-6);
      }
    }
    for (int64_t i = 0; i < row_size_; ++i) {
      subtract_[i] = subtract[i % kChannels];
      divide_[i] = static_cast<C>(divide[i % kChannels]);
    }
    return count;
  }

  const Tubelets& tubelets_;
  const Target target_;
  const int64_t row_size_;
  int64_t sum_[kChannels], sum_of_squares_[kChannels];
  std::vector<uint8_t> pixels_;
  std::vector<int32_t> subtract_;
  std::vector<C> divide_, values_;
};

// Calls body(i, target) for `count` masked tokens of the batch, on torch's threads; i = 0 is token `first`.
template <class C, class Body>
void for_each_target(const Tubelets& tubelets, Target target, const Tensor& ids_BM, int64_t first, int64_t count,
                     const Body& body) {
  // The largest count · v of a token must stay an int32.
  check(tubelets.pixels_per_token() < (int64_t{1} << 22), "a token of ", tubelets.pixels_per_token(),
        " pixels is too large; choose smaller tubelets");
  const int64_t num_masked = ids_BM.size(1);
  const auto* ids = data<int64_t>(ids_BM) + first;
  parallel_rows(count, tubelets.pixels_per_token(), [&](int64_t begin, int64_t end) {
    TargetBuilder<C> builder(tubelets, target);
    for (int64_t i = begin; i < end; ++i) body(i, builder.build((first + i) / num_masked, ids[i]));
  });
}

// Σ term(i), in eight sums side by side: they round less than one sum does, whether or not the compiler vectorises it.
template <class C, class Term>
C sum_of(int64_t size, const Term& term) {
  constexpr int64_t kLanes = 8;
  C sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += term(i + lane);
  }
  for (; i < size; ++i) sums[i % kLanes] += term(i);
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

template <class C, class Body>
void for_each_target(const Tubelets& tubelets, Target target, const Tensor& ids_BM, const Body& body) {
  for_each_target<C>(tubelets, target, ids_BM, 0, ids_BM.numel(), body);
}

template <class T, class C>
C squared_error(const T* prediction, const C* target, int64_t size) {
  return sum_of<C>(size, [=](int64_t i) {
    const C difference = static_cast<C>(prediction[i]) - target[i];
    return difference * difference;
  });
}

template <class T, class C>
C absolute_error(const T* prediction, const C* target, int64_t size) {
  return sum_of<C>(size, [=](int64_t i) { return std::abs(static_cast<C>(prediction[i]) - target[i]); });
}

template <class T, class C>
C error_of(bool is_squared, const T* prediction, const C* target, int64_t size) {
  return (is_squared ? squared_error(prediction, target, size) : absolute_error(prediction, target, size)) / size;
}

// Writes size · factor times the derivative of the error; out may be the prediction itself.
template <class T, class C>
void write_slope(bool is_squared, const T* prediction, const C* target, C factor, int64_t size, T* out) {
  if (is_squared) {
    for (int64_t p = 0; p < size; ++p) {
      out[p] = static_cast<T>(2 * (static_cast<C>(prediction[p]) - target[p]) * factor);
    }
  } else {
    for (int64_t p = 0; p < size; ++p) {
      const C difference = static_cast<C>(prediction[p]) - target[p];
      out[p] = static_cast<T>(static_cast<C>((difference > 0) - (difference < 0)) * factor);
    }
  }
}

Tensor patch_targets(const Tensor& video, const Tensor& masked_ids, int64_t tubelet_size, int64_t patch_size,
                     std::string target, ScalarType dtype) {
  const Tubelets tubelets(video, tubelet_size, patch_size);
  const Target kind = parse_target(target);
  const Tensor ids_BM = ascending_ids("masked_ids", masked_ids, tubelets.batch_size, tubelets.num_tokens());
  const int64_t size = tubelets.pixels_per_token();
  Tensor out_BMP = torch::stable::new_empty(video, {ids_BM.size(0), ids_BM.size(1), size}, dtype);
  with_floating_type("dtype", dtype, [&](auto type) {
    using T = decltype(type);
    auto* out = mutable_data<T>(out_BMP);
    for_each_target<Compute<T>>(tubelets, kind, ids_BM, [&](int64_t i, const Compute<T>* values) {
      for (int64_t p = 0; p < size; ++p) out[i * size + p] = static_cast<T>(values[p]);
    });
  });
  return out_BMP;
}

Tensor masked_patch_loss(const Tensor& prediction, const Tensor& video, const Tensor& masked_ids, int64_t tubelet_size,
                         int64_t patch_size, std::string target, std::string error) {
  const Tubelets tubelets(video, tubelet_size, patch_size);
  const Target kind = parse_target(target);
  const bool is_squared = parse_is_squared(error);
  const Tensor ids_BM = ascending_ids("masked_ids", masked_ids, tubelets.batch_size, tubelets.num_tokens());
  const int64_t size = tubelets.pixels_per_token();
  check_shape("prediction", prediction, {ids_BM.size(0), ids_BM.size(1), size});
  const Tensor prediction_BMP = row_major(prediction);
  Tensor out_BM = torch::stable::new_empty(prediction, ids_BM.sizes(), accumulate_type(prediction.scalar_type()));
  with_floating_type("prediction", prediction.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using C = Compute<T>;
    const auto* predicted = data<T>(prediction_BMP);
    auto* out = mutable_data<C>(out_BM);
    for_each_target<C>(tubelets, kind, ids_BM, [&](int64_t i, const C* values) {
      out[i] = error_of(is_squared, predicted + i * size, values, size);
    });
  });
  return out_BM;
}

Tensor masked_patch_loss_backward(const Tensor& grad, const Tensor& prediction, const Tensor& video,
                                  const Tensor& masked_ids, int64_t tubelet_size, int64_t patch_size,
                                  std::string target, std::string error) {
  const Tubelets tubelets(video, tubelet_size, patch_size);
  const Target kind = parse_target(target);
  const bool is_squared = parse_is_squared(error);
  const Tensor ids_BM = ascending_ids("masked_ids", masked_ids, tubelets.batch_size, tubelets.num_tokens());
  const int64_t size = tubelets.pixels_per_token();
  check_shape("prediction", prediction, {ids_BM.size(0), ids_BM.size(1), size});
  check_shape("grad", grad, {ids_BM.size(0), ids_BM.size(1)});
  const Tensor prediction_BMP = row_major(prediction);
  const Tensor grad_BM = row_major_as(grad, accumulate_type(prediction.scalar_type()));
  Tensor out_BMP = torch::stable::new_empty(prediction, prediction.sizes());
  with_floating_type("prediction", prediction.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using C = Compute<T>;
    const auto* predicted = data<T>(prediction_BMP);
    const auto* factors = data<C>(grad_BM);
    auto* out = mutable_data<T>(out_BMP);
    for_each_target<C>(tubelets, kind, ids_BM, [&](int64_t i, const C* values) {
      write_slope(is_squared, predicted + i * size, values, factors[i] / size, size, out + i * size);
    });
  });
  return out_BMP;
}

Tensor patch_loss_step(Tensor prediction, const Tensor& video, const Tensor& masked_ids, int64_t first_row,
                       int64_t tubelet_size, int64_t patch_size, std::string target, std::string error) {
  const Tubelets tubelets(video, tubelet_size, patch_size);
  const Target kind = parse_target(target);
  const bool is_squared = parse_is_squared(error);
  const Tensor ids_BM = ascending_ids("masked_ids", masked_ids, tubelets.batch_size, tubelets.num_tokens());
  const int64_t size = tubelets.pixels_per_token();
  check_dim("prediction", prediction, 2);
  const int64_t num_rows = prediction.size(0);
  check_shape("prediction", prediction, {num_rows, size});
  check(first_row >= 0 && first_row <= ids_BM.numel() - num_rows, "first_row=", first_row, " and ", num_rows,
        " rows of prediction leave the ", ids_BM.numel(), " masked tokens");
  const Tensor prediction_RP = row_major(prediction);
  Tensor out_R = torch::stable::new_empty(prediction, {num_rows}, accumulate_type(prediction.scalar_type()));
  with_floating_type("prediction", prediction.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using C = Compute<T>;
    auto* rows = mutable_data<T>(prediction_RP);
    auto* out = mutable_data<C>(out_R);
    for_each_target<C>(tubelets, kind, ids_BM, first_row, num_rows, [&](int64_t i, const C* values) {
      T* row = rows + i * size;
      // Two loops over a row in the cache, because compilers vectorise each of them alone.
      out[i] = error_of(is_squared, row, values, size);
      write_slope(is_squared, row, values, C{1}, size, row);
    });
  });
  if (!prediction.is_contiguous()) torch::stable::copy_(prediction, prediction_RP);
  return out_R;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adamae_fast, CPU, m) {
  m.impl("patch_targets", TORCH_BOX(&patch_targets));
  m.impl("masked_patch_loss", TORCH_BOX(&masked_patch_loss));
  m.impl("masked_patch_loss_backward", TORCH_BOX(&masked_patch_loss_backward));
  m.impl("patch_loss_step", TORCH_BOX(&patch_loss_step));
}

}  // namespace adamae
