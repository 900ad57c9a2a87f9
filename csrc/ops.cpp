// The Python module steerfast._C: importing it registers the CPU kernels of the ops that steerfast.kernels defines.
#include <Python.h>

#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/steer.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

steerfast::DType dtype(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return steerfast::DType::f32;
    case ScalarType::BFloat16: return steerfast::DType::bf16;
    case ScalarType::Half: return steerfast::DType::f16;
    default: STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
  }
}

// The public Python functions check everything and explain it; here is what keeps memory safe for a direct call.
template <class T>
const T* data(const char* name, const Tensor& tensor, ScalarType type, int64_t count) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == type && tensor.is_contiguous() && tensor.numel() == count,
                  name, ": expected a contiguous CPU tensor of the documented dtype with ", count, " elements, got ",
                  tensor.numel());
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class Index>
void check_index(const char* name, const Index* index, const int32_t* slot, int64_t count, int64_t size) {
  for (int64_t i = 0; i < count; ++i)
    STD_TORCH_CHECK(slot[i] < 0 || (0 <= index[i] && index[i] < size), name, ": expected an index from 0 to ",
                    size - 1, ", got ", index[i], " at position ", i);
}

const void* bank(const char* name, const Tensor& tensor, ScalarType type, int64_t slots, int64_t hidden_size) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, ": expected the dtype of the other bank");
  return data<void>(name, tensor, type, slots * hidden_size);
}

void fill(steerfast::Operands& args, const Tensor& x, const Tensor* vectors, const Tensor& directions,
          const Tensor& table, int64_t score) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 2 && (x.size(1) < 2 || x.stride(1) == 1),
                  "x: expected a CPU tensor [rows, H], contiguous in H");
  STD_TORCH_CHECK(score == 0 || score == 1, "score: expected 0 (DOT) or 1 (COSINE), got ", score);
  args.hidden_size = x.size(1);
  args.row_stride = x.stride(0);
  args.x_dtype = dtype("x", x);
  args.x = const_cast<void*>(x.const_data_ptr());
  const int64_t slots = table.dim() == 2 ? table.size(0) : 0;
  args.table = data<float>("table", table, ScalarType::Float, slots * steerfast::table_width);
  args.bank_dtype = dtype("directions", directions);
  const ScalarType bank_type = directions.scalar_type();
  args.directions = bank("directions", directions, bank_type, slots, args.hidden_size);
  args.vectors = vectors ? bank("vectors", *vectors, bank_type, slots, args.hidden_size) : nullptr;
  args.score = steerfast::Score(score);
}

std::tuple<Tensor, Tensor> gate(const Tensor& x, const Tensor& row, const Tensor& slot, const Tensor& directions,
                                const Tensor& table, int64_t score) {
  steerfast::GateArgs args;
  fill(args, x, nullptr, directions, table, score);
  args.sequences = row.numel();
  args.row = data<int64_t>("row", row, ScalarType::Long, args.sequences);
  args.slot = data<int32_t>("slot", slot, ScalarType::Int, args.sequences);
  check_index("slot", args.slot, args.slot, args.sequences, table.size(0));
  check_index("row", args.row, args.slot, args.sequences, x.size(0));
  Tensor scores = torch::stable::new_empty(row, {args.sequences}, ScalarType::Float);
  Tensor values = torch::stable::new_empty(row, {args.sequences}, ScalarType::Float);
  args.scores = static_cast<float*>(scores.mutable_data_ptr());
  args.values = static_cast<float*>(values.mutable_data_ptr());
  steerfast::gate(args);
  return {scores, values};
}

void steer_(const Tensor& x, const Tensor& slot, const Tensor& sequence, const Tensor& values, const Tensor& strength,
            const Tensor& vectors, const Tensor& directions, const Tensor& table, int64_t gate_mode, int64_t score,
            int64_t edit) {
  steerfast::SteerArgs args;
  fill(args, x, &vectors, directions, table, score);
  STD_TORCH_CHECK(gate_mode == 0 || gate_mode == 1, "gate_mode: expected 0 (LATCHED) or 1 (TOKEN), got ", gate_mode);
  STD_TORCH_CHECK(edit == 0, "edit: expected 0 (ADD), got ", edit);
  const int64_t sequences = values.numel();
  args.rows = x.size(0);
  args.slot = data<int32_t>("slot", slot, ScalarType::Int, args.rows);
  args.sequence = data<int32_t>("sequence", sequence, ScalarType::Int, args.rows);
  args.values = data<float>("values", values, ScalarType::Float, sequences);
  args.strength = data<float>("strength", strength, ScalarType::Float, sequences);
  args.gate_mode = steerfast::GateMode(gate_mode);
  args.edit = steerfast::Edit(edit);
  check_index("slot", args.slot, args.slot, args.rows, table.size(0));
  check_index("sequence", args.sequence, args.slot, args.rows, sequences);
  args.x = x.mutable_data_ptr();
  steerfast::steer(args);
}

std::string cpu_isa() { return steerfast::isa(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(steerfast, m) { m.def("cpu_isa() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(steerfast, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }

STABLE_TORCH_LIBRARY_IMPL(steerfast, CPU, m) {
  m.impl("gate", TORCH_BOX(&gate));
  m.impl("steer_", TORCH_BOX(&steer_));
}

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
