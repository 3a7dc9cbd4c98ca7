// Reading tokens' pixels from a uint8 clip of any strides.
#pragma once

#include "common.h"

namespace adamae {

constexpr int64_t kChannels = 3;

// A uint8 video (B, 3, T, H, W), cut into tubelets.
struct Tubelets {
  Tensor video;  // keeps the bytes alive
  const uint8_t* bytes;
  int64_t batch_size, tubelet_size, patch_size, frames, rows, columns;
  int64_t stride_b, stride_c, stride_t, stride_h, stride_w;

  Tubelets(const Tensor& video_BCTHW, int64_t tubelet, int64_t patch)
      : video(video_BCTHW), tubelet_size(tubelet), patch_size(patch) {
    check(tubelet >= 1 && patch >= 1, "tubelet_size=", tubelet, ", patch_size=", patch, ": both must be at least 1");
    check(video.scalar_type() == ScalarType::Byte, "video is ", torch::headeronly::toString(video.scalar_type()),
          "; pass uint8, normalisation happens here");
    check_dim("video", video, 5);
    check(video.size(1) == kChannels, "video has ", video.size(1), " channels; pass RGB");
    // So that pixels_per_token cannot overflow.
    check(tubelet <= video.size(2) && patch <= video.size(3) && patch <= video.size(4), "tubelet_size=", tubelet,
          ", patch_size=", patch, ": larger than the video, ", video.size(2), " frames of ", video.size(3), " × ",
          video.size(4), " pixels");
    bytes = data<uint8_t>(video);
    batch_size = video.size(0);
    frames = video.size(2) / tubelet;
    rows = video.size(3) / patch;
    columns = video.size(4) / patch;
    stride_b = video.stride(0), stride_c = video.stride(1), stride_t = video.stride(2);
    stride_h = video.stride(3), stride_w = video.stride(4);
  }

  int64_t num_tokens() const { return frames * rows * columns; }
  int64_t pixels_per_channel() const { return tubelet_size * patch_size * patch_size; }
  int64_t pixels_per_token() const { return kChannels * pixels_per_channel(); }

  // The first pixel of a token in its first channel.
  const uint8_t* corner(int64_t clip, int64_t token) const {
    const int64_t frame = token / (rows * columns), row = token / columns % rows, column = token % columns;
    return bytes + clip * stride_b + frame * tubelet_size * stride_t + row * patch_size * stride_h +
           column * patch_size * stride_w;
  }
};

}  // namespace adamae
