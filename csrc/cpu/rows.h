// Row arithmetic, included by steer.cpp once per instruction set with
//   STEERFAST_ISA     the namespace it goes into
//   STEERFAST_WIDTH   floats in one machine vector
//   STEERFAST_TARGET  the function attribute that enables the instruction set
//
// A row is taken in blocks of 32 floats, whatever the width, and a sum is 32 running sums folded in one order at the
// end: so every instruction set gives the same bits. (Compiled with -ffp-contract=off: no product fuses with a sum.)
// The last, incomplete block goes through a zero-padded copy and the same code.

#define STEERFAST_INLINE STEERFAST_TARGET inline __attribute__((always_inline))

namespace steerfast {
namespace STEERFAST_ISA {

constexpr int width = STEERFAST_WIDTH;
constexpr int parts = lanes / width;

typedef float Floats __attribute__((vector_size(4 * width)));
typedef uint32_t Words __attribute__((vector_size(4 * width)));
typedef uint16_t Shorts __attribute__((vector_size(2 * width)));

// ---- one machine vector in and out of memory, always float32 in registers ----

STEERFAST_INLINE void load(Floats& out, const float* p) { __builtin_memcpy(&out, p, sizeof out); }

STEERFAST_INLINE void store(float* p, const Floats& value) { __builtin_memcpy(p, &value, sizeof value); }

// GCC 12 takes convertvector apart into twice the instructions, hence the intrinsics; their plain AVX-512 forms make it
// warn about its own header, hence the zero-masked ones.
STEERFAST_INLINE void load(Words& out, const uint16_t* p) {
#if STEERFAST_WIDTH == 16
  out = (Words)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256((const __m256i*)p));
#elif STEERFAST_WIDTH == 8
  out = (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
  Shorts shorts;
  __builtin_memcpy(&shorts, p, sizeof shorts);
  out = __builtin_convertvector(shorts, Words);
#endif
}

STEERFAST_INLINE void store(uint16_t* p, const Words& value) {
#if STEERFAST_WIDTH == 16
  _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)value));
#else
  const Shorts shorts = __builtin_convertvector(value, Shorts);
  __builtin_memcpy(p, &shorts, sizeof shorts);
#endif
}

STEERFAST_INLINE void load(Floats& out, const bf16* p) {
  Words bits;
  load(bits, &p->bits);
  out = (Floats)(bits << 16);
}

STEERFAST_INLINE void store(bf16* p, const Floats& value) {
  const Words bits = (Words)value;
  const Words nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words quiet_nan = (bits >> 16) | 0x40;
  store(&p->bits, value != value ? quiet_nan : nearest_even);
}

STEERFAST_INLINE void load(Floats& out, const f16* p) {
#if STEERFAST_WIDTH == 16
  out = (Floats)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p));
#elif STEERFAST_WIDTH == 8
  out = (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  for (int i = 0; i < width; ++i) out[i] = widen(p[i]);
#endif
}

STEERFAST_INLINE void store(f16* p, const Floats& value) {
#if STEERFAST_WIDTH == 16
  _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtps_ph(0xffff, (__m512)value, _MM_FROUND_TO_NEAREST_INT));
#elif STEERFAST_WIDTH == 8
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < width; ++i) p[i] = narrow(value[i]);
#endif
}

// ---- one row ----

struct Sums {
  Floats dot[parts] = {};
  Floats square[parts] = {};
};

template <class X, class D>
STEERFAST_INLINE void add_block(Sums& sums, const X* x, const D* d) {
  for (int k = 0; k < parts; ++k) {
    Floats a, b;
    load(a, x + k * width);
    load(b, d + k * width);
    sums.dot[k] += a * b;
    sums.square[k] += a * a;
  }
}

STEERFAST_INLINE float fold(const Floats* running) {
  float sum[lanes];
  __builtin_memcpy(sum, running, sizeof sum);
  for (int half = lanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
  return sum[0];
}

template <class X, class D>
STEERFAST_TARGET float row_score(const X* x, const D* d, int64_t size, Score score) {
  Sums sums;
  int64_t i = 0;
  for (; i + lanes <= size; i += lanes) add_block(sums, x + i, d + i);
  if (i < size) {
    X x_rest[lanes] = {};
    D d_rest[lanes] = {};
    std::copy(x + i, x + size, x_rest);
    std::copy(d + i, d + size, d_rest);
    add_block(sums, x_rest, d_rest);
  }
  const float dot = fold(sums.dot);
  if (score == Score::dot) return dot;
  const float square = fold(sums.square);
  return square == 0.0f ? 0.0f : dot / std::sqrt(square);
}

template <class X, class V>
STEERFAST_INLINE void add_block(X* x, const V* v, float b) {
  for (int k = 0; k < parts; ++k) {
    Floats y, shift;
    load(y, x + k * width);
    load(shift, v + k * width);
    y += b * shift;
    store(x + k * width, y);
  }
}

template <class X, class V>
STEERFAST_TARGET void add_row(X* x, const V* v, float b, int64_t size) {
  int64_t i = 0;
  for (; i + lanes <= size; i += lanes) add_block(x + i, v + i, b);
  if (i < size) {
    X x_rest[lanes] = {};
    V v_rest[lanes] = {};
    std::copy(x + i, x + size, x_rest);
    std::copy(v + i, v + size, v_rest);
    add_block(x_rest, v_rest, b);
    std::copy(x_rest, x_rest + (size - i), x + i);
  }
}

// ---- ranges of sequences and of rows ----

template <class X, class B>
STEERFAST_TARGET void gate(const GateArgs& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t slot = args.slot[i];
    if (slot < 0) {
      args.scores[i] = args.values[i] = 0.0f;
      continue;
    }
    const X* x = (const X*)args.x + args.row[i] * args.row_stride;
    const B* d = (const B*)args.directions + slot * args.hidden_size;
    args.scores[i] = row_score(x, d, args.hidden_size, args.score);
    args.values[i] = gate_value(args.scores[i], args.table + slot * table_width);
  }
}

template <class X, class B>
STEERFAST_TARGET void steer(const SteerArgs& args, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const int64_t slot = args.slot[r];
    if (slot < 0) continue;
    X* x = (X*)args.x + r * args.row_stride;
    const float* columns = args.table + slot * table_width;
    const int64_t offset = slot * args.hidden_size;
    const int64_t sequence = args.sequence[r];
    const float value =
        args.gate_mode == GateMode::token
            ? gate_value(row_score(x, (const B*)args.directions + offset, args.hidden_size, args.score), columns)
            : args.values[sequence];
    const float b = coefficients(args.edit, value, columns[strength_column] * args.strength[sequence]);
    if (value != 0.0f && b != 0.0f) add_row(x, (const B*)args.vectors + offset, b, args.hidden_size);
  }
}

}  // namespace STEERFAST_ISA
}  // namespace steerfast

#undef STEERFAST_INLINE
#undef STEERFAST_ISA
#undef STEERFAST_WIDTH
#undef STEERFAST_TARGET
