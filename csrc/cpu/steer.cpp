#include "steer.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Half.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace steerfast {
namespace {

// 32 running sums keep two AVX-512 or four AVX2 additions in flight, which hides most of their latency.
constexpr int lanes = 32;

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Out of line: without instructions for it, a conversion is too much code to unroll.
[[maybe_unused]] __attribute__((noinline)) float widen(f16 value) {
  return c10::detail::fp16_ieee_to_fp32_value(value.bits);
}

[[maybe_unused]] __attribute__((noinline)) f16 narrow(float value) {
  if (value != value) {  // keep sign and payload and make it quiet, as the F16C instructions do
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return {uint16_t((bits >> 16 & 0x8000) | 0x7e00 | (bits >> 13 & 0x3ff))};
  }
  return {c10::detail::fp16_ieee_from_fp32_value(value)};
}

inline float gate_value(float score, const float* columns) {
  const float threshold = columns[threshold_column], sharpness = columns[sharpness_column];
  if (sharpness == 0.0f) return score <= threshold ? 0.0f : 1.0f;  // a NaN opens it
  const float value = 1.0f / (1.0f + std::exp(-sharpness * (score - threshold)));
  return value == value ? value : 1.0f;
}

// A shut gate wins over a strength that is not finite.
inline float scaled(float gate, float strength) { return gate == 0.0f ? 0.0f : gate * strength; }

// Sums over the row s that an edit reads.
struct Sums {
  float xx, xv, xd;
};

// The displacement a*s + b*v + c*d of a row. Only keep_norm has an a, and only rotate has a c.
struct Coefficients {
  Edit edit;
  float a, b, c;
};

inline Coefficients coefficients(const float* t, float beta, const Sums& sums) {
  constexpr float negligible = 1.0f / 65536;
  const float vv = t[vector_sq_column], vd = t[vector_direction_column], dd = t[direction_sq_column];
  const Edit edit = Edit(int(t[edit_column]));
  Coefficients by = {edit, 0.0f, 0.0f, 0.0f};
  if (edit == Edit::clamp) {
    if (vv <= 0.0f) return by;
    const float along = sums.xv / vv;
    by.b = beta * (std::min(std::max(along, t[low_column]), t[high_column]) - along);
  } else if (edit == Edit::keep_norm) {
    const float full = sums.xx + beta * (2.0f * sums.xv + beta * vv);
    if (full <= negligible * (sums.xx + beta * beta * vv)) return by;  // they cancel: no direction is left
    const float ratio = std::sqrt(sums.xx / full);
    by.a = ratio - 1.0f;
    by.b = ratio * beta;
  } else {
    const float rest_sq = dd - vd * vd / vv;
    if (vv <= 0.0f || rest_sq <= negligible * dd) return by;  // v and d span no plane
    const float root = std::sqrt(vv), rest = std::sqrt(rest_sq);
    const float p1 = sums.xv / root, p2 = (sums.xd - sums.xv * vd / vv) / rest;
    const float radius = std::sqrt(p1 * p1 + p2 * p2);
    const float q1 = p1 + beta * (radius * t[low_column] - p1), q2 = p2 + beta * (radius * t[high_column] - p2);
    const float length = std::sqrt(q1 * q1 + q2 * q2);
    if (length == 0.0f) return by;
    by.c = (q2 * radius / length - p2) / rest;
    by.b = (q1 * radius / length - p1) / root - by.c * vd / vv;
  }
  return by;
}

// This thread's memory for a row in float32, in whole blocks.
inline float* scratch(int64_t size) {
  constexpr int64_t line = 64 / sizeof(float);
  thread_local std::vector<float> row;
  const size_t needed = (size + lanes - 1) / lanes * lanes + line;
  if (row.size() < needed) row.resize(needed);
  return (float*)((uintptr_t(row.data()) + 63) / 64 * 64);
}

}  // namespace
}  // namespace steerfast

#define STEERFAST_ISA scalar  // the instructions that the compiler uses by default: SSE2, NEON
#define STEERFAST_WIDTH 4
#define STEERFAST_TARGET
#include "rows.h"

#if defined(__x86_64__)
#define STEERFAST_ISA avx2
#define STEERFAST_WIDTH 8
#define STEERFAST_TARGET __attribute__((target("avx2,f16c")))
#include "rows.h"

#define STEERFAST_ISA avx512
#define STEERFAST_WIDTH 16
#define STEERFAST_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#include "rows.h"
#endif

namespace steerfast {
namespace {

// the ops of one instruction set, for each dtype of x and of the bank
struct Kernels {
  const char* isa;
  void (*score[3][3])(const ScoreArgs&, int64_t, int64_t);
  void (*steer[3][3])(const SteerArgs&, int64_t, int64_t);
  void (*add_steer_rms_norm[3][3])(const NormArgs&, int64_t, int64_t);
};

#define STEERFAST_DTYPES(isa, op)                                                  \
  {                                                                                \
    {isa::op<float, float>, isa::op<float, bf16>, isa::op<float, f16>},            \
        {isa::op<bf16, float>, isa::op<bf16, bf16>, isa::op<bf16, f16>},           \
        {isa::op<f16, float>, isa::op<f16, bf16>, isa::op<f16, f16>},              \
  }
#define STEERFAST_KERNELS(isa) \
  { #isa, STEERFAST_DTYPES(isa, score), STEERFAST_DTYPES(isa, steer), STEERFAST_DTYPES(isa, add_steer_rms_norm) }

#if defined(__x86_64__)
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

const Kernels& kernels() {
  static const Kernels chosen = [] {
    const char* wanted = std::getenv("STEERFAST_CPU_ISA");
    std::string available;
    const auto fits = [&](bool supported, const char* name) {
      if (!supported) return false;
      available += (available.empty() ? "" : ", ") + std::string(name);
      return wanted == nullptr || *wanted == '\0' || std::strcmp(wanted, name) == 0;
    };
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (fits(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"),
             "avx512"))
      return Kernels STEERFAST_KERNELS(avx512);
    if (fits(__builtin_cpu_supports("avx2") && has_f16c(), "avx2")) return Kernels STEERFAST_KERNELS(avx2);
#endif
    if (fits(true, "scalar")) return Kernels STEERFAST_KERNELS(scalar);
    throw std::runtime_error("STEERFAST_CPU_ISA: expected one of " + available + " on this CPU, got " + wanted);
  }();
  return chosen;
}

int64_t row_bytes(const Operands& args) { return args.hidden_size * (args.x_dtype == DType::f32 ? 4 : 2); }

// Runs a kernel over 0..count, on torch's threads only from 1 MiB on: waking them costs more than a small batch.
template <class Args>
void run(void (*const (&each)[3][3])(const Args&, int64_t, int64_t), const Args& args) {
  constexpr int64_t mebibyte = 1 << 20;
  const auto kernel = each[int(args.x_dtype)][int(args.bank_dtype)];
  if (args.count * row_bytes(args) < mebibyte) return kernel(args, 0, args.count);
  const int64_t grain = std::max<int64_t>(1, mebibyte / 4 / row_bytes(args));
  torch::stable::parallel_for(0, args.count, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// ---- decisions, from the scores of rows ----

// Adds up, in the order of the rows, the scores of this step that the mean of decider j counts.
double counted_sum(const Deciders& deciders, int64_t j) {
  const int32_t* counted = deciders.counted + 3 * j;
  double sum = 0.0;
  for (int64_t r = counted[0]; r < counted[1]; ++r) sum += deciders.row_scores[r * deciders.stack + j % deciders.stack];
  return sum;
}

// `earlier`: the sum of earlier steps
float decided_score(const Deciders& deciders, int64_t j, int reading, double earlier) {
  if (!(reading & reads_mean)) return reading & reads_last ? deciders.last_scores[j] : 0.0f;
  const float mean = float((earlier + counted_sum(deciders, j)) / deciders.counted[3 * j + 2]);
  return reading & reads_last ? deciders.last_scores[j] + mean : mean;
}

}  // namespace

const char* isa() { return kernels().isa; }

void score(const ScoreArgs& args) { run(kernels().score, args); }

void steer(const SteerArgs& args) { run(kernels().steer, args); }

void add_steer_rms_norm(const NormArgs& args) { run(kernels().add_steer_rms_norm, args); }

// A row stores only its own decisions and scales, as a GPU program does.
void decide(const DecideArgs& args) {
  const Deciders& deciders = args.deciders;
  const auto numbers = [&](int64_t layer, int64_t slot) {
    return args.tables + (layer * args.table_slots + slot) * table_width;
  };
  int64_t last = -1;  // the rows of a sequence follow each other: the first decides for all
  float scores[max_stack], values[max_stack];
  for (int64_t r = 0; r < args.rows; ++r) {
    const int64_t sequence = deciders.sequence[r];
    if (sequence < 0) continue;
    const int64_t deciding = deciders.deciding[sequence];
    for (int64_t k = 0; k < deciders.stack; ++k) {
      const int64_t j = sequence * deciders.stack + k, slot = deciders.slots[j];
      if (slot < 0) continue;
      const float* t = numbers(args.layer, slot);
      if (t[decides_column] == float(Decides::nothing)) continue;
      const int reading = int(t[reading_column]);
      const bool everywhere = t[decides_column] == float(Decides::everywhere);
      const int64_t begin = everywhere ? 0 : args.layer, end = everywhere ? args.layers : args.layer + 1;
      const int64_t at = args.layer * deciders.count + j;
      if (deciding < 0) {
        const int32_t* counted = deciders.counted + 3 * j;
        if ((reading & reads_mean) && counted[0] < counted[1] && r == counted[1] - 1)
          args.sums[at] += counted_sum(deciders, j);
        continue;
      }
      if (sequence != last) {
        scores[k] = decided_score(deciders, j, reading, args.sums[at]);
        values[k] = gate_value(scores[k], t);
      }
      if (r == deciding) {
        args.scores[at] = scores[k];
        for (int64_t l = begin; l < end; ++l) args.values[l * deciders.count + j] = values[k];
      }
      if (args.slots[r * deciders.stack + k] < 0) continue;
      for (int64_t l = begin; l < end; ++l) {
        const float* of_layer = numbers(l, slot);
        const float gate = of_layer[gate_column] == float(Gate::prompt) ? values[k] : 1.0f;
        args.scales[(l * args.scale_rows + r) * deciders.stack + k] =
            scaled(gate, of_layer[strength_column] * args.strength[j]);
      }
    }
    last = sequence;
  }
}

}  // namespace steerfast
