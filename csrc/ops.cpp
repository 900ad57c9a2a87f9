// The Python module steerfast._C: importing it registers the CPU kernels of the ops that steerfast.kernels defines.
#include <Python.h>

#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "cpu/steer.h"

namespace {

using namespace steerfast::checks;

int64_t fill(steerfast::Operands& args, const Tensor& x, const Tensor* residual, const Tensor& directions,
             const Tensor& table) {
  STD_TORCH_CHECK(x.is_cpu(), "x: expected a CPU tensor");
  const Rows rows = check_rows("x", x, x);
  args.hidden_size = rows.size;
  args.x_stride = rows.stride;
  args.x_dtype = dtype("x", x);
  args.x = x.const_data_ptr();
  args.residual = nullptr;
  args.residual_stride = 0;
  if (residual) {
    const Rows added = check_rows("residual", *residual, x);
    STD_TORCH_CHECK(residual->scalar_type() == x.scalar_type() && same_shape(*residual, x),
                    "residual: expected the shape and dtype of x");
    args.residual = residual->const_data_ptr();
    args.residual_stride = added.stride;
  }
  const int64_t slots = table.dim() == 2 ? table.size(0) : 0;
  args.table = data<const float>("table", table, x, ScalarType::Float, slots * steerfast::table_width);
  args.bank_dtype = dtype("directions", directions);
  args.directions = bank("directions", directions, directions, x, slots, args.hidden_size);
  return rows.count;
}

void fill(steerfast::EditArgs& args, const Tensor& x, const Tensor* residual, const Tensor& rows, const Tensor& values,
          const Tensor& strength, const Tensor& vectors, const Tensor& directions, const Tensor& table,
          int64_t kinds) {
  args.count = fill(args, x, residual, directions, table);
  check_choice("kinds", kinds, 2);
  args.kinds = steerfast::Kinds(kinds);
  args.stack = stack("rows", rows, 1);
  args.rows = data<const int32_t>("rows", rows, x, ScalarType::Int, args.count * (1 + args.stack));
  const int64_t sequences = values.dim() == 2 ? values.size(0) : 0;
  args.values = const_cast<float*>(data<const float>("values", values, x, ScalarType::Float, sequences * args.stack));
  args.strength = data<const float>("strength", strength, x, ScalarType::Float, sequences * args.stack);
  args.vectors = bank("vectors", vectors, directions, x, table.size(0), args.hidden_size);
  args.deciding = nullptr;
  args.scores = nullptr;
  for (const int32_t* row = args.rows; row < args.rows + args.count * (1 + args.stack); row += 1 + args.stack)
    for (int64_t k = 1; k <= args.stack; ++k) {
      if (row[k] < 0) continue;
      STD_TORCH_CHECK(row[0] >= 0, "rows: expected a sequence, got ", row[0]);
      check_index("rows: sequence", row[0], sequences);
      check_index("rows: slot", row[k], table.size(0));
    }
}

// Only the fused op takes and returns rows in the shape of the residual stream.
void check_flat(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2, "x: expected a tensor [rows, H], got ", x.dim(), " dimensions");
}

const Tensor* pointer(const std::optional<Tensor>& tensor) { return tensor ? &*tensor : nullptr; }

void gate_(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& row, const Tensor& slot,
           const Tensor& directions, const Tensor& table, const Tensor& scores, const Tensor& values) {
  check_flat(x);
  steerfast::GateArgs args;
  const int64_t rows = fill(args, x, pointer(residual), directions, table);
  args.sequences = row.numel();
  args.stack = stack("slot", slot, 0);
  const int64_t count = args.sequences * args.stack;
  args.row = data<const int32_t>("row", row, x, ScalarType::Int, args.sequences);
  args.slot = data<const int32_t>("slot", slot, x, ScalarType::Int, count);
  args.scores = data<float>("scores", scores, x, ScalarType::Float, count);
  args.values = data<float>("values", values, x, ScalarType::Float, count);
  for (int64_t i = 0; i < count; ++i) {
    if (args.row[i / args.stack] < 0 || args.slot[i] < 0) continue;
    check_index("row", args.row[i / args.stack], rows);
    check_index("slot", args.slot[i], table.size(0));
  }
  steerfast::gate(args);
}

void steer_(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& rows, const Tensor& values,
            const Tensor& strength, const Tensor& vectors, const Tensor& directions, const Tensor& table,
            int64_t kinds) {
  check_flat(x);
  steerfast::SteerArgs args;
  fill(args, x, pointer(residual), rows, values, strength, vectors, directions, table, kinds);
  args.out = x.mutable_data_ptr();
  steerfast::steer(args);
}

std::tuple<Tensor, Tensor> norm(steerfast::NormArgs& args, const Tensor& x, const Tensor& weight, double eps,
                                int64_t norm) {
  check_choice("norm", norm, 3);
  args.norm = steerfast::Norm(norm);
  args.eps = float(eps);
  args.weight_dtype = dtype("weight", weight);
  args.weight = data<const void>("weight", weight, x, weight.scalar_type(), args.hidden_size);
  Tensor normed = fresh(x);
  Tensor new_residual = fresh(x);
  args.normed = normed.mutable_data_ptr();
  args.new_residual = new_residual.mutable_data_ptr();
  steerfast::add_steer_rms_norm(args);
  return {normed, new_residual};
}

std::tuple<Tensor, Tensor> add_steer_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                              const Tensor& rows, const Tensor& values, const Tensor& strength,
                                              const Tensor& vectors, const Tensor& directions, const Tensor& table,
                                              double eps, int64_t norm_kind, int64_t kinds) {
  steerfast::NormArgs args;
  fill(args, x, &residual, rows, values, strength, vectors, directions, table, kinds);
  return norm(args, x, weight, eps, norm_kind);
}

std::tuple<Tensor, Tensor> add_steer_rms_norm_prompt(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                     const Tensor& rows, const Tensor& deciding, const Tensor& scores,
                                                     const Tensor& values, const Tensor& strength,
                                                     const Tensor& vectors, const Tensor& directions,
                                                     const Tensor& table, double eps, int64_t norm_kind) {
  steerfast::NormArgs args;
  fill(args, x, &residual, rows, values, strength, vectors, directions, table, int64_t(steerfast::Kinds::any));
  const int64_t sequences = values.dim() == 2 ? values.size(0) : 0;
  args.deciding = data<const int32_t>("deciding", deciding, x, ScalarType::Int, sequences);
  args.scores = data<float>("scores", scores, x, ScalarType::Float, sequences * args.stack);
  args.values = data<float>("values", values, x, ScalarType::Float, sequences * args.stack);
  for (int64_t i = 0; i < sequences; ++i) check_index("deciding", args.deciding[i], args.count);
  return norm(args, x, weight, eps, norm_kind);
}

std::string cpu_isa() { return steerfast::isa(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(steerfast, m) { m.def("cpu_isa() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(steerfast, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }

STABLE_TORCH_LIBRARY_IMPL(steerfast, CPU, m) {
  m.impl("gate_", TORCH_BOX(&gate_));
  m.impl("steer_", TORCH_BOX(&steer_));
  m.impl("add_steer_rms_norm", TORCH_BOX(&add_steer_rms_norm));
  m.impl("add_steer_rms_norm.prompt", TORCH_BOX(&add_steer_rms_norm_prompt));
}

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
