// The sparse feed-forward network in vector types; included once per instruction set, inside its namespace (see isa.h).
//
// Letters: T tokens, D input width, O output width, F neurons, E experts, G neurons of an expert, N routed (token, expert) pairs.
//
// Both products stream along rows as they are stored, so nothing is packed and experts may have any size:
//   first    h[t, j] = x_t . w_j        tiles of TOKENS x 4 dot products, summed over vector lanes at the end
//   second   y_t += h[t, j] * down_j    2 vectors of some rows stay in registers while the tokens pass by
// Two ways to share the work, both without atomics on data, both the same result for the same number of threads:
//   few tokens    each thread takes some experts, and a y of its own that the last one adds up: every weight row is read once
//   many tokens   each thread takes blocks of tokens, whose x and y stay in its cache while the weights pass by

constexpr int TOKENS = MOEIFY_TOKENS;    // of a tile: as many as the registers hold beside 4 rows
constexpr int ROWS = 4;                  // weight rows of a tile of the first product
constexpr int64_t CHUNK_NEURONS = 16;    // of an expert, computed together: their rows, and those asked for meanwhile, stay in the caches
constexpr int64_t FEW_TOKENS = 64;
constexpr int64_t BLOCK_TOKENS = 512;    // most tokens of a block
constexpr int64_t EXPERT_TOKENS = 192;   // of a block, on average: fewer, and reading the weights costs more than the arithmetic
constexpr int64_t PANEL_BYTES = 32 << 10;  // of weight rows that stay in the first cache while tokens pass by
constexpr int64_t DOT_BYTES = 3 << 10;     // of a row that a tile multiplies at once, so that its x stays there, too
constexpr int64_t BLOCK_BYTES = 1 << 20;   // of x of a block: it stays in the second cache
constexpr int64_t ALIASED_BYTES = 4096;    // rows so far apart share the sets of the first cache: panels of them are copied
constexpr int64_t COPY_TOKENS = 24;        // from so many tokens on: the copy costs as much as one or two of them
constexpr int64_t HIDDEN_FLOATS = 48 << 10;  // of a block's experts, before the second product runs over them
constexpr int MAX_PIECES = 256;

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Rows that will be needed soon, asked for line by line between the arithmetic: experts lie anywhere in memory, the processor only follows
// what is contiguous, and asked for all at once they would fill its buffers and hold up the loads of what is computed now.
struct Ahead {
  const char *row[2 * CHUNK_NEURONS];
  int number = 0, next = 0;
  int64_t bytes = 0;               // of a row
  uint32_t pace = 0, credit = 0;   // lines at each step, and what is left of them, in 1 / 65536
  const char *at = nullptr, *end = nullptr;

  void clear(int64_t row_bytes) { number = next = 0, credit = 0, bytes = row_bytes, at = end = nullptr; }
  void add(const void *start) { row[number++] = (const char *)start; }
  // All of it in so many steps.
  void spread(int64_t steps) { pace = (uint32_t)((number * ((bytes + 63) / 64) << 16) / max64(steps, 1)) + 1; }
  inline void lines(int64_t n) {
    for (; n > 0; n--) {
      if (at >= end) {
        if (next == number) return;
        at = (const char *)((uintptr_t)row[next] & ~(uintptr_t)63), end = row[next++] + bytes;
      }
      __builtin_prefetch(at);
      at += 64;
    }
  }
  inline void step() {
    credit += pace;
    lines(credit >> 16);
    credit &= 0xFFFF;
  }
  void rest() { lines(INT64_MAX); }
};

struct Nothing {  // in the place of Ahead: x of many tokens passes by rows that are there already
  static inline void step() {}
};

// -- x as the first product reads it ---------------------------------------------------------------------------------------------------

template <class X, class IO>
struct Rows {  // another type
  static int64_t elements(int64_t width) { return round_up(width, 16); }
  static const X *get(const IO *x, X *converted, int64_t width) {
    for (int64_t k = 0; k < width; k++) converted[k] = to_float(x[k]);
    return converted;
  }
};
template <class X>
struct Rows<X, X> {
  static int64_t elements(int64_t) { return 0; }
  static const X *get(const X *x, X *, int64_t) { return x; }
};

// What the elements of a row are multiples of.
template <class X>
static inline float unit_of(const X *) {
  return 1.0f;
}

#if MOEIFY_INT16_DOT
// value[k] = q[k] * unit with |q| at most 32767: the error is at most 2^-16 of the largest value, or of 1e-34. If one is not finite, the
// unit is NaN. Values within one vector may be overwritten by their q.
template <class T>
static inline float to_int16(const T *value, int64_t n, int16_t *q) {
  const auto part = [value, n](int64_t k) { return (__m512)(k + W <= n ? load(value + k) : load_first(value + k, n - k)); };
  const auto mask = [n](int64_t k) { return (__mmask16)(k + W <= n ? 0xFFFF : (1 << (n - k)) - 1); };
  __m512 largest = _mm512_set1_ps(1e-34f);  // at least: the reciprocal must be a number
  __mmask16 nan = 0;
  for (int64_t k = 0; k < n; k += W) {
    const __m512 a = _mm512_abs_ps(part(k));
    nan |= _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    largest = _mm512_max_ps(a, largest);  // of a NaN and a number the second
  }
  const float most = _mm512_reduce_max_ps(largest);
  if (!nan && most <= FLT_MAX) {
    const __m512 inverse = _mm512_set1_ps(32767.0f / most);
    for (int64_t k = 0; k < n; k += W)
      _mm512_mask_cvtsepi32_storeu_epi16(q + k, mask(k), _mm512_cvtps_epi32(_mm512_mul_ps(part(k), inverse)));
    return most / 32767.0f;
  }
  for (int64_t k = 0; k < n; k += W) _mm512_mask_storeu_epi16(q + k, mask(k), _mm512_setzero_si512());
  return NAN;
}

// Whether one unit serves all values of each row: not where one of them is hundreds of times the others, whose error would exceed bf16's,
// nor where one is not finite.
template <class IO>
static bool fits_int16(const IO *x, int64_t stride, int64_t rows, int64_t width) {
  constexpr float MOST = 256.0f;  // times the root of the others' mean square; from some 500 on the error of the sum is twice bf16's
  for (int64_t t = 0; t < rows; t++) {
    const auto part = [row = x + t * stride, width](int64_t k) {
      return (__m512)(k + W <= width ? load(row + k) : load_first(row + k, width - k));
    };
    __m512 most = _mm512_setzero_ps(), squares = most;
    for (int64_t k = 0; k < width; k += W) most = _mm512_max_ps(most, _mm512_abs_ps(part(k)));
    const float m = _mm512_reduce_max_ps(most);
    if (m == 0.0f) continue;
    if (!(m > 1e-30f)) return false;
    const __m512 inverse = _mm512_set1_ps(1.0f / m);  // nothing overflows or vanishes
    for (int64_t k = 0; k < width; k += W) {
      const __m512 v = _mm512_mul_ps(part(k), inverse);
      squares = _mm512_fmadd_ps(v, v, squares);
    }
    if (!((float)width <= MOST * MOST * (_mm512_reduce_add_ps(squares) - 1.0f))) return false;  // also of a NaN
  }
  return true;
}

template <class IO>
struct Rows<int16_t, IO> {  // the unit stands before the first element
  static constexpr int64_t HEAD = 32;
  static int64_t elements(int64_t width) { return HEAD + round_up(width, 32); }
  static const int16_t *get(const IO *x, int16_t *converted, int64_t width) {
    const float unit = to_int16(x, width, converted + HEAD);
    memcpy(converted + HEAD - 2, &unit, 4);
    return converted + HEAD;
  }
};
static inline float unit_of(const int16_t *row) {
  float unit;
  memcpy(&unit, row - 2, 4);
  return unit;
}
#endif

// -- first product -------------------------------------------------------------------------------------------------------------------

#if MOEIFY_BF16_DOT
// Pairs of bf16 products, summed in fp32 by the processor.
struct DotBf16 {
  static constexpr int64_t STEP = 32;
  typedef __m512bh part;
  typedef vf total;
  static inline vf floats(total sum) { return sum; }
  static inline part get(const bf16 *p) { return (part)_mm512_loadu_si512(p); }
  static inline part get_first(const bf16 *p, int64_t n) { return (part)_mm512_maskz_loadu_epi16((1u << n) - 1u, p); }
  static inline vf add(vf sum, part a, part b) { return (vf)_mm512_dpbf16_ps((__m512)sum, a, b); }
};
#endif

#if MOEIFY_INT16_DOT
// Pairs of products of 16-bit integers, summed in 32 bits without error: int8 weights against x as Rows<int16_t> makes it. Few enough for
// 32 bits: a tile has at most DOT_BYTES / 2 elements, so a lane at most 48 steps of less than 2^23.
struct DotInt16 {
  static constexpr int64_t STEP = 32;
  typedef __m512i part;
  typedef vi total;
  static inline vf floats(total sum) { return (vf)_mm512_cvtepi32_ps((__m512i)sum); }
  static inline part get(const int16_t *p) { return _mm512_loadu_si512(p); }
  static inline part get(const int8_t *p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p)); }
  static inline part get_first(const int16_t *p, int64_t n) { return _mm512_maskz_loadu_epi16((1u << n) - 1u, p); }
  static inline part get_first(const int8_t *p, int64_t n) { return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8((1u << n) - 1u, p)); }
  static inline total add(total sum, part a, part b) { return (total)_mm512_dpwssd_epi32((__m512i)sum, a, b); }
};
#endif

struct DotFp32 {
  static constexpr int64_t STEP = W;
  typedef vf part;
  typedef vf total;
  static inline vf floats(total sum) { return sum; }
  template <class T>
  static inline part get(const T *p) { return load(p); }
  template <class T>
  static inline part get_first(const T *p, int64_t n) { return load_first(p, n); }
  static inline vf add(vf sum, vf a, vf b) { return sum + a * b; }
};

// Rows of a matrix: those from one on, or any.
template <class Wt>
struct Strided {
  const Wt *first;
  int64_t stride;
  inline const Wt *operator[](int64_t j) const { return first + j * stride; }
};
template <class Wt>
struct Listed {
  const Wt *const *row;
  inline const Wt *operator[](int64_t j) const { return row[j]; }
};

// out[i * out_stride + j] += x[i] . w[j] over the elements from first to end, fewer than a step.
template <class Dot, class X, class Matrix, int M, int N>
static __attribute__((noinline)) void dot_last(const X *const *x, Matrix w, int64_t first, int64_t end, float *out, int64_t out_stride) {
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++)
      out[i * out_stride + j] +=
          hsum(Dot::floats(Dot::add(typename Dot::total{}, Dot::get_first(x[i] + first, end - first),
                                    Dot::get_first(w[j] + first, end - first))));
}

// out[i * out_stride + j] (+)= x[i] . w[j] over the elements from first to end, i < M, j < N; adds unless first is 0.
template <class Dot, class X, class Matrix, int M, int N, class Asks>
static void dot_tile(const X *const *x, Matrix w, int64_t first, int64_t end, float *out, int64_t out_stride, Asks &ahead) {
  typename Dot::total sum[M][ROWS];
#pragma GCC unroll 8
  for (int i = 0; i < M; i++)
#pragma GCC unroll 8
    for (int j = 0; j < ROWS; j++) sum[i][j] = typename Dot::total{};
  int64_t k = first;
  for (; k + Dot::STEP <= end; k += Dot::STEP) {
    typename Dot::part a[M];
#pragma GCC unroll 8
    for (int i = 0; i < M; i++) a[i] = Dot::get(x[i] + k);
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) {
      const typename Dot::part b = Dot::get(w[j] + k);
#pragma GCC unroll 8
      for (int i = 0; i < M; i++) sum[i][j] = Dot::add(sum[i][j], a[i], b);
    }
    ahead.step();
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; i++) {
    float s[ROWS];
    hsum4(Dot::floats(sum[i][0]), Dot::floats(sum[i][1]), Dot::floats(sum[i][2]), Dot::floats(sum[i][3]), s);
    for (int j = 0; j < N; j++) out[i * out_stride + j] = first ? out[i * out_stride + j] + s[j] : s[j];
  }
  if (k < end) dot_last<Dot, X, Matrix, M, N>(x, w, k, end, out, out_stride);
}

template <class Dot, class X, int M, class Matrix, class Asks>
static inline void dot_rows(const X *const *x, Matrix w, int64_t first, int64_t end, float *out, int64_t out_stride, int64_t n,
                            Asks &ahead) {
  switch (n) {
    case 1: return dot_tile<Dot, X, Matrix, M, 1>(x, w, first, end, out, out_stride, ahead);
    case 2: return dot_tile<Dot, X, Matrix, M, 2>(x, w, first, end, out, out_stride, ahead);
    case 3: return dot_tile<Dot, X, Matrix, M, 3>(x, w, first, end, out, out_stride, ahead);
    default: return dot_tile<Dot, X, Matrix, M, 4>(x, w, first, end, out, out_stride, ahead);
  }
}

// The same for i < m <= TOKENS, j < n <= ROWS.
template <class Dot, class X, class Matrix, class Asks>
static inline void dot_any(const X *const *x, int64_t m, Matrix w, int64_t first, int64_t end, float *out, int64_t out_stride, int64_t n,
                           Asks &ahead) {
  switch (m) {
    case 1: return dot_rows<Dot, X, 1>(x, w, first, end, out, out_stride, n, ahead);
    case 2: return dot_rows<Dot, X, 2>(x, w, first, end, out, out_stride, n, ahead);
#if MOEIFY_TOKENS > 3
    case 3: return dot_rows<Dot, X, 3>(x, w, first, end, out, out_stride, n, ahead);
    case 4: return dot_rows<Dot, X, 4>(x, w, first, end, out, out_stride, n, ahead);
    case 5: return dot_rows<Dot, X, 5>(x, w, first, end, out, out_stride, n, ahead);
#endif
    default: return dot_rows<Dot, X, TOKENS>(x, w, first, end, out, out_stride, n, ahead);
  }
}

// -- second product ------------------------------------------------------------------------------------------------------------------
//
// y is summed in blocks of COLUMNS floats, in fp32. Rows of y are base + token * stride.

constexpr int COLUMNS = 2 * W;

// Sums in natural order; a unit of h is one neuron.
struct AddFp32 {
  static constexpr int NEURONS = 1;                 // of a unit
  static constexpr int UNITS = TOKENS > 3 ? 8 : 4;  // whose rows stay in registers
  static constexpr int GROUP = 4;                   // rows of one token at once
  static void convert(float *, int64_t, int64_t) {}
  static int64_t units(int64_t neurons) { return neurons; }
  static int64_t floats(int64_t n, int64_t neurons) { return n * neurons; }  // that h takes, converted

  template <class Wt, int N>
  static void pass(float *base, const uint16_t *token, int64_t n, int64_t stride, const float *h, int64_t h_stride, const float *,
                   const Wt *w, int64_t w_stride, bool) {
    vf row[N][2];
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) row[j][0] = load(w + j * w_stride), row[j][1] = load(w + j * w_stride + W);
    for (int64_t i = 0; i < n; i++) {
      float *y = base + token[i] * stride;
      vf sum0 = load(y), sum1 = load(y + W);
#pragma GCC unroll 8
      for (int j = 0; j < N; j++) {
        const vf a = splat(h[i * h_stride + j]);
        sum0 += a * row[j][0], sum1 += a * row[j][1];
      }
      store(y, sum0), store(y + W, sum1);
    }
  }

  template <class Wt, int N>
  struct Rows {  // of one token, with what they are multiplied by
    const float *value;
    explicit Rows(const float *value) : value(value) {}
    // y += sum over N rows of value * row, over COLUMNS columns from c on
    inline void add(float *y, const Wt *const *row, int64_t c) const {
      vf sum0 = load(y), sum1 = load(y + W);
      for (int j = 0; j < N; j++) {
        const vf a = splat(value[j]);
        sum0 += a * load(row[j] + c), sum1 += a * load(row[j] + c + W);
      }
      store(y, sum0), store(y + W, sum1);
    }
  };

  static inline void natural(float *) {}
};

#if MOEIFY_BF16_DOT || MOEIFY_INT16_DOT
// Two neurons at once. Interleaving two rows of 32 columns leaves columns 0-3, 8-11, 16-19, 24-27 in the first vector and the others in
// the second; sums stay in that order to the end.
struct AddPairs {
  static constexpr int NEURONS = 2;
  static constexpr int UNITS = 8;
  static int64_t units(int64_t neurons) { return (neurons + 1) / 2; }
  static inline void natural(float *y) {
    const __m512 low = _mm512_loadu_ps(y), high = _mm512_loadu_ps(y + 16);
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    _mm512_storeu_ps(y, _mm512_permutex2var_ps(low, first, high));
    _mm512_storeu_ps(y + 16, _mm512_permutex2var_ps(low, second, high));
  }
};
#endif

#if MOEIFY_BF16_DOT
// h rounded to bf16, as dense bf16 layers round it, and products summed in fp32.
struct AddBf16 : AddPairs {
  static constexpr int GROUP = 4;
  static inline uint32_t pair(float low, float high) { return to_bf16(low).bits | (uint32_t)to_bf16(high).bits << 16; }
  static int64_t floats(int64_t n, int64_t neurons) { return n * units(neurons); }

  // h in place: row i of n becomes units(neurons) pairs.
  static void convert(float *h, int64_t n, int64_t neurons) {
    const float *from = h;
    uint32_t *to = (uint32_t *)h;
    if (neurons % 2 == 0) {
      const int64_t size = n * neurons;  // buffers are padded to whole vectors
      for (int64_t k = 0; k < size; k += 16) {
        const __m256bh b = _mm512_cvtneps_pbh(_mm512_loadu_ps(from + k));
        memcpy((char *)to + 2 * k, &b, 32);
      }
      return;
    }
    for (int64_t i = 0; i < n; i++)
      for (int64_t j = 0; j < neurons; j += 2) {
        const uint32_t p = pair(from[i * neurons + j], j + 1 < neurons ? from[i * neurons + j + 1] : 0.0f);
        memcpy(to + i * units(neurons) + j / 2, &p, 4);
      }
  }

  // b null: zeros
  static inline void interleave(const bf16 *a, const bf16 *b, __m512bh *low, __m512bh *high) {
    const __m512i p = _mm512_loadu_si512(a), q = b ? _mm512_loadu_si512(b) : _mm512_setzero_si512();
    *low = (__m512bh)_mm512_unpacklo_epi16(p, q), *high = (__m512bh)_mm512_unpackhi_epi16(p, q);
  }

  template <class Wt, int N>
  static void pass(float *base, const uint16_t *token, int64_t n, int64_t stride, const float *h, int64_t h_stride, const float *,
                   const Wt *w, int64_t w_stride, bool odd) {
    __m512bh low[N], high[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) {
      const bf16 *first = w + 2 * j * w_stride;
      interleave(first, odd && j == N - 1 ? nullptr : first + w_stride, &low[j], &high[j]);
    }
    const int *pairs = (const int *)h;
    for (int64_t i = 0; i < n; i++) {
      float *y = base + token[i] * stride;
      __m512 sum0 = _mm512_loadu_ps(y), sum1 = _mm512_loadu_ps(y + 16);
#pragma GCC unroll 8
      for (int j = 0; j < N; j++) {
        const __m512bh a = (__m512bh)_mm512_set1_epi32(pairs[i * h_stride + j]);
        sum0 = _mm512_dpbf16_ps(sum0, a, low[j]), sum1 = _mm512_dpbf16_ps(sum1, a, high[j]);
      }
      _mm512_storeu_ps(y, sum0), _mm512_storeu_ps(y + 16, sum1);
    }
  }

  template <class Wt, int N>
  struct Rows {  // of one token, with what they are multiplied by
    uint32_t pairs[(N + 1) / 2];
    explicit Rows(const float *value) {
      for (int j = 0; j < N; j += 2) pairs[j / 2] = pair(value[j], j + 1 < N ? value[j + 1] : 0.0f);
    }
    inline void add(float *y, const Wt *const *row, int64_t c) const {
      __m512 sum0 = _mm512_loadu_ps(y), sum1 = _mm512_loadu_ps(y + 16);
      for (int j = 0; j < N; j += 2) {
        __m512bh low, high;
        interleave(row[j] + c, j + 1 < N ? row[j + 1] + c : nullptr, &low, &high);
        const __m512bh a = (__m512bh)_mm512_set1_epi32((int)pairs[j / 2]);
        sum0 = _mm512_dpbf16_ps(sum0, a, low), sum1 = _mm512_dpbf16_ps(sum1, a, high);
      }
      _mm512_storeu_ps(y, sum0), _mm512_storeu_ps(y + 16, sum1);
    }
  };
};
#endif

#if MOEIFY_INT16_DOT
// h in 16 bits: of each token and piece, 1 / 32767 of the largest |h| is the unit, and products are summed in 32 bits without error.
struct AddInt16 : AddPairs {
  static constexpr int GROUP = 8;
  static int64_t floats(int64_t n, int64_t neurons) { return n * (units(neurons) + 1); }

  // h in place: row i of n becomes units(neurons) pairs; behind all of them stand the rows' units.
  static void convert(float *h, int64_t n, int64_t neurons) {
    static_assert(CHUNK_NEURONS <= W, "a row is overwritten by what becomes of it");
    float unit[BLOCK_TOKENS];
    for (int64_t i = 0; i < n; i++) unit[i] = quantize(h + i * neurons, neurons, (int16_t *)(h + i * units(neurons)));
    memcpy(h + n * units(neurons), unit, 4 * n);
  }

  // Of an odd number the last pair is filled up with zero.
  static inline float quantize(const float *value, int64_t neurons, int16_t *pairs) {
    const float unit = to_int16(value, neurons, pairs);
    const int16_t zero = 0;
    if (neurons % 2) memcpy(pairs + neurons, &zero, 2);
    return unit;
  }

  // b null: zeros
  static inline void interleave(const int8_t *a, const int8_t *b, __m512i *low, __m512i *high) {
    const __m512i p = DotInt16::get(a), q = b ? DotInt16::get(b) : _mm512_setzero_si512();
    *low = _mm512_unpacklo_epi16(p, q), *high = _mm512_unpackhi_epi16(p, q);
  }

  template <class Wt, int N>
  static void pass(float *base, const uint16_t *token, int64_t n, int64_t stride, const float *h, int64_t h_stride, const float *unit,
                   const Wt *w, int64_t w_stride, bool odd) {
    __m512i low[N], high[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) {
      const int8_t *first = w + 2 * j * w_stride;
      interleave(first, odd && j == N - 1 ? nullptr : first + w_stride, &low[j], &high[j]);
    }
    const int *pairs = (const int *)h;
    for (int64_t i = 0; i < n; i++) {
      float *y = base + token[i] * stride;
      __m512i sum0 = _mm512_setzero_si512(), sum1 = sum0;
#pragma GCC unroll 8
      for (int j = 0; j < N; j++) {
        const __m512i a = _mm512_set1_epi32(pairs[i * h_stride + j]);
        sum0 = _mm512_dpwssd_epi32(sum0, a, low[j]), sum1 = _mm512_dpwssd_epi32(sum1, a, high[j]);
      }
      add_scaled(y, sum0, sum1, unit[i]);
    }
  }

  template <class Wt, int N>
  struct Rows {  // of one token, with what they are multiplied by
    int32_t pairs[(N + 1) / 2];
    float unit;
    explicit Rows(const float *value) : unit(quantize(value, N, (int16_t *)pairs)) {}
    inline void add(float *y, const Wt *const *row, int64_t c) const {
      __m512i sum0 = _mm512_setzero_si512(), sum1 = sum0;
#pragma GCC unroll 4
      for (int j = 0; j < N; j += 2) {
        __m512i low, high;
        interleave(row[j] + c, j + 1 < N ? row[j + 1] + c : nullptr, &low, &high);
        const __m512i a = _mm512_set1_epi32(pairs[j / 2]);
        sum0 = _mm512_dpwssd_epi32(sum0, a, low), sum1 = _mm512_dpwssd_epi32(sum1, a, high);
      }
      add_scaled(y, sum0, sum1, unit);
    }
  };

  static inline void add_scaled(float *y, __m512i sum0, __m512i sum1, float unit) {
    const __m512 u = _mm512_set1_ps(unit);
    _mm512_storeu_ps(y, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum0), u, _mm512_loadu_ps(y)));
    _mm512_storeu_ps(y + 16, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum1), u, _mm512_loadu_ps(y + 16)));
  }
};
#endif

// Rows token[i] of base (+ token * stride), i < n, += h[i] . w, over COLUMNS columns.
template <class Add, class Wt>
static inline void add_rows(float *base, const uint16_t *token, int64_t n, int64_t stride, const float *h, int64_t neurons, const Wt *w,
                            int64_t w_stride) {
  typedef void (*Pass)(float *, const uint16_t *, int64_t, int64_t, const float *, int64_t, const float *, const Wt *, int64_t, bool);
  static constexpr Pass passes[] = {
      Add::template pass<Wt, 1>, Add::template pass<Wt, 2>, Add::template pass<Wt, 3>, Add::template pass<Wt, 4>,
#if MOEIFY_TOKENS > 3
      Add::template pass<Wt, 5>, Add::template pass<Wt, 6>, Add::template pass<Wt, 7>, Add::template pass<Wt, 8>,
#endif
  };
  const int64_t units = Add::units(neurons), per_unit = Add::NEURONS;
  for (int64_t u = 0; u < units; u += Add::UNITS) {
    const int64_t number = min64(Add::UNITS, units - u);
    const bool odd = (u + number) * per_unit > neurons;
    passes[number - 1](base, token, n, stride, h + u, units, h + n * units, w + u * per_unit * w_stride, w_stride, odd);
  }
}

// A range of neurons and the tokens that take them.
struct Piece {
  const uint16_t *token;
  int64_t num_tokens, start, neurons;
};

// Tiles of n tokens: as few as can be, and as equal.
struct Tiles {
  int64_t n, number;
  Tiles(int64_t n, int64_t most) : n(n), number((n + most - 1) / most) {}
  int64_t start(int64_t tile) const { return n * tile / number; }
};

// -- one network ---------------------------------------------------------------------------------------------------------------------

// X: type of x as the first product reads it; Wt: type of the weights; Dot: how they are multiplied; IO: type of x and y in memory.
template <class Dot_, class Add_, class IO, class X, class Wt>
struct Network {
  typedef Dot_ Dot;
  typedef Add_ Add;
  const moeify_ffn &f;
  int64_t out_width;  // O rounded up to whole tiles: width of a y of our own

  explicit Network(const moeify_ffn &ffn) : f(ffn), out_width(round_up(ffn.d_out, COLUMNS)) {}

  int64_t first_neuron(int64_t e) const {
    const int64_t larger = f.num_neurons % f.num_experts;
    return e * (f.num_neurons / f.num_experts) + min64(e, larger);
  }
  int64_t expert_size(int64_t e) const { return f.num_neurons / f.num_experts + (e < f.num_neurons % f.num_experts); }

  // Elements of a row that a tile multiplies at once.
  int64_t dot_width() const {
    const int64_t steps = (f.d_in * (int64_t)std::max(sizeof(Wt), sizeof(X)) + DOT_BYTES - 1) / DOT_BYTES;
    return round_up((f.d_in + steps - 1) / steps, Dot::STEP);
  }

  // h of a piece, row i of which is x[i], as the second product wants it; gate: as much scratch again. Both are written to the end of a
  // vector.
  void hidden(const X *const *x, const Piece &piece, float *h, float *gate) const {
    Nothing nothing;
    hidden(x, piece, h, gate, nothing);
  }

  // Meanwhile asks for what lies ahead.
  template <class Asks>
  void hidden(const X *const *x, const Piece &piece, float *h, float *gate, Asks &ahead) const {
    const int64_t n = piece.num_tokens, neurons = piece.neurons;
    // Rows of gate and up that stay in the first cache pass by each tile of x together: x, which comes from further away, is read once.
    const int64_t step = dot_width();
    const int64_t row_bytes = step * (int64_t)sizeof(Wt) * (f.gate ? 2 : 1);
    const int64_t rows = max64(ROWS, PANEL_BYTES / row_bytes / ROWS * ROWS);
    const Tiles tiles(n, TOKENS);
    for (int64_t first = 0; first < neurons; first += rows)
      for (int64_t k = 0; k < f.d_in; k += step) {
        const int64_t number = min64(rows, neurons - first), end = min64(k + step, f.d_in);
        Wt up_copy[COPY_ELEMENTS], gate_copy[COPY_ELEMENTS];
        const Panel up(f.up, f.up_stride, piece.start + first, number, k, end, n, up_copy);
        const Panel gated = f.gate ? Panel(f.gate, f.gate_stride, piece.start + first, number, k, end, n, gate_copy) : up;
        for (int64_t tile = 0; tile < tiles.number; tile++) {
          const int64_t i = tiles.start(tile), m = tiles.start(tile + 1) - i;
          up.product(x + i, m, h + i * neurons + first, neurons, ahead);
          if (f.gate) gated.product(x + i, m, gate + i * neurons + first, neurons, ahead);
        }
      }
    scale_and_shift(x, h, n, piece.start, neurons, f.up_scale, f.up_bias);
    if (f.gate) scale_and_shift(x, gate, n, piece.start, neurons, f.gate_scale, f.gate_bias);
    const int64_t size = n * neurons;
    for (int64_t k = 0; k < size; k += W)
      store(h + k, f.gate ? activate(load(gate + k), f.activation) * load(h + k) : activate(load(h + k), f.activation));
  }

  static constexpr int64_t COPY_PADDING = 128;  // bytes after a row, at most: the next one begins in another set of the cache
  static constexpr int64_t COPY_ELEMENTS = (PANEL_BYTES + CHUNK_NEURONS * COPY_PADDING) / sizeof(Wt);

  // Elements k to end of some rows of a matrix.
  struct Panel {
    const Wt *w;  // element 0 of the first row
    int64_t stride, rows, k, end;

    Panel(const void *weight, int64_t stride, int64_t first, int64_t rows, int64_t k, int64_t end, int64_t num_tokens, Wt *copy)
        : w(static_cast<const Wt *>(weight) + first * stride), stride(stride), rows(rows), k(k), end(end) {
      if (num_tokens < COPY_TOKENS || stride * (int64_t)sizeof(Wt) % ALIASED_BYTES) return;
      const int64_t line = 64 / (int64_t)sizeof(Wt), width = round_up(end - k, line) + line;
      for (int64_t j = 0; j < rows; j++) memcpy((void *)(copy + j * width), w + j * stride + k, (end - k) * sizeof(Wt));
      w = copy - k;
      this->stride = width;
    }

    template <class Asks>
    void product(const X *const *x, int64_t m, float *out, int64_t out_stride, Asks &ahead) const {
      for (int64_t j = 0; j < rows; j += ROWS)
        dot_any<Dot, X>(x, m, Strided<Wt>{w + j * stride, stride}, k, end, out + j, out_stride, min64(ROWS, rows - j), ahead);
    }
  };

  void scale_and_shift(const X *const *x, float *out, int64_t n, int64_t start, int64_t neurons, const float *scale,
                       const void *bias) const {
    if (!scale && !bias) return;
    for (int64_t i = 0; i < n; i++)
      for (int64_t j = 0; j < neurons; j++) {
        float value = out[i * neurons + j];
        if (scale) value *= scale[start + j] * unit_of(x[i]);
        if (bias) value += to_float(static_cast<const IO *>(bias)[start + j]);
        out[i * neurons + j] = value;
      }
  }

  // Ask for columns c to c + width of the rows that the second product of a piece reads, of which there are few lines.
  // Always inlined: GCC takes a function that only prefetches for one without effect, and drops calls to it.
  inline __attribute__((always_inline)) void prefetch_second(const Piece &piece, int64_t c, int64_t width) const {
    for (int64_t j = piece.start; j < piece.start + piece.neurons; j++) {
      const char *row = (const char *)((const Wt *)f.down + j * f.down_stride + c);
      for (int64_t k = 0; k < min64(width, f.d_out - c) * (int64_t)sizeof(Wt); k += 64) __builtin_prefetch(row + k);
    }
  }

  // The rows that the first product of a piece reads.
  void ask_first(const Piece &piece, Ahead &ahead) const {
    ahead.clear(f.d_in * (int64_t)sizeof(Wt));
    for (int64_t j = piece.start; j < piece.start + piece.neurons; j++) {
      ahead.add((const Wt *)f.up + j * f.up_stride);
      if (f.gate) ahead.add((const Wt *)f.gate + j * f.gate_stride);
    }
  }

  // The rows that its second product reads, whose h is there; of one token: not those of zeros.
  void ask_second(const Piece &piece, const float *h, Ahead &ahead) const {
    ahead.clear(f.d_out * (int64_t)sizeof(Wt));
    for (int64_t j = 0; j < piece.neurons; j++)
      if (piece.num_tokens > 1 || h[j] != 0.0f) ahead.add((const Wt *)f.down + (piece.start + j) * f.down_stride);
  }

  // Steps that Ahead takes while a product of a piece runs.
  int64_t first_steps(const Piece &piece) const {
    const int64_t panels = (piece.neurons + ROWS - 1) / ROWS * (f.gate ? 2 : 1);
    return Tiles(piece.num_tokens, TOKENS).number * panels * (f.d_in / Dot::STEP);
  }
  int64_t second_steps(const Piece &piece) const {
    return out_width / COLUMNS * (piece.num_tokens == 1 ? (piece.neurons + Add::GROUP - 1) / Add::GROUP : 1);
  }

  // Rows token[i] of base (+ token * stride) += h[i] . down, columns c to c + COLUMNS.
  void add_columns(float *base, int64_t stride, const Piece &piece, const float *h, int64_t c) const {
    const Wt *w = static_cast<const Wt *>(f.down) + piece.start * f.down_stride + c;
    int64_t w_stride = f.down_stride;
    Wt padded[CHUNK_NEURONS * COLUMNS];
    if (f.d_out - c < COLUMNS) {  // the last columns: nothing beyond them may be read
      w = pad(padded, w, piece.neurons, f.d_out - c);
      w_stride = COLUMNS;
    }
    add_rows<Add, Wt>(base, piece.token, piece.num_tokens, stride, h, piece.neurons, w, w_stride);
  }

  const Wt *pad(Wt *padded, const Wt *w, int64_t rows, int64_t width) const {
    memset((void *)padded, 0, rows * COLUMNS * sizeof(Wt));
    for (int64_t j = 0; j < rows; j++) memcpy((void *)(padded + j * COLUMNS), w + j * f.down_stride, width * sizeof(Wt));
    return padded;
  }

  Strided<Wt> down_of(const Piece &piece) const { return {static_cast<const Wt *>(f.down) + piece.start * f.down_stride, f.down_stride}; }

  // One token: y += sum of h[j] * down[j], without reading the rows of neurons whose h is zero (ReLU). h in fp32.
  template <class Matrix>
  void add_nonzero(float *y, const float *h, Matrix down, int64_t neurons, Ahead &ahead) const {
    const Wt *row[Add::GROUP];
    float value[Add::GROUP];
    int n = 0;
    for (int64_t j = 0; j < neurons; j++) {
      if (h[j] == 0.0f) continue;
      row[n] = down[j];
      value[n++] = h[j];
      if (n == Add::GROUP) add<Add::GROUP>(y, value, row, ahead), n = 0;
    }
    switch (n) {  // no filling up with zeros: zero times infinity is no zero
      case 1: return add<1>(y, value, row, ahead);
      case 2: return add<2>(y, value, row, ahead);
      case 3: return add<3>(y, value, row, ahead);
    }
    if constexpr (Add::GROUP == 8) switch (n) {
        case 4: return add<4>(y, value, row, ahead);
        case 5: return add<5>(y, value, row, ahead);
        case 6: return add<6>(y, value, row, ahead);
        case 7: return add<7>(y, value, row, ahead);
      }
  }

  template <int N>
  void add(float *y, const float *value, const Wt *const *row, Ahead &ahead) const {
    const typename Add::template Rows<Wt, N> rows(value);
    int64_t c = 0;
    for (; c + COLUMNS <= f.d_out; c += COLUMNS) rows.add(y + c, row, c), ahead.step();
    if (c == f.d_out) return;
    Wt padded[N][COLUMNS] = {};
    const Wt *last[N];
    for (int j = 0; j < N; j++) memcpy((void *)padded[j], row[j] + c, (f.d_out - c) * sizeof(Wt)), last[j] = padded[j];
    rows.add(y + c, last, 0);
  }
};

// Columns from c on of one token: sums, in the order of Add, to y.
template <class Add, class IO>
static inline void write_block(const moeify_ffn &f, IO *y, float *sum, int64_t c) {
  const int64_t width = min64(COLUMNS, f.d_out - c);
  Add::natural(sum);
  if (f.down_scale)
    for (int64_t k = 0; k < width; k++) sum[k] *= f.down_scale[c + k];
  if (f.down_bias)
    for (int64_t k = 0; k < width; k++) sum[k] += to_float(((const IO *)f.down_bias)[c + k]);
  if (width == COLUMNS)  // a fixed number: this becomes vectors
    for (int k = 0; k < COLUMNS; k++) convert_to(y[c + k], sum[k]);
  else
    for (int64_t k = 0; k < width; k++) convert_to(y[c + k], sum[k]);
}

// Buffers cut from one piece of memory, each at 64 bytes and apart from the next. Without memory it only counts: the constructors of what
// lies in it say in one place how large it is and where.
struct Arena {
  static constexpr int64_t GAP = 64;
  char *memory;
  int64_t used = 0;

  explicit Arena(char *memory) : memory(memory) {}

  template <class T>
  T *take(int64_t number) {
    const int64_t at = used, end = at + number * (int64_t)sizeof(T);
    used = round_up(end, 64) + GAP;
    if (!memory) return nullptr;
    forbid(memory + end, used - end);
    return (T *)(memory + at);
  }
};

template <class Layout, class... Sizes>
static int64_t bytes_of(const Sizes &...sizes) {
  Arena counter(nullptr);
  Layout layout(counter, sizes...);
  return counter.used;
}

// Tokens of each expert, in order.
struct Lists {
  int32_t *count;   // E
  uint16_t *token;  // expert e's from e * stride on
  int64_t stride;

  Lists(Arena &arena, int64_t tokens, int64_t experts)
      : count(arena.take<int32_t>(experts)), token(arena.take<uint16_t>(tokens * experts)), stride(tokens) {}

  const uint16_t *of(int64_t e) const { return token + e * stride; }

  void build(const uint8_t *mask, int64_t tokens, int64_t experts) {
    for (int64_t e = 0; e < experts; e++) count[e] = 0;
    for (int64_t t = 0; t < tokens; t++)
      for (int64_t e = 0; e < experts; e++) {  // without a branch: half of them would be guessed wrong
        token[e * stride + count[e]] = (uint16_t)t;
        count[e] += mask[t * experts + e] != 0;
      }
  }
};

// The experts from one to another that have tokens, in pieces of limited size; neighbours that every token takes are as one.
template <class Net>
struct Pieces {
  const Net &net;
  const Lists &lists;
  const int64_t all_tokens, last;
  int64_t expert;                // the next one
  int64_t most = CHUNK_NEURONS;  // of a piece
  int64_t start = 0, end = 0;    // neurons that are left of those before
  int64_t num_tokens = 0;        // that take them
  const uint16_t *token = nullptr;

  bool next(Piece *piece) {
    if (start == end) {
      while (expert < last && !lists.count[expert]) expert++;
      if (expert == last) return false;
      start = end = net.first_neuron(expert);
      num_tokens = lists.count[expert], token = lists.of(expert);
      do end += net.expert_size(expert++);
      while (num_tokens == all_tokens && expert < last && lists.count[expert] == all_tokens);
    }
    *piece = {token, num_tokens, start, min64(most, end - start)};
    start += piece->neurons;
    return true;
  }
};

// y of each token from what every thread has of it, in the order of the threads.
template <class Net, class Job>
static void add_up(const Job &job, int threads) {
  const Net &net = job.net;
  for (int64_t t = 0; t < job.num_tokens; t++) {
    float *sum = job.own(0).sums + t * net.out_width;
    for (int k = 1; k < threads; k++) {
      const float *other = job.own(k).sums + t * net.out_width;
      for (int64_t c = 0; c < net.out_width; c++) sum[c] += other[c];
    }
    for (int64_t c = 0; c < net.f.d_out; c += COLUMNS)
      write_block<typename Net::Add>(net.f, job.y + t * job.y_stride, sum + c, c);
  }
}

// -- few tokens: threads share the experts -------------------------------------------------------------------------------------------

template <class Net, class IO, class X>
struct FewTokens {
  // What all threads read.
  struct Shared {
    Lists lists;
    X *converted;  // x, where it is not read as it is
    Shared(Arena &arena, const Net &net, int64_t tokens)
        : lists(arena, tokens, net.f.num_experts),
          converted(arena.take<X>(tokens * Rows<X, IO>::elements(net.f.d_in))) {}
  };
  // What each thread has of its own.
  struct Own {
    float *sums, *h[2], *gate;
    Own(Arena &arena, const Net &net, int64_t tokens)
        : sums(arena.take<float>(tokens * net.out_width)),
          h{arena.take<float>(tokens * CHUNK_NEURONS + W), arena.take<float>(tokens * CHUNK_NEURONS + W)},
          gate(arena.take<float>(tokens * CHUNK_NEURONS + W)) {}
  };

  const Net &net;
  int64_t num_tokens;
  IO *y;
  int64_t y_stride;
  const Lists &lists;
  const X *const *rows;  // x of each token
  char *memory;          // per_thread bytes for each thread
  int64_t per_thread;

  Own own(int thread) const {
    Arena arena(memory + thread * per_thread);
    return Own(arena, net, num_tokens);
  }

  static void task(void *self, int thread, int num_threads) { static_cast<FewTokens *>(self)->run(thread, num_threads); }

  // What an expert costs: its rows are read whatever the tokens, and each token adds arithmetic.
  int64_t cost(int64_t e) const {
    const int64_t n = lists.count[e];
    return n ? net.expert_size(e) * (4 + n) : 0;
  }

  void run(int thread, int num_threads) {
    const Own own = this->own(thread);
    memset(own.sums, 0, 4 * num_tokens * net.out_width);
    const int64_t experts = net.f.num_experts;
    int64_t total = 0, before = 0;
    for (int64_t e = 0; e < experts; e++) total += cost(e);
    const int64_t first = total * thread / num_threads, last = total * (thread + 1) / num_threads;
    int64_t begin = 0, end = 0;  // experts whose share begins here
    for (; begin < experts && before < first; begin++) before += cost(begin);
    for (end = begin; end < experts && before < last; end++) before += cost(end);
    Pieces<Net> pieces{net, lists, num_tokens, end, begin};
    // Three pieces are under way: while the first product of one runs, the down rows of the one before are asked for; while the second
    // product of that one runs, the first rows of the one after.
    Piece piece = {}, done = {}, following = {};
    bool has = pieces.next(&piece), had = false;
    float *h = own.h[0], *h_done = own.h[1];
    Ahead ahead;
    if (has) net.ask_first(piece, ahead), ahead.rest();
    while (has || had) {
      if (has) {
        ahead.spread(net.first_steps(piece));
        first_product(piece, h, own.gate, ahead);
      }
      ahead.rest();
      const bool more = has && pieces.next(&following);
      if (more) net.ask_first(following, ahead);
      if (had) {
        ahead.spread(net.second_steps(done));
        second_product(done, h_done, own.sums, ahead);
      }
      ahead.rest();
      if (has) net.ask_second(piece, h, ahead);
      std::swap(h, h_done);
      done = piece, piece = following, had = has, has = more;
    }
  }

  void first_product(const Piece &piece, float *h, float *gate, Ahead &ahead) {
    const X *in[FEW_TOKENS];
    for (int64_t i = 0; i < piece.num_tokens; i++) in[i] = rows[piece.token[i]];
    net.hidden(in, piece, h, gate, ahead);
    if (piece.num_tokens > 1) Net::Add::convert(h, piece.num_tokens, piece.neurons);
  }

  void second_product(const Piece &piece, const float *h, float *sums, Ahead &ahead) {
    if (piece.num_tokens == 1) return net.add_nonzero(sums + piece.token[0] * net.out_width, h, net.down_of(piece), piece.neurons, ahead);
    for (int64_t c = 0; c < net.f.d_out; c += COLUMNS) net.add_columns(sums + c, net.out_width, piece, h, c), ahead.step();
  }

  void finish(int threads) { add_up<Net>(*this, threads); }
};

// -- many tokens: threads share the tokens -------------------------------------------------------------------------------------------

template <class Net, class IO, class X>
struct ManyTokens {
  // What each thread has of its own, for one block.
  struct Own {
    Lists lists;
    float *sums, *h, *gate;
    X *converted;
    Own(Arena &arena, const Net &net, int64_t tokens)
        : lists(arena, tokens, net.f.num_experts),
          sums(arena.take<float>(tokens * net.out_width)),
          h(arena.take<float>(HIDDEN_FLOATS + tokens * CHUNK_NEURONS + W)),  // full once HIDDEN_FLOATS are used: then one piece more is in
          gate(arena.take<float>(tokens * CHUNK_NEURONS + W)),
          converted(arena.take<X>(tokens * Rows<X, IO>::elements(net.f.d_in))) {}
  };

  const Net &net;
  const IO *x;
  int64_t x_stride;
  const uint8_t *mask;
  int64_t num_tokens, block_tokens;
  IO *y;
  int64_t y_stride;
  char *memory;
  int64_t per_thread;
  std::atomic<int64_t> next;  // first token that nobody has

  static void task(void *self, int thread, int) { static_cast<ManyTokens *>(self)->run(thread); }

  void run(int thread) {
    Arena arena(memory + thread * per_thread);
    Own own(arena, net, block_tokens);
    for (int64_t first; (first = next.fetch_add(block_tokens, std::memory_order_relaxed)) < num_tokens;)
      block(own, first, min64(block_tokens, num_tokens - first));
  }

  struct Ready {  // a piece whose h is at a place
    Piece piece;
    int64_t at;
  };

  // y of a block stands in columns of COLUMNS floats, all tokens of a column together: it stays in the first cache, and rows of a power
  // of two do not share its sets.
  void block(Own &own, int64_t first, int64_t n) {
    typedef typename Net::Add Add;
    const int64_t experts = net.f.num_experts;
    own.lists.build(mask + first * experts, n, experts);
    memset(own.sums, 0, 4 * n * net.out_width);
    const X *rows[BLOCK_TOKENS];
    for (int64_t t = 0; t < n; t++)
      rows[t] = Rows<X, IO>::get(x + (first + t) * x_stride, own.converted + t * Rows<X, IO>::elements(net.f.d_in), net.f.d_in);

    Ready ready[MAX_PIECES];
    int number = 0;
    int64_t used = 0;
    const X *in[BLOCK_TOKENS];
    Pieces<Net> pieces{net, own.lists, n, experts, 0};
    Piece piece = {}, following = {};
    Ahead ahead;
    for (bool more = pieces.next(&piece); more; piece = following) {
      more = pieces.next(&following);
      if (more) net.ask_first(following, ahead), ahead.spread(net.first_steps(piece));
      for (int64_t i = 0; i < piece.num_tokens; i++) in[i] = rows[piece.token[i]];
      net.hidden(in, piece, own.h + used, own.gate, ahead);
      ahead.rest();
      Add::convert(own.h + used, piece.num_tokens, piece.neurons);
      ready[number++] = {piece, used};
      used += round_up(max64(piece.num_tokens * piece.neurons, Add::floats(piece.num_tokens, piece.neurons)), W);
      if (used >= HIDDEN_FLOATS || number == MAX_PIECES) {
        second(own, ready, number, n);
        used = number = 0;
      }
    }
    second(own, ready, number, n);

    for (int64_t t = 0; t < n; t++)
      for (int64_t c = 0; c < net.f.d_out; c += COLUMNS)
        write_block<Add, IO>(net.f, y + (first + t) * y_stride, own.sums + c * n + t * COLUMNS, c);
  }

  void second(const Own &own, const Ready *ready, int number, int64_t n) {
    for (int64_t c = 0; c < net.f.d_out; c += COLUMNS)
      for (int p = 0; p < number; p++) {
        if (p + 1 < number) net.prefetch_second(ready[p + 1].piece, c, COLUMNS);
        net.add_columns(own.sums + c * n, COLUMNS, ready[p].piece, own.h + ready[p].at, c);
      }
  }
};

// -- entry ---------------------------------------------------------------------------------------------------------------------------

struct Call {
  const moeify_ffn &f;
  const void *x;
  int64_t x_stride;
  const uint8_t *mask;
  int64_t num_tokens;
  void *y;
  int64_t y_stride;
  int num_threads;

  template <class Dot, class Add, class IO, class X, class Wt>
  int run() const;
};

template <class Dot, class Add, class IO, class X, class Wt>
int Call::run() const {
  typedef Network<Dot, Add, IO, X, Wt> Net;
  const Net net(f);
  if (num_tokens <= FEW_TOKENS) {
    typedef FewTokens<Net, IO, X> Job;
    const int64_t per_thread = bytes_of<typename Job::Own>(net, num_tokens);
    char *memory = scratch(per_thread * num_threads + bytes_of<typename Job::Shared>(net, num_tokens));
    if (!memory) return MOEIFY_NO_MEMORY;
    Arena arena(memory + per_thread * num_threads);
    typename Job::Shared shared(arena, net, num_tokens);
    const X *rows[FEW_TOKENS];
    for (int64_t t = 0; t < num_tokens; t++)
      rows[t] = Rows<X, IO>::get((const IO *)x + t * x_stride, shared.converted + t * Rows<X, IO>::elements(f.d_in), f.d_in);
    shared.lists.build(mask, num_tokens, f.num_experts);
    Job job{net, num_tokens, (IO *)y, y_stride, shared.lists, rows, memory, per_thread};
    job.finish(parallel(num_threads, &Job::task, &job));
    return MOEIFY_OK;
  }
  typedef ManyTokens<Net, IO, X> Job;
  int64_t pairs = 0;
  for (int64_t k = 0; k < num_tokens * f.num_experts; k++) pairs += mask[k] != 0;
  // Tokens enough for every expert, but at least one block a thread, and equal blocks.
  const int64_t share = (num_tokens + num_threads - 1) / num_threads;
  const int64_t fitting = max64(128, BLOCK_BYTES / (f.d_in * (int64_t)sizeof(X)));
  const int64_t wanted = min64(min64(BLOCK_TOKENS, fitting), max64(128, EXPERT_TOKENS * num_tokens * f.num_experts / max64(pairs, 1)));
  const int64_t blocks = (share + wanted - 1) / wanted, block = (share + blocks - 1) / blocks;
  const int64_t per_thread = bytes_of<typename Job::Own>(net, block);
  char *memory = scratch(per_thread * num_threads);
  if (!memory) return MOEIFY_NO_MEMORY;
  Job job{net, (const IO *)x, x_stride, mask, num_tokens, block, (IO *)y, y_stride, memory, per_thread, {0}};
  parallel(num_threads, &Job::task, &job);
  return MOEIFY_OK;
}

// What `job` computes, by the types of a network's weights and input: job.template run<Dot, Add, IO, X, Wt>().
template <class Job>
static int by_type(const moeify_ffn &f, const void *x, int64_t x_stride, int64_t num_tokens, const Job &job) {
  (void)x, (void)x_stride, (void)num_tokens;
  const bool is_int8 = f.weight_dtype == MOEIFY_INT8;
  if (f.dtype == MOEIFY_FP32)
    return is_int8 ? job.template run<DotFp32, AddFp32, float, float, int8_t>() : job.template run<DotFp32, AddFp32, float, float, float>();
#if MOEIFY_INT16_DOT
  if (is_int8 && fits_int16((const bf16 *)x, x_stride, num_tokens, f.d_in))
    return job.template run<DotInt16, AddInt16, bf16, int16_t, int8_t>();
#endif
  if (is_int8) return job.template run<DotFp32, AddFp32, bf16, float, int8_t>();
#if MOEIFY_BF16_DOT
  return job.template run<DotBf16, AddBf16, bf16, bf16, bf16>();
#else
  return job.template run<DotFp32, AddFp32, bf16, float, bf16>();
#endif
}
