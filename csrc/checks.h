// The checks of a direct call of an op, and its outputs.
#pragma once

#include <algorithm>
#include <type_traits>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "contract.h"

namespace steerfast {
namespace checks {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
  }
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

// The public Python functions check all arguments and explain errors; these checks keep memory safe in a direct call.
// All of them run before anything is written.
template <class T>
T* data(const char* name, const Tensor& tensor, const Tensor& x, ScalarType type, int64_t count) {
  STD_TORCH_CHECK(same_device(tensor, x) && tensor.scalar_type() == type && tensor.is_contiguous() &&
                      tensor.numel() == count,
                  name, ": expected a contiguous tensor on the device of x, of the documented dtype with ", count,
                  " elements, got ", tensor.numel());
  if constexpr (std::is_const_v<T>) {
    return static_cast<T*>(tensor.const_data_ptr());
  } else {
    return static_cast<T*>(tensor.mutable_data_ptr());
  }
}

inline void check_index(const char* name, int64_t index, int64_t size) {
  STD_TORCH_CHECK(index < size, name, ": expected an index below ", size, ", got ", index);
}

inline void check_choice(const char* name, int64_t value, int64_t count) {
  STD_TORCH_CHECK(0 <= value && value < count, name, ": expected a choice from 0 to ", count - 1, ", got ", value);
}

struct Rows {
  int64_t count, size, stride;
};

// [rows, H] with any row stride, or [..., H] without gaps.
inline Rows check_rows(const char* name, const Tensor& rows, const Tensor& x) {
  const int64_t dims = rows.dim();
  const int64_t size = dims < 2 ? 0 : rows.size(dims - 1);
  STD_TORCH_CHECK(same_device(rows, x) && (dims == 2 ? size < 2 || rows.stride(1) == 1 : size && rows.is_contiguous()),
                  name, ": expected a tensor [rows, H] on the device of x, contiguous in H");
  if (dims == 2) return {rows.size(0), size, rows.stride(0)};
  return {rows.numel() / size, size, size};
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t i = 0; same && i < a.dim(); ++i) same = a.size(i) == b.size(i);
  return same;
}

// The slots per row of a tensor [rows, K].
inline int64_t stack(const char* name, const Tensor& tensor) {
  const int64_t width = tensor.dim() == 2 ? tensor.size(1) : -1;
  STD_TORCH_CHECK(0 <= width && width <= max_stack, name, ": expected 0 to ", max_stack, " slots per row");
  return width;
}

inline const void* bank(const char* name, const Tensor& tensor, const Tensor& directions, const Tensor& x,
                        int64_t slots, int64_t size) {
  STD_TORCH_CHECK(tensor.scalar_type() == directions.scalar_type(), name, ": expected the dtype of the other bank");
  return data<const void>(name, tensor, x, directions.scalar_type(), slots * size);
}

// A contiguous tensor like x, uninitialised. (torch::stable::new_empty goes through the dispatcher once more.)
inline Tensor fresh(const Tensor& x) {
  constexpr int64_t most = 8;
  const int64_t dims = x.dim();
  STD_TORCH_CHECK(dims <= most, "x: expected at most ", most, " dimensions, got ", dims);
  int64_t sizes[most], strides[most], step = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    sizes[i] = x.size(i);
    strides[i] = step;
    step *= std::max<int64_t>(1, sizes[i]);
  }
  int32_t dtype, device;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, dtype, device, x.get_device_index(), &handle));
  return Tensor(handle);
}

}  // namespace checks
}  // namespace steerfast
