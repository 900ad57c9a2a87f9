// What the ops check of their arguments when called directly, and the outputs they make.
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

// The public Python functions check everything and explain it; here is what keeps memory safe for a direct call.
// Everything is checked before anything is written.
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

inline void check_rows(const char* name, const Tensor& rows, const Tensor& x) {
  STD_TORCH_CHECK(same_device(rows, x) && rows.dim() == 2 && (rows.size(1) < 2 || rows.stride(1) == 1), name,
                  ": expected a tensor [rows, H] on the device of x, contiguous in H");
}

// The slots per row of an index tensor [count, offset + K].
inline int64_t stack(const char* name, const Tensor& index, int64_t offset) {
  const int64_t width = index.dim() == 2 ? index.size(1) : -1;
  STD_TORCH_CHECK(offset <= width && width <= offset + max_stack, name, ": expected 0 to ", max_stack,
                  " slots per row");
  return width - offset;
}

inline const void* bank(const char* name, const Tensor& tensor, const Tensor& directions, const Tensor& x,
                        int64_t slots, int64_t size) {
  STD_TORCH_CHECK(tensor.scalar_type() == directions.scalar_type(), name, ": expected the dtype of the other bank");
  return data<const void>(name, tensor, x, directions.scalar_type(), slots * size);
}

// A contiguous [rows, H] like x, uninitialised. (torch::stable::new_empty goes through the dispatcher once more.)
inline Tensor fresh(const Tensor& x) {
  const int64_t sizes[2] = {x.size(0), x.size(1)}, strides[2] = {std::max<int64_t>(1, x.size(1)), 1};
  int32_t dtype, device;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(2, sizes, strides, dtype, device, x.get_device_index(), &handle));
  return Tensor(handle);
}

}  // namespace checks
}  // namespace steerfast
