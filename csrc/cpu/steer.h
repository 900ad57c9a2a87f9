// The steering ops on the CPU. kernels/ defines what they compute.
#pragma once

#include <cstdint>

#include "../contract.h"

namespace steerfast {

// The operands that all ops share: rows of the residual stream, and the bank.
struct Operands {
  int64_t count;  // rows
  const void* x;
  int64_t x_stride;
  const void* residual;  // null: x alone is the row
  int64_t residual_stride;
  DType x_dtype;
  int64_t hidden_size;
  const void* directions;
  DType bank_dtype;
  const float* table;
};

// The gates that may decide: each slot of a sequence is a decider.
struct Deciders {
  int64_t count;  // of all sequences
  int64_t stack;  // of a sequence
  const int32_t* sequence;
  const int32_t* deciding;
  const int32_t* counted;
  const int32_t* slots;
  float* row_scores;
  float* last_scores;
};

struct ScoreArgs : Operands {
  Deciders deciders;
  const void* mean_directions;
};

struct DecideArgs {
  Deciders deciders;
  int64_t rows;
  const int32_t* slots;  // those that edit the rows
  const float* strength;
  const float* tables;
  int64_t table_slots;
  double* sums;
  float* scores;
  float* values;
  float* scales;
  int64_t scale_rows;  // per layer
  int64_t layers;
  int64_t layer;
};

struct EditArgs : Operands {
  int64_t stack;  // slots per row
  const int32_t* slots;
  const float* scales;
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
void score(const ScoreArgs& args);
void decide(const DecideArgs& args);
void steer(const SteerArgs& args);
void add_steer_rms_norm(const NormArgs& args);

}  // namespace steerfast
