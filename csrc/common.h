// What the operations for the CPU share: error messages, dtypes, checked arguments and parallel loops.
//
// Python (adamae_fast/ops) owns every schema; the files beside this one only register implementations for the CPU key.
// Letters: B clips, N tokens, K visible, M masked, D width, P pixels of a token.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace adamae {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Raises ValueError in Python, as the reference does; STD_TORCH_CHECK would raise RuntimeError.
template <class... Parts>
inline void check(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// Sums run in fp64 for fp64 and in fp32 for everything else.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline ScalarType accumulate_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls `function` with a value of the C++ type of `type`.
template <class Function>
void with_floating_type(const char* name, ScalarType type, const Function& function) {
  switch (type) {
    case ScalarType::Float:
      return function(float{});
    case ScalarType::Double:
      return function(double{});
    case ScalarType::BFloat16:
      return function(torch::headeronly::BFloat16{});
    case ScalarType::Half:
      return function(torch::headeronly::Half{});
    default:
      check(false, name, " is ", torch::headeronly::toString(type),
            ": the C++ operations take Float, Double, BFloat16 and Half; convert it, or pass impl='reference'");
  }
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// The values in row-major order; the tensor itself if they are so already. Asking first saves a microsecond: through the
// stable interface each call of an operation goes through the dispatcher.
inline Tensor row_major(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// The same in the given dtype.
inline Tensor row_major_as(const Tensor& tensor, ScalarType type) {
  return row_major(tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type));
}

inline void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  const auto sizes = tensor.sizes();
  if (sizes.size() == shape.size() && std::equal(shape.begin(), shape.end(), sizes.begin())) return;
  std::ostringstream has, wants;
  for (const int64_t size : sizes) has << size << ", ";
  for (const int64_t size : shape) wants << size << ", ";
  check(false, name, " has shape (", has.str(), "); the other arguments ask for (", wants.str(), ")");
}

inline void check_dim(const char* name, const Tensor& tensor, int64_t dim) {
  check(tensor.dim() == dim, name, " has ", tensor.dim(), " dimensions; pass a tensor of ", dim);
}

inline Tensor id_rows(const char* name, const Tensor& ids, int64_t batch_size) {
  check(ids.scalar_type() == ScalarType::Long, name, " is ", torch::headeronly::toString(ids.scalar_type()),
        "; pass int64 token ids");
  check_dim(name, ids, 2);
  check(ids.size(0) == batch_size, name, " has ", ids.size(0), " rows; pass one for each of ", batch_size, " clips");
  return row_major(ids);
}

// Contiguous int64 ids (B, any), each of them in 0 … num_tokens - 1, in any order.
inline Tensor checked_ids(const char* name, const Tensor& ids, int64_t batch_size, int64_t num_tokens) {
  Tensor rows = id_rows(name, ids, batch_size);
  const auto* values = data<int64_t>(rows);
  const int64_t size = rows.numel();
  // Without an exit from the loop, which the compiler can then vectorise.
  int64_t is_wrong = 0;
  for (int64_t i = 0; i < size; ++i) is_wrong |= (values[i] < 0) | (values[i] >= num_tokens);
  if (is_wrong) {
    const auto [low, high] = std::minmax_element(values, values + size);
    check(false, name, " reaches from ", *low, " to ", *high, "; ", num_tokens, " tokens have ids 0 to ",
          num_tokens - 1);
  }
  return rows;
}

// Contiguous int64 ids (B, any), each of them in 0 … num_tokens - 1, strictly ascending within a clip.
inline Tensor ascending_ids(const char* name, const Tensor& ids, int64_t batch_size, int64_t num_tokens) {
  Tensor rows = id_rows(name, ids, batch_size);
  const int64_t size = rows.size(1);
  if (rows.numel() == 0) return rows;
  for (int64_t b = 0; b < batch_size; ++b) {
    const auto* row = data<int64_t>(rows) + b * size;
    // Ids that ascend between a first and a last one in range are all in range.
    int64_t is_wrong = (row[0] < 0) | (row[size - 1] >= num_tokens);
    for (int64_t i = 1; i < size; ++i) is_wrong |= row[i] <= row[i - 1];
    if (!is_wrong) continue;
    checked_ids(name, rows, batch_size, num_tokens);
    const int64_t place = std::adjacent_find(row, row + size, std::greater_equal<>()) - row + 1;
    check(false, name, " of clip ", b, " are not ascending: ", row[place], " at place ", place, " follows ",
          row[place - 1], "; pass ids as TokenSplit has them, ascending and distinct");
  }
  return rows;
}

// Runs body(begin, end) over 0 … count on torch's own threads. Each index is handled alone, so that the number of
// threads changes no result. Work below `elements_each` × `count` = 32768 elements stays on one thread.
template <class Body>
void parallel_rows(int64_t count, int64_t elements_each, const Body& body) {
  if (count == 0) return;
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, elements_each));
  torch::stable::parallel_for(0, count, grain, body);
}

}  // namespace adamae
