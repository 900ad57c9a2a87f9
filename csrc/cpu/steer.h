// The steering ops on the CPU. What they compute is written down in kernels/gate.py and kernels/steer.py.
#pragma once

#include <cstdint>

namespace steerfast {

enum class DType { f32, bf16, f16 };
enum class Score : int64_t { dot = 0, cosine = 1 };
enum class GateMode : int64_t { latched = 0, token = 1 };
enum class Edit : int64_t { add = 0 };

// Columns of the table, as in kernels/contract.py.
constexpr int64_t threshold_column = 0, sharpness_column = 1, strength_column = 2, table_width = 8;

// The residual stream and the bank, both rows of `hidden_size` numbers.
struct Operands {
  void* x;
  int64_t row_stride;
  DType x_dtype;
  const void* vectors;  // null for a gate
  const void* directions;
  DType bank_dtype;
  const float* table;
  int64_t hidden_size;
  Score score;
};

struct GateArgs : Operands {
  int64_t sequences;
  const int64_t* row;
  const int32_t* slot;
  float* scores;
  float* values;
};

struct SteerArgs : Operands {
  int64_t rows;
  const int32_t* slot;
  const int32_t* sequence;
  const float* values;
  const float* strength;
  GateMode gate_mode;
  Edit edit;
};

// The instruction set in use: the best one of this CPU, or the one STEERFAST_CPU_ISA names. Chosen at the first call.
// Throws std::runtime_error if that name is unknown or not available here.
const char* isa();

// Indices must be in range.
void gate(const GateArgs& args);
void steer(const SteerArgs& args);

}  // namespace steerfast
