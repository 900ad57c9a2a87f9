// The steering ops on the CPU. kernels/ defines what they compute.
#pragma once

#include <cstdint>

#include "../contract.h"

namespace steerfast {

// The operands that all ops share: rows of the residual stream, the bank, and the latches of the sequences.
struct Operands {
  const void* x;
  int64_t x_stride;
  const void* residual;  // null: x alone is the row
  int64_t residual_stride;
  DType x_dtype;
  int64_t hidden_size;
  const void* directions;
  DType bank_dtype;
  const float* table;
  int64_t stack;  // slots per sequence and per row
  float* scores;  // null where the op decides nothing
  float* values;  // written only where it decides
};

struct GateArgs : Operands {
  int64_t sequences;
  const int32_t* row;
  const int32_t* slot;
};

struct EditArgs : Operands {
  int64_t count;
  const int32_t* rows;
  const int32_t* deciding;  // null: every gate is latched or the row's own
  const float* strength;
  const void* vectors;
  Kinds kinds;
};

struct SteerArgs : EditArgs {
  void* out;  // x itself
};

struct NormArgs : EditArgs {
  const void* weight;
  DType weight_dtype;
  float eps;
  Norm norm;
  void* normed;
  void* new_residual;
};

// The instruction set in use: the best one of this CPU, or the one STEERFAST_CPU_ISA names. Chosen at the first call.
// Throws std::runtime_error if that name is unknown or not available here.
const char* isa();

// Indices must be in range.
void gate(const GateArgs& args);
void steer(const SteerArgs& args);
void add_steer_rms_norm(const NormArgs& args);

}  // namespace steerfast
