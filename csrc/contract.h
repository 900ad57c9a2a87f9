// The contract of the ops, the same numbers as in kernels/contract.py.
#pragma once

namespace steerfast {

enum class DType { f32, bf16, f16 };

enum class Score { dot, cosine };
enum class Gate { always, prompt, token };
enum class Decides { nothing, here, everywhere };
enum class Edit { add, clamp, keep_norm, rotate };
enum class Kinds { latched_add, any };
enum class Norm { llama, gemma, vllm };

// the columns of the table
enum Column : int {
  threshold_column,
  sharpness_column,
  strength_column,
  vector_sq_column,
  vector_direction_column,
  direction_sq_column,
  low_column,
  high_column,
  gate_column,
  score_column,
  edit_column,
  decides_column,
  reading_column,
  table_width = 16,
};

// the bits of a reading
constexpr int reads_last = 1;
constexpr int reads_mean = 2;

constexpr int max_stack = 4;  // slots that may edit one row
constexpr int max_hidden_size = 32768;

}  // namespace steerfast
