// Row arithmetic, included by steer.cpp once per instruction set with
//   STEERFAST_ISA     the namespace it goes into
//   STEERFAST_WIDTH   floats in one machine vector
//   STEERFAST_TARGET  the function attribute that enables the instruction set
//
// A row is read in blocks of 32 floats for every width, and a sum is 32 running sums, folded in one order at the end.
// So every instruction set gives the same bits. (Compiled with -ffp-contract=off: no product fuses with a sum.)
// The last, incomplete block goes through a zero-padded copy and the same code.
// vcvtneps2bf16 of AVX-512-BF16 is not used: it flushes denormal numbers to 0, and the bits would differ.

#define STEERFAST_INLINE STEERFAST_TARGET inline __attribute__((always_inline))
#define STEERFAST_EACH_PART _Pragma("GCC unroll 8") for (int k = 0; k < parts; ++k)

namespace steerfast {
namespace STEERFAST_ISA {

constexpr int width = STEERFAST_WIDTH;
constexpr int parts = lanes / width;

typedef float Floats __attribute__((vector_size(4 * width)));
// Not memcpy: GCC 12 then keeps whole blocks on the stack, which made the float32 ops three times slower.
typedef Floats Unaligned __attribute__((aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * width)));
typedef uint16_t Shorts __attribute__((vector_size(2 * width)));

// ---- one machine vector in and out of memory, always float32 in registers ----

STEERFAST_INLINE void load(Floats& out, const float* p) { out = *(const Unaligned*)p; }

STEERFAST_INLINE void store(float* p, const Floats& value) { *(Unaligned*)p = value; }

// Intrinsics: GCC 12 compiles convertvector to twice the instructions. Zero-masked: for the plain AVX-512 forms GCC 12
// warns about its own header.
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
#elif STEERFAST_WIDTH == 8
  const __m256i words = (__m256i)value;  // none above 0xffff, so nothing saturates
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
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

// The bfloat16 lies in the upper half. A NaN becomes all ones, which costs less than keeping its payload.
STEERFAST_INLINE Words bf16_bits(const Floats& value) {
  const Words bits = (Words)value;
  return (bits + 0x7fff + ((bits >> 16) & 1)) | (Words)(value != value);
}

STEERFAST_INLINE void store(bf16* p, const Floats& value) { store(&p->bits, bf16_bits(value) >> 16); }

STEERFAST_INLINE void load(Floats& out, const f16* p) {
#if STEERFAST_WIDTH == 16
  out = (Floats)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p));
#elif STEERFAST_WIDTH == 8
  out = (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  float wide[width];
  for (int i = 0; i < width; ++i) wide[i] = widen(p[i]);
  load(out, wide);
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

// ---- rounding to a dtype, the value staying in float32 ----

STEERFAST_INLINE void round_to(float, Floats&) {}

template <class X>
STEERFAST_INLINE void round_to(X, Floats& value) {
  X rounded[width];
  store(rounded, value);
  load(value, rounded);
}

STEERFAST_INLINE void round_to(bf16, Floats& value) { value = (Floats)(bf16_bits(value) & 0xffff0000); }

// ---- one block of 32, of which the last of a row has only `rest` ----

typedef Floats Block[parts];

template <bool full, class T>
STEERFAST_INLINE void get(Block& out, const T* p, int64_t rest) {
  if (full) {
    STEERFAST_EACH_PART load(out[k], p + k * width);
  } else {
    T padded[lanes] = {};
    std::copy(p, p + rest, padded);
    STEERFAST_EACH_PART load(out[k], padded + k * width);
  }
}

template <bool full, class T>
STEERFAST_INLINE void put(T* p, const Block& value, int64_t rest) {
  if (full) {
    STEERFAST_EACH_PART store(p + k * width, value[k]);
  } else {
    T padded[lanes];
    STEERFAST_EACH_PART store(padded + k * width, value[k]);
    std::copy(padded, padded + rest, p);
  }
}

// A padded product is not 0 where a coefficient is infinite, and no sum may see that.
template <bool full>
STEERFAST_INLINE void clear_padding(Block& value, int64_t rest) {
  if (full) return;
  float padded[lanes];
  STEERFAST_EACH_PART store(padded + k * width, value[k]);
  std::fill(padded + rest, padded + lanes, 0.0f);
  STEERFAST_EACH_PART load(value[k], padded + k * width);
}

STEERFAST_INLINE float fold(const Block& running) {
  float sum[lanes];
  __builtin_memcpy(sum, running, sizeof sum);
  for (int half = lanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
  return sum[0];
}

// ---- sums over a row s, which lies widened and zero-padded to whole blocks in scratch memory ----

template <bool full, class X>
STEERFAST_INLINE void read_block(float* s, const X* x, const X* residual, int64_t rest) {
  Block y, other;
  get<full>(y, x, rest);
  if (residual) {
    get<full>(other, residual, rest);
    STEERFAST_EACH_PART {
      y[k] += other[k];
      round_to(X(), y[k]);
    }
  }
  put<true>(s, y, lanes);
}

template <class X>
STEERFAST_TARGET void read_row(float* s, const X* x, const X* residual, int64_t size) {
  int64_t i = 0;
  for (; i + lanes <= size; i += lanes) read_block<true>(s + i, x + i, residual ? residual + i : nullptr, lanes);
  if (i < size) read_block<false>(s + i, x + i, residual ? residual + i : nullptr, size - i);
}

template <bool full, class D>
STEERFAST_INLINE void dot_block(Block& sums, const float* s, const D* d, int64_t rest) {
  Block a, b;
  get<true>(a, s, lanes);
  get<full>(b, d, rest);
  STEERFAST_EACH_PART sums[k] += a[k] * b[k];
}

template <class D>
STEERFAST_TARGET float dot(const float* s, const D* d, int64_t size) {
  Block sums = {};
  int64_t i = 0;
  for (; i + lanes <= size; i += lanes) dot_block<true>(sums, s + i, d + i, lanes);
  if (i < size) dot_block<false>(sums, s + i, d + i, size - i);
  return fold(sums);
}

// The rows s of a launch, read when a gate or an edit asks for a sum. The last row read stays.
template <class X, class B>
class Reader {
 public:
  STEERFAST_TARGET Reader(const Operands& args, float* s) : args_(args), s_(s) {}

  STEERFAST_TARGET const float* row(int64_t row) {
    if (row_ != row) {
      const X* x = (const X*)args_.x + row * args_.x_stride;
      const X* residual = args_.residual ? (const X*)args_.residual + row * args_.residual_stride : nullptr;
      read_row(s_, x, residual, args_.hidden_size);
      row_ = row;
      has_square_ = false;
    }
    return s_;
  }

  STEERFAST_TARGET float dot(int64_t row, const void* bank, int64_t slot) {
    return STEERFAST_ISA::dot(this->row(row), (const B*)bank + slot * args_.hidden_size, args_.hidden_size);
  }

  STEERFAST_TARGET float square(int64_t row) {
    const float* s = this->row(row);
    if (!has_square_) square_ = STEERFAST_ISA::dot(s, s, args_.hidden_size);
    has_square_ = true;
    return square_;
  }

  STEERFAST_TARGET float score(int64_t row, const void* directions, int64_t slot) {
    const float sum = dot(row, directions, slot);
    if (args_.table[slot * table_width + score_column] != float(Score::cosine)) return sum;
    const float square = this->square(row);
    return square == 0.0f ? 0.0f : sum / std::sqrt(square);
  }

 private:
  const Operands& args_;
  float* s_;
  int64_t row_ = -1;
  bool has_square_ = false;
  float square_ = 0.0f;
};

// ---- the displacements of a row ----

template <class B>
struct Displacement {
  Coefficients by;
  const B* v;
  const B* d;
};

// The displacements of a row; `s` is the row that those which scale it read.
template <class B>
struct Displacements {
  int count = 0;
  Displacement<B> each[max_stack];
  const float* s = nullptr;
};

template <class X, class B>
class Editor {
 public:
  STEERFAST_TARGET Editor(const EditArgs& args, float* scratch) : args_(args), reader_(args, scratch) {}

  STEERFAST_TARGET void collect(Displacements<B>& out, int64_t r) {
    const int32_t* slots = args_.slots + r * args_.stack;
    const float* scales = args_.scales + r * args_.stack;
    const bool any = args_.kinds == Kinds::any;
    out.count = 0;
    bool keeps_norm = false;
    for (int64_t k = 0; k < args_.stack; ++k) {
      const int64_t slot = slots[k];
      float beta = scales[k];
      if (slot < 0 || beta == 0.0f) continue;
      const float* t = args_.table + slot * table_width;
      if (any && t[gate_column] == float(Gate::token)) {
        beta = scaled(gate_value(reader_.score(r, args_.directions, slot), t), beta);
        if (beta == 0.0f) continue;
      }
      Coefficients by = {Edit::add, 0.0f, beta, 0.0f};
      if (any && t[edit_column] != float(Edit::add)) {
        Sums sums = {};
        sums.xv = reader_.dot(r, args_.vectors, slot);
        if (t[edit_column] == float(Edit::keep_norm)) sums.xx = reader_.square(r);
        if (t[edit_column] == float(Edit::rotate)) sums.xd = reader_.dot(r, args_.directions, slot);
        by = coefficients(t, beta, sums);
        if (by.a == 0.0f && by.b == 0.0f && by.c == 0.0f) continue;
      }
      keeps_norm |= by.edit == Edit::keep_norm;
      const int64_t offset = slot * args_.hidden_size;
      out.each[out.count++] = {by, (const B*)args_.vectors + offset, (const B*)args_.directions + offset};
    }
    out.s = keeps_norm ? reader_.row(r) : nullptr;
  }

 private:
  const EditArgs& args_;
  Reader<X, B> reader_;
};

// y of the block at i, displaced
template <bool full, class B>
STEERFAST_INLINE void displace(Block& y, const Displacements<B>& moves, int64_t i, int64_t rest) {
  Block term;
#pragma GCC unroll 1
  for (int m = 0; m < moves.count; ++m) {
    const Displacement<B>& move = moves.each[m];
    if (move.by.edit == Edit::keep_norm) {
      get<true>(term, moves.s + i, lanes);
      STEERFAST_EACH_PART y[k] += move.by.a * term[k];
    }
    get<full>(term, move.v + i, rest);
    STEERFAST_EACH_PART y[k] += move.by.b * term[k];
    if (move.by.edit == Edit::rotate) {
      get<full>(term, move.d + i, rest);
      STEERFAST_EACH_PART y[k] += move.by.c * term[k];
    }
  }
}

template <bool full, class X, class B>
STEERFAST_INLINE void steer_block(X* x, const Displacements<B>& moves, int64_t i, int64_t rest) {
  Block y;
  get<full>(y, x + i, rest);
  displace<full>(y, moves, i, rest);
  put<full>(x + i, y, rest);
}

template <class X, class B>
STEERFAST_TARGET void steer_row(X* x, const Displacements<B>& moves, int64_t size) {
  int64_t i = 0;
  for (; i + lanes <= size; i += lanes) steer_block<true>(x, moves, i, lanes);
  if (i < size) steer_block<false>(x, moves, i, size - i);
}

// ---- add, steer, and the sum of squares; then the norm, from the rows that the first pass left in the cache ----

template <bool full, class X, class B>
STEERFAST_INLINE void add_steer_block(Block& squares, X* out, const X* x, const X* residual,
                                      const Displacements<B>& moves, int64_t i, int64_t rest) {
  Block y, other;
  get<full>(y, x + i, rest);
  get<full>(other, residual + i, rest);
  STEERFAST_EACH_PART y[k] += other[k];
  displace<full>(y, moves, i, rest);
  clear_padding<full>(y, rest);
  put<full>(out + i, y, rest);
  STEERFAST_EACH_PART {
    round_to(X(), y[k]);
    squares[k] += y[k] * y[k];
  }
}

template <class X, class B>
STEERFAST_TARGET float add_steer_row(X* out, const X* x, const X* residual, const Displacements<B>& moves,
                                     int64_t size) {
  Block squares = {};
  int64_t i = 0;
  for (; i + lanes <= size; i += lanes)
    add_steer_block<true>(squares, out, x, residual, moves, i, lanes);
  if (i < size) add_steer_block<false>(squares, out, x, residual, moves, i, size - i);
  return fold(squares);
}

template <Norm norm, bool full, class X, class W>
STEERFAST_INLINE void norm_block(X* out, const X* n, const W* weight, float rstd, int64_t rest) {
  Block y, w;
  get<full>(y, n, rest);
  get<full>(w, weight, rest);
  STEERFAST_EACH_PART {
    y[k] *= rstd;
    if (norm == Norm::llama) round_to(X(), y[k]);
    if (norm == Norm::gemma) w[k] = 1.0f + w[k];
    y[k] *= w[k];
  }
  put<full>(out, y, rest);
}

template <Norm norm, class X, class W>
STEERFAST_TARGET void norm_row(void* out_, const void* n_, const void* weight_, float rstd, int64_t size) {
  X* out = (X*)out_;
  const X* n = (const X*)n_;
  const W* weight = (const W*)weight_;
  int64_t i = 0;
  for (; i + lanes <= size; i += lanes) norm_block<norm, true>(out + i, n + i, weight + i, rstd, lanes);
  if (i < size) norm_block<norm, false>(out + i, n + i, weight + i, rstd, size - i);
}

typedef void (*NormRow)(void*, const void*, const void*, float, int64_t);

template <class X, class W>
STEERFAST_TARGET NormRow choose_norm(Norm norm) {
  switch (norm) {
    case Norm::llama: return norm_row<Norm::llama, X, W>;
    case Norm::gemma: return norm_row<Norm::gemma, X, W>;
    default: return norm_row<Norm::vllm, X, W>;
  }
}

// ---- ranges of rows ----

template <class X, class B>
STEERFAST_TARGET void score(const ScoreArgs& args, int64_t begin, int64_t end) {
  const Deciders& deciders = args.deciders;
  Reader<X, B> reader(args, scratch(args.hidden_size));
  for (int64_t r = begin; r < end; ++r) {
    const int64_t sequence = deciders.sequence[r];
    float* row_scores = deciders.row_scores + r * deciders.stack;
    if (sequence < 0) {
      std::fill_n(row_scores, deciders.stack, 0.0f);
      continue;
    }
    for (int64_t k = 0; k < deciders.stack; ++k) {
      const int64_t j = sequence * deciders.stack + k, slot = deciders.slots[j];
      if (slot < 0) continue;
      const float* t = args.table + slot * table_width;
      if (t[decides_column] == float(Decides::nothing)) continue;
      const int reading = int(t[reading_column]);
      const int32_t* counted = deciders.counted + 3 * j;
      if ((reading & reads_last) && r == deciders.deciding[sequence])
        deciders.last_scores[j] = reader.score(r, args.directions, slot);
      if ((reading & reads_mean) && counted[0] <= r && r < counted[1])
        row_scores[k] = reader.score(r, args.mean_directions, slot);
    }
  }
}

template <class X, class B>
STEERFAST_TARGET void steer(const SteerArgs& args, int64_t begin, int64_t end) {
  Editor<X, B> editor(args, scratch(args.hidden_size));
  Displacements<B> moves;
  for (int64_t r = begin; r < end; ++r) {
    editor.collect(moves, r);
    if (moves.count) steer_row((X*)args.out + r * args.x_stride, moves, args.hidden_size);
  }
}

template <class X, class B>
STEERFAST_TARGET void add_steer_rms_norm(const NormArgs& args, int64_t begin, int64_t end) {
  const int64_t size = args.hidden_size;
  Editor<X, B> editor(args, scratch(size));
  Displacements<B> moves;
  const NormRow norm = args.weight_dtype == DType::f32    ? choose_norm<X, float>(args.norm)
                       : args.weight_dtype == DType::bf16 ? choose_norm<X, bf16>(args.norm)
                                                          : choose_norm<X, f16>(args.norm);
  for (int64_t r = begin; r < end; ++r) {
    editor.collect(moves, r);
    const X* x = (const X*)args.x + r * args.x_stride;
    const X* residual = (const X*)args.residual + r * args.residual_stride;
    X* out = (X*)args.new_residual + r * size;
    const float squares = add_steer_row(out, x, residual, moves, size);
    const float rstd = 1.0f / std::sqrt(squares / float(size) + args.eps);
    norm((X*)args.normed + r * size, out, args.weight, rstd, size);
  }
}

}  // namespace STEERFAST_ISA
}  // namespace steerfast

#undef STEERFAST_INLINE
#undef STEERFAST_EACH_PART
#undef STEERFAST_ISA
#undef STEERFAST_WIDTH
#undef STEERFAST_TARGET
