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

void fill(steerfast::Operands& args, const Tensor& x, const Tensor* residual, const Tensor& directions,
          const Tensor& table) {
  STD_TORCH_CHECK(x.is_cpu(), "x: expected a CPU tensor");
  const Rows rows = check_rows("x", x, x);
  args.count = rows.count;
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
}

void fill(steerfast::Deciders& args, const Tensor& x, int64_t rows, const Tensor& sequence, const Tensor& deciding,
          const Tensor& counted, const Tensor& slots, const Tensor& row_scores, const Tensor& last_scores,
          int64_t table_slots) {
  args.stack = stack("row_scores", row_scores);
  args.count = deciding.numel() * args.stack;
  args.sequence = data<const int32_t>("sequence", sequence, x, ScalarType::Int, rows);
  args.deciding = data<const int32_t>("deciding", deciding, x, ScalarType::Int, deciding.numel());
  args.counted = data<const int32_t>("counted", counted, x, ScalarType::Int, args.count * 3);
  args.slots = data<const int32_t>("decider_slots", slots, x, ScalarType::Int, args.count);
  const int64_t scored = std::max(rows, row_scores.size(0));
  args.row_scores = data<float>("row_scores", row_scores, x, ScalarType::Float, scored * args.stack);
  args.last_scores = data<float>("last_scores", last_scores, x, ScalarType::Float, args.count);
  int64_t last = -1;
  for (int64_t r = 0; r < rows; last = args.sequence[r++]) {
    const int64_t own = args.sequence[r];
    if (own < 0 || own == last) continue;
    check_index("sequence", own, deciding.numel());
    check_index("deciding", args.deciding[own], rows);
    for (int64_t j = own * args.stack; j < (own + 1) * args.stack; ++j) {
      check_index("decider_slots", args.slots[j], table_slots);
      const int32_t first = args.counted[3 * j], until = args.counted[3 * j + 1];
      STD_TORCH_CHECK(args.slots[j] < 0 || first >= until || (first >= 0 && until <= rows),
                      "counted: expected rows from 0 to ", rows, ", got ", first, " to ", until);
    }
  }
}

void fill(steerfast::EditArgs& args, const Tensor& x, const Tensor* residual, const Tensor& slots,
          const Tensor& vectors, const Tensor& directions, const Tensor& table, int64_t kinds) {
  fill(args, x, residual, directions, table);
  check_choice("kinds", kinds, 2);
  args.kinds = steerfast::Kinds(kinds);
  args.stack = stack("slots", slots);
  args.slots = data<const int32_t>("slots", slots, x, ScalarType::Int, args.count * args.stack);
  args.vectors = bank("vectors", vectors, directions, x, table.size(0), args.hidden_size);
  for (int64_t i = 0; i < args.count * args.stack; ++i) check_index("slots", args.slots[i], table.size(0));
}

void fill_scales(steerfast::EditArgs& args, const Tensor& x, const Tensor& scales) {
  args.scales = data<const float>("scales", scales, x, ScalarType::Float, args.count * args.stack);
}

// The scales of `edit` become those that the decisions write.
steerfast::DecideArgs decisions(steerfast::EditArgs& edit, const Tensor& x, const Tensor& sequence,
                                const Tensor& deciding, const Tensor& counted, const Tensor& slots,
                                const Tensor& strength, const Tensor& tables, const Tensor& row_scores,
                                const Tensor& last_scores, const Tensor& sums, const Tensor& scores,
                                const Tensor& values, const Tensor& scales, int64_t layer) {
  steerfast::DecideArgs args;
  STD_TORCH_CHECK(tables.dim() == 3 && scales.dim() == 3, "tables, scales: expected 3 dimensions");
  args.layers = tables.size(0);
  args.table_slots = tables.size(1);
  args.rows = edit.count;
  args.slots = edit.slots;
  check_choice("layer", layer, args.layers);
  args.layer = layer;
  fill(args.deciders, x, args.rows, sequence, deciding, counted, slots, row_scores, last_scores, args.table_slots);
  STD_TORCH_CHECK(args.deciders.stack == edit.stack, "row_scores: expected the slots per row of slots");
  const int64_t decisions = args.layers * args.deciders.count;
  args.strength = data<const float>("strength", strength, x, ScalarType::Float, args.deciders.count);
  args.tables = data<const float>("tables", tables, x, ScalarType::Float,
                                  args.layers * args.table_slots * steerfast::table_width);
  args.sums = data<double>("sums", sums, x, ScalarType::Double, decisions);
  args.scores = data<float>("scores", scores, x, ScalarType::Float, decisions);
  args.values = data<float>("values", values, x, ScalarType::Float, decisions);
  args.scale_rows = std::max(args.rows, scales.size(1));
  const int64_t layer_scales = args.scale_rows * edit.stack;
  args.scales = data<float>("scales", scales, x, ScalarType::Float, args.layers * layer_scales);
  edit.scales = args.scales + layer * layer_scales;
  return args;
}

// Only the fused op takes and returns rows in the shape of the residual stream.
void check_flat(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2, "x: expected a tensor [rows, H], got ", x.dim(), " dimensions");
}

const Tensor* pointer(const std::optional<Tensor>& tensor) { return tensor ? &*tensor : nullptr; }

void score_(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& sequence, const Tensor& deciding,
            const Tensor& counted, const Tensor& slots, const Tensor& directions, const Tensor& mean_directions,
            const Tensor& table, const Tensor& row_scores, const Tensor& last_scores) {
  check_flat(x);
  steerfast::ScoreArgs args;
  fill(args, x, pointer(residual), directions, table);
  fill(args.deciders, x, args.count, sequence, deciding, counted, slots, row_scores, last_scores, table.size(0));
  args.mean_directions = bank("mean_directions", mean_directions, directions, x, table.size(0), args.hidden_size);
  steerfast::score(args);
}

void steer_(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& slots, const Tensor& scales,
            const Tensor& vectors, const Tensor& directions, const Tensor& table, int64_t kinds) {
  check_flat(x);
  steerfast::SteerArgs args;
  fill(args, x, pointer(residual), slots, vectors, directions, table, kinds);
  fill_scales(args, x, scales);
  args.out = x.mutable_data_ptr();
  steerfast::steer(args);
}

void steer_deciding_(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& slots,
                     const Tensor& vectors, const Tensor& directions, const Tensor& table, int64_t kinds,
                     const Tensor& sequence, const Tensor& deciding, const Tensor& counted,
                     const Tensor& decider_slots, const Tensor& strength, const Tensor& tables,
                     const Tensor& row_scores, const Tensor& last_scores, const Tensor& sums, const Tensor& scores,
                     const Tensor& values, const Tensor& scales, int64_t layer) {
  check_flat(x);
  steerfast::SteerArgs args;
  fill(args, x, pointer(residual), slots, vectors, directions, table, kinds);
  steerfast::decide(decisions(args, x, sequence, deciding, counted, decider_slots, strength, tables, row_scores,
                              last_scores, sums, scores, values, scales, layer));
  args.out = x.mutable_data_ptr();
  steerfast::steer(args);
}

std::tuple<Tensor, Tensor> fill_norm(steerfast::NormArgs& args, const Tensor& x, const Tensor& weight, double eps,
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
  return {normed, new_residual};
}

std::tuple<Tensor, Tensor> add_steer_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                              const Tensor& slots, const Tensor& scales, const Tensor& vectors,
                                              const Tensor& directions, const Tensor& table, double eps,
                                              int64_t norm, int64_t kinds) {
  steerfast::NormArgs args;
  fill(args, x, &residual, slots, vectors, directions, table, kinds);
  fill_scales(args, x, scales);
  const auto outputs = fill_norm(args, x, weight, eps, norm);
  steerfast::add_steer_rms_norm(args);
  return outputs;
}

std::tuple<Tensor, Tensor> add_steer_rms_norm_deciding(
    const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& slots, const Tensor& vectors,
    const Tensor& directions, const Tensor& table, int64_t kinds, const Tensor& sequence, const Tensor& deciding,
    const Tensor& counted, const Tensor& decider_slots, const Tensor& strength, const Tensor& tables,
    const Tensor& row_scores, const Tensor& last_scores, const Tensor& sums, const Tensor& scores,
    const Tensor& values, const Tensor& scales, int64_t layer, double eps, int64_t norm) {
  steerfast::NormArgs args;
  fill(args, x, &residual, slots, vectors, directions, table, kinds);
  const steerfast::DecideArgs gates = decisions(args, x, sequence, deciding, counted, decider_slots, strength, tables,
                                                row_scores, last_scores, sums, scores, values, scales, layer);
  const auto outputs = fill_norm(args, x, weight, eps, norm);
  steerfast::decide(gates);
  steerfast::add_steer_rms_norm(args);
  return outputs;
}

std::string cpu_isa() { return steerfast::isa(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(steerfast, m) { m.def("cpu_isa() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(steerfast, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }

STABLE_TORCH_LIBRARY_IMPL(steerfast, CPU, m) {
  m.impl("score_", TORCH_BOX(&score_));
  m.impl("steer_", TORCH_BOX(&steer_));
  m.impl("steer_.deciding", TORCH_BOX(&steer_deciding_));
  m.impl("add_steer_rms_norm", TORCH_BOX(&add_steer_rms_norm));
  m.impl("add_steer_rms_norm.deciding", TORCH_BOX(&add_steer_rms_norm_deciding));
}

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
