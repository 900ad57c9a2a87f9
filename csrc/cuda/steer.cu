// The Python module steerfast._C_cuda: importing it defines and registers steerfast::add_steer_rms_norm_cuda, the fused
// op of slots that all add and whose gates are latched. It has a name of its own: Triton serves add_steer_rms_norm.
#include <Python.h>

#include <tuple>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../checks.h"
#include "steer.cuh"

namespace {

using namespace steerfast::checks;

// Indices are taken as they come: to look at them, the CPU would have to wait for the device.
std::tuple<Tensor, Tensor> add_steer_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                              const Tensor& rows, const Tensor& values, const Tensor& strength,
                                              const Tensor& vectors, const Tensor& directions, const Tensor& table,
                                              double eps, int64_t norm) {
  steerfast::cuda::Arguments args;
  STD_TORCH_CHECK(x.is_cuda(), "x: expected a CUDA tensor");
  const Rows here = check_rows("x", x, x), added = check_rows("residual", residual, x);
  check_choice("norm", norm, 5);
  const int64_t count = here.count, size = here.size;
  STD_TORCH_CHECK(residual.scalar_type() == x.scalar_type() && same_shape(residual, x),
                  "residual: expected the shape and dtype of x");
  STD_TORCH_CHECK(1 <= size && size <= steerfast::max_hidden_size && count <= INT32_MAX,
                  "x: expected a hidden size from 1 to ", steerfast::max_hidden_size, ", got ", size);
  args.hidden_size = int(size);
  args.stack = int(stack("rows", rows, 1));
  args.x = x.const_data_ptr();
  args.x_stride = here.stride;
  args.residual = residual.const_data_ptr();
  args.residual_stride = added.stride;
  args.rows = data<const int32_t>("rows", rows, x, ScalarType::Int, count * (1 + args.stack));
  const int64_t sequences = values.dim() == 2 ? values.size(0) : 0;
  args.values = data<const float>("values", values, x, ScalarType::Float, sequences * args.stack);
  args.strength = data<const float>("strength", strength, x, ScalarType::Float, sequences * args.stack);
  const int64_t slots = table.dim() == 2 ? table.size(0) : 0;
  args.table = data<const float>("table", table, x, ScalarType::Float, slots * steerfast::table_width);
  bank("directions", directions, directions, x, slots, size);
  args.vectors = bank("vectors", vectors, directions, x, slots, size);
  args.weight = data<const void>("weight", weight, x, weight.scalar_type(), size);
  args.eps = float(eps);
  args.norm = steerfast::Norm(norm);
  const steerfast::DType x_dtype = dtype("x", x), bank_dtype = dtype("vectors", vectors);
  const steerfast::DType weight_dtype = dtype("weight", weight);

  const auto device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor normed = fresh(x);
  Tensor new_residual = fresh(x);
  args.normed = normed.mutable_data_ptr();
  args.new_residual = new_residual.mutable_data_ptr();
  if (count == 0) return {normed, new_residual};
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  steerfast::cuda::launch(args, x_dtype, bank_dtype, weight_dtype, int(count),
                          [&](auto kernel, int blocks, int threads, const steerfast::cuda::Arguments& argument) {
                            kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(argument);
                          });
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "add_steer_rms_norm_cuda: the launch failed: ", cudaGetErrorString(error));
  return {normed, new_residual};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(steerfast, m) {
  m.def(
      "add_steer_rms_norm_cuda(Tensor x, Tensor residual, Tensor weight, Tensor rows, Tensor values, Tensor strength, "
      "Tensor vectors, Tensor directions, Tensor table, float eps, int norm) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(steerfast, CUDA, m) {
  m.impl("add_steer_rms_norm_cuda", TORCH_BOX(&add_steer_rms_norm));
}

PyMODINIT_FUNC PyInit__C_cuda(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
