// The sparse feed-forward network in vector types; included once per instruction set, inside its namespace (see isa.h).
//
// Letters: T tokens, D input width, O output width, F neurons, E experts, G neurons of an expert, N routed (token, expert) pairs.
//
// Both products stream along rows as they are stored, so nothing is packed and experts may have any size:
//   first    h[t, j] = x_t . w_j        tiles of TOKENS x 4 dot products, summed over vector lanes at the end
//   second   y_t += h[t, j] * down_j    tiles of 2 * TOKENS x 2 vectors of y
// Two ways to share the work, both without atomics on data, both the same result for the same number of threads:
//   few tokens    each thread takes some experts, and a y of its own that the last one adds up: every weight row is read once
//   many tokens   each thread takes blocks of tokens, whose x and y stay in its cache while the weights pass by

constexpr int TOKENS = MOEIFY_TOKENS;    // of a tile: as many as the registers hold beside 4 rows
constexpr int ROWS = 4;                  // weight rows of a tile of the first product
constexpr int64_t CHUNK_NEURONS = 64;    // of an expert, computed together: h of a chunk stays in the first cache
constexpr int64_t FEW_TOKENS = 64;
constexpr int64_t BLOCK_TOKENS = 512;    // most tokens of a block
constexpr int64_t EXPERT_TOKENS = 48;    // of a block, on average: fewer, and reading the weights costs more than the arithmetic
constexpr int64_t PANEL_BYTES = 24 << 10;  // of weight rows that stay in the first cache while tokens pass by
constexpr int64_t DOT_BYTES = 3 << 10;     // of a row that a tile multiplies at once, so that its x stays there, too
constexpr int64_t HIDDEN_FLOATS = 48 << 10;  // of a block's experts, before the second product runs over them
constexpr int MAX_PIECES = 256;

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// -- first product -------------------------------------------------------------------------------------------------------------------

#if MOEIFY_BF16_DOT
// Pairs of bf16 products, summed in fp32 by the processor.
struct DotBf16 {
  static constexpr int64_t STEP = 32;
  typedef __m512bh part;
  static inline part get(const bf16 *p) { return (part)_mm512_loadu_si512(p); }
  static inline part get_first(const bf16 *p, int64_t n) { return (part)_mm512_maskz_loadu_epi16((1u << n) - 1u, p); }
  static inline vf add(vf sum, part a, part b) { return (vf)_mm512_dpbf16_ps((__m512)sum, a, b); }
};
#endif

struct DotFp32 {
  static constexpr int64_t STEP = W;
  typedef vf part;
  template <class T>
  static inline part get(const T *p) { return load(p); }
  template <class T>
  static inline part get_first(const T *p, int64_t n) { return load_first(p, n); }
  static inline vf add(vf sum, vf a, vf b) { return sum + a * b; }
};

// out[i * out_stride + j] += x[i] . (w + j * w_stride) over the elements from first to end, fewer than a step.
template <class Dot, class X, class Wt, int M, int N>
static __attribute__((noinline)) void dot_last(const X *const *x, const Wt *w, int64_t w_stride, int64_t first, int64_t end, float *out,
                                               int64_t out_stride) {
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++)
      out[i * out_stride + j] +=
          hsum(Dot::add(vf{}, Dot::get_first(x[i] + first, end - first), Dot::get_first(w + j * w_stride + first, end - first)));
}

// out[i * out_stride + j] (+)= x[i] . (w + j * w_stride) over the elements from first to end, i < M, j < N; adds unless first is 0.
template <class Dot, class X, class Wt, int M, int N>
static void dot_tile(const X *const *x, const Wt *w, int64_t w_stride, int64_t first, int64_t end, float *out, int64_t out_stride) {
  vf sum[M][ROWS] = {};
  int64_t k = first;
  for (; k + Dot::STEP <= end; k += Dot::STEP) {
    typename Dot::part a[M];
    for (int i = 0; i < M; i++) a[i] = Dot::get(x[i] + k);
    for (int j = 0; j < N; j++) {
      const typename Dot::part b = Dot::get(w + j * w_stride + k);
      for (int i = 0; i < M; i++) sum[i][j] = Dot::add(sum[i][j], a[i], b);
    }
  }
  for (int i = 0; i < M; i++) {
    float s[ROWS];
    hsum4(sum[i], s);
    for (int j = 0; j < N; j++) out[i * out_stride + j] = first ? out[i * out_stride + j] + s[j] : s[j];
  }
  if (k < end) dot_last<Dot, X, Wt, M, N>(x, w, w_stride, k, end, out, out_stride);
}

template <class Dot, class X, class Wt, int M>
static inline void dot_rows(const X *const *x, const Wt *w, int64_t w_stride, int64_t first, int64_t end, float *out,
                            int64_t out_stride, int64_t n) {
  switch (n) {
    case 1: return dot_tile<Dot, X, Wt, M, 1>(x, w, w_stride, first, end, out, out_stride);
    case 2: return dot_tile<Dot, X, Wt, M, 2>(x, w, w_stride, first, end, out, out_stride);
    case 3: return dot_tile<Dot, X, Wt, M, 3>(x, w, w_stride, first, end, out, out_stride);
    default: return dot_tile<Dot, X, Wt, M, 4>(x, w, w_stride, first, end, out, out_stride);
  }
}

// The same for i < m <= TOKENS, j < n <= ROWS.
template <class Dot, class X, class Wt>
static inline void dot_any(const X *const *x, int64_t m, const Wt *w, int64_t w_stride, int64_t first, int64_t end, float *out,
                           int64_t out_stride, int64_t n) {
  switch (m) {
    case 1: return dot_rows<Dot, X, Wt, 1>(x, w, w_stride, first, end, out, out_stride, n);
    case 2: return dot_rows<Dot, X, Wt, 2>(x, w, w_stride, first, end, out, out_stride, n);
#if MOEIFY_TOKENS > 3
    case 3: return dot_rows<Dot, X, Wt, 3>(x, w, w_stride, first, end, out, out_stride, n);
    case 4: return dot_rows<Dot, X, Wt, 4>(x, w, w_stride, first, end, out, out_stride, n);
    case 5: return dot_rows<Dot, X, Wt, 5>(x, w, w_stride, first, end, out, out_stride, n);
#endif
    default: return dot_rows<Dot, X, Wt, TOKENS>(x, w, w_stride, first, end, out, out_stride, n);
  }
}

// -- second product ------------------------------------------------------------------------------------------------------------------
//
// y is summed in blocks of COLUMNS floats, in fp32. Rows of y are base + token * stride.

constexpr int COLUMNS = 2 * W;

// Sums in natural order.
struct AddFp32 {
  static void convert(float *, int64_t, int64_t) {}
  static int64_t row(int64_t neurons) { return neurons; }

  template <class Wt, int M>
  static inline void tile(float *base, const uint16_t *token, int64_t stride, const float *h, int64_t neurons, const Wt *w,
                          int64_t w_stride) {
    vf sum[M][2];
    float *y[M];
    for (int i = 0; i < M; i++) {
      y[i] = base + token[i] * stride;
      sum[i][0] = load(y[i]), sum[i][1] = load(y[i] + W);
    }
    for (int64_t j = 0; j < neurons; j++) {
      const vf b0 = load(w + j * w_stride), b1 = load(w + j * w_stride + W);
      for (int i = 0; i < M; i++) {
        const vf a = splat(h[i * neurons + j]);
        sum[i][0] += a * b0, sum[i][1] += a * b1;
      }
    }
    for (int i = 0; i < M; i++) store(y[i], sum[i][0]), store(y[i] + W, sum[i][1]);
  }

  // y += sum over 4 rows of value * row
  template <class Wt>
  static inline void rows(float *y, const float *value, const Wt *const *row, int64_t c) {
    vf sum0 = load(y), sum1 = load(y + W);
    for (int j = 0; j < 4; j++) {
      const vf a = splat(value[j]);
      sum0 += a * load(row[j] + c), sum1 += a * load(row[j] + c + W);
    }
    store(y, sum0), store(y + W, sum1);
  }

  static inline void natural(float *) {}
};

#if MOEIFY_BF16_DOT
// Two neurons at once: h rounded to bf16, as dense bf16 layers round it, and products summed in fp32. Interleaving two rows of 32 columns
// leaves columns 0-3, 8-11, 16-19, 24-27 in the first vector and the others in the second; sums stay in that order to the end.
struct AddBf16 {
  static inline uint32_t pair(float low, float high) { return to_bf16(low).bits | (uint32_t)to_bf16(high).bits << 16; }
  static int64_t row(int64_t neurons) { return (neurons + 1) / 2; }

  // h in place: row i of n becomes row(neurons) pairs.
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
        memcpy(to + i * row(neurons) + j / 2, &p, 4);
      }
  }

  static inline void interleave(const bf16 *a, const bf16 *b, __m512bh *low, __m512bh *high) {
    const __m512i p = _mm512_loadu_si512(a), q = _mm512_loadu_si512(b);
    *low = (__m512bh)_mm512_unpacklo_epi16(p, q), *high = (__m512bh)_mm512_unpackhi_epi16(p, q);
  }

  template <class Wt, int M>
  static inline void tile(float *base, const uint16_t *token, int64_t stride, const float *h, int64_t neurons, const Wt *w,
                          int64_t w_stride) {
    __m512 sum[M][2];
    float *y[M];
    const int *pairs = (const int *)h;
    const int64_t number = row(neurons);
    for (int i = 0; i < M; i++) {
      y[i] = base + token[i] * stride;
      sum[i][0] = _mm512_loadu_ps(y[i]), sum[i][1] = _mm512_loadu_ps(y[i] + 16);
    }
    for (int64_t j = 0; j < number; j++) {
      const bf16 *first = w + 2 * j * w_stride;
      __m512bh low, high;
      interleave(first, 2 * j + 1 < neurons ? first + w_stride : first, &low, &high);  // the odd one's partner has h = 0
      for (int i = 0; i < M; i++) {
        const __m512bh a = (__m512bh)_mm512_set1_epi32(pairs[i * number + j]);
        sum[i][0] = _mm512_dpbf16_ps(sum[i][0], a, low), sum[i][1] = _mm512_dpbf16_ps(sum[i][1], a, high);
      }
    }
    for (int i = 0; i < M; i++) _mm512_storeu_ps(y[i], sum[i][0]), _mm512_storeu_ps(y[i] + 16, sum[i][1]);
  }

  template <class Wt>
  static inline void rows(float *y, const float *value, const Wt *const *row, int64_t c) {
    __m512 sum0 = _mm512_loadu_ps(y), sum1 = _mm512_loadu_ps(y + 16);
    for (int j = 0; j < 4; j += 2) {
      __m512bh low, high;
      interleave(row[j] + c, row[j + 1] + c, &low, &high);
      const __m512bh a = (__m512bh)_mm512_set1_epi32((int)pair(value[j], value[j + 1]));
      sum0 = _mm512_dpbf16_ps(sum0, a, low), sum1 = _mm512_dpbf16_ps(sum1, a, high);
    }
    _mm512_storeu_ps(y, sum0), _mm512_storeu_ps(y + 16, sum1);
  }

  static inline void natural(float *y) {
    const __m512 low = _mm512_loadu_ps(y), high = _mm512_loadu_ps(y + 16);
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    _mm512_storeu_ps(y, _mm512_permutex2var_ps(low, first, high));
    _mm512_storeu_ps(y + 16, _mm512_permutex2var_ps(low, second, high));
  }
};
#endif

template <class Add, class Wt, int M>
static void add_tile(float *base, const uint16_t *token, int64_t stride, const float *h, int64_t neurons, const Wt *w, int64_t w_stride) {
  Add::template tile<Wt, M>(base, token, stride, h, neurons, w, w_stride);
}

// m <= 2 * TOKENS rows
template <class Add, class Wt>
static inline void add_any(float *base, const uint16_t *token, int64_t m, int64_t stride, const float *h, int64_t neurons, const Wt *w,
                           int64_t w_stride) {
  typedef void (*Tile)(float *, const uint16_t *, int64_t, const float *, int64_t, const Wt *, int64_t);
  static constexpr Tile tiles[] = {
      add_tile<Add, Wt, 1>, add_tile<Add, Wt, 2>, add_tile<Add, Wt, 3>, add_tile<Add, Wt, 4>,  add_tile<Add, Wt, 5>,  add_tile<Add, Wt, 6>,
#if MOEIFY_TOKENS > 3
      add_tile<Add, Wt, 7>, add_tile<Add, Wt, 8>, add_tile<Add, Wt, 9>, add_tile<Add, Wt, 10>, add_tile<Add, Wt, 11>, add_tile<Add, Wt, 12>,
#endif
  };
  tiles[m - 1](base, token, stride, h, neurons, w, w_stride);
}

// Tiles of n tokens: as few as can be, and as equal.
struct Tiles {
  int64_t n, number;
  Tiles(int64_t n, int64_t most) : n(n), number((n + most - 1) / most) {}
  int64_t start(int64_t tile) const { return n * tile / number; }
};

// -- one network ---------------------------------------------------------------------------------------------------------------------

// X: type of x as the first product reads it; Wt: type of the weights; Dot: how they are multiplied; IO: type of x and y in memory.
template <class Dot, class Add_, class IO, class X, class Wt>
struct Network {
  typedef Add_ Add;
  const moeify_ffn &f;
  int64_t out_width;  // O rounded up to whole tiles: width of a y of our own

  explicit Network(const moeify_ffn &ffn) : f(ffn), out_width(round_up(ffn.d_out, COLUMNS)) {}

  int64_t first_neuron(int64_t e) const {
    const int64_t larger = f.num_neurons % f.num_experts;
    return e * (f.num_neurons / f.num_experts) + min64(e, larger);
  }
  int64_t expert_size(int64_t e) const { return f.num_neurons / f.num_experts + (e < f.num_neurons % f.num_experts); }

  // h of tokens i < n and neurons start + j, as the second product wants it; gate: as much scratch again. Both are written to the end of a
  // vector.
  void hidden(const X *const *x, int64_t n, int64_t start, int64_t neurons, float *h, float *gate) const {
    product(x, n, f.up, f.up_stride, f.up_bias, f.up_scale, start, neurons, h);
    if (f.gate) product(x, n, f.gate, f.gate_stride, f.gate_bias, f.gate_scale, start, neurons, gate);
    const int64_t size = n * neurons;
    for (int64_t k = 0; k < size; k += W)
      store(h + k, f.gate ? activate(load(gate + k), f.activation) * load(h + k) : activate(load(h + k), f.activation));
    if (f.down_scale)
      for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < neurons; j++) h[i * neurons + j] *= f.down_scale[start + j];
  }

  void product(const X *const *x, int64_t n, const void *weight, int64_t stride, const void *bias, const float *scale, int64_t start,
               int64_t neurons, float *out) const {
    const Wt *w = static_cast<const Wt *>(weight) + start * stride;
    const int64_t step = DOT_BYTES / (int64_t)sizeof(Wt), panel = max64(ROWS, PANEL_BYTES / (int64_t)sizeof(Wt) / min64(step, f.d_in) / ROWS * ROWS);
    const Tiles tiles(n, TOKENS);
    for (int64_t k = 0; k < f.d_in; k += step)
      for (int64_t p = 0; p < neurons; p += panel)
        for (int64_t tile = 0; tile < tiles.number; tile++) {
          const int64_t i = tiles.start(tile), m = tiles.start(tile + 1) - i;
          for (int64_t j = p; j < min64(p + panel, neurons); j += ROWS)
            dot_any<Dot, X, Wt>(x + i, m, w + j * stride, stride, k, min64(k + step, f.d_in), out + i * neurons + j, neurons,
                                min64(ROWS, neurons - j));
        }
    if (!scale && !bias) return;
    for (int64_t i = 0; i < n; i++)
      for (int64_t j = 0; j < neurons; j++) {
        float value = out[i * neurons + j];
        if (scale) value *= scale[start + j];
        if (bias) value += to_float(static_cast<const IO *>(bias)[start + j]);
        out[i * neurons + j] = value;
      }
  }

  // Ask for rows that will be needed soon: experts lie anywhere in memory, and the processor only follows what is contiguous.
  static void prefetch(const void *weight, int64_t stride, int64_t start, int64_t rows, int64_t first, int64_t width) {
    for (int64_t j = 0; j < rows; j++) {
      const char *row = (const char *)((const Wt *)weight + (start + j) * stride + first);
      for (int64_t k = 0; k < width * (int64_t)sizeof(Wt); k += 64) __builtin_prefetch(row + k);
    }
  }

  // Rows token[i] of base (+ token * stride) += h[i] . down, columns c to c + COLUMNS.
  void add_columns(float *base, const uint16_t *token, int64_t n, int64_t stride, const float *h, int64_t start, int64_t neurons,
                   int64_t c) const {
    const Wt *w = static_cast<const Wt *>(f.down) + start * f.down_stride + c;
    int64_t w_stride = f.down_stride;
    Wt padded[CHUNK_NEURONS * COLUMNS];
    if (f.d_out - c < COLUMNS) {  // the last columns: nothing beyond them may be read
      w = pad(padded, w, neurons, f.d_out - c);
      w_stride = COLUMNS;
    }
    const Tiles tiles(n, 2 * TOKENS);
    for (int64_t tile = 0; tile < tiles.number; tile++) {
      const int64_t i = tiles.start(tile);
      add_any<Add, Wt>(base, token + i, tiles.start(tile + 1) - i, stride, h + i * Add::row(neurons), neurons, w, w_stride);
    }
  }

  const Wt *pad(Wt *padded, const Wt *w, int64_t rows, int64_t width) const {
    memset((void *)padded, 0, rows * COLUMNS * sizeof(Wt));
    for (int64_t j = 0; j < rows; j++) memcpy((void *)(padded + j * COLUMNS), w + j * f.down_stride, width * sizeof(Wt));
    return padded;
  }

  // One token: y += h . down, without reading the rows of neurons whose h is zero (ReLU). h in fp32.
  void add_nonzero(float *y, const float *h, int64_t start, int64_t neurons) const {
    const Wt *w = static_cast<const Wt *>(f.down) + start * f.down_stride;
    const Wt *row[4];
    float value[4];
    int n = 0;
    for (int64_t j = 0; j < neurons; j++) {
      if (h[j] == 0.0f) continue;
      row[n] = w + j * f.down_stride;
      value[n++] = h[j];
      if (n == 4) add_rows(y, value, row), n = 0;
    }
    if (!n) return;
    for (int j = n; j < 4; j++) row[j] = row[0], value[j] = 0.0f;
    add_rows(y, value, row);
  }

  void add_rows(float *y, const float *value, const Wt *const *row) const {
    int64_t c = 0;
    for (; c + COLUMNS <= f.d_out; c += COLUMNS) Add::rows(y + c, value, row, c);
    if (c == f.d_out) return;
    Wt padded[4][COLUMNS] = {};
    const Wt *last[4];
    for (int j = 0; j < 4; j++) memcpy((void *)padded[j], row[j] + c, (f.d_out - c) * sizeof(Wt)), last[j] = padded[j];
    Add::rows(y + c, value, last, 0);
  }
};

// Columns of one block: sums, in the order of Add, to y.
template <class Add, class IO>
static inline void write_block(IO *y, float *sum, const IO *bias, int64_t width) {
  Add::natural(sum);
  if (bias)
    for (int64_t c = 0; c < width; c++) sum[c] += to_float(bias[c]);
  if (width == COLUMNS)  // a fixed number: this becomes vectors
    for (int c = 0; c < COLUMNS; c++) convert_to(y[c], sum[c]);
  else
    for (int64_t c = 0; c < width; c++) convert_to(y[c], sum[c]);
}

// Tokens of each expert, in order.
struct Lists {
  int32_t *count;   // E
  uint16_t *token;  // expert e's from e * stride on
  int64_t stride;

  static int64_t bytes(int64_t tokens, int64_t experts) { return round_up(4 * experts, 64) + round_up(2 * (tokens + 1) * experts, 64); }
  Lists(char *memory, int64_t tokens, int64_t experts)
      : count((int32_t *)memory), token((uint16_t *)(memory + round_up(4 * experts, 64))), stride(tokens + 1) {}

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

template <class X, class IO>
struct Rows {  // x as the first product reads it
  static const X *get(const IO *x, X *converted, int64_t width) {
    for (int64_t k = 0; k < width; k++) converted[k] = to_float(x[k]);
    return converted;
  }
  static constexpr bool CONVERTS = true;
};
template <class X>
struct Rows<X, X> {
  static const X *get(const X *x, X *, int64_t) { return x; }
  static constexpr bool CONVERTS = false;
};

// -- few tokens: threads share the experts -------------------------------------------------------------------------------------------

template <class Net, class IO, class X>
struct FewTokens {
  const Net &net;
  const IO *x;
  int64_t x_stride;
  int64_t num_tokens;
  IO *y;
  int64_t y_stride;
  Lists lists;
  char *memory;           // per_thread bytes for each thread
  int64_t per_thread;
  const X **rows;         // x of each token, converted

  static int64_t sums_bytes(const Net &net, int64_t tokens) { return round_up(4 * tokens * net.out_width, 64); }
  static int64_t thread_bytes(const Net &net, int64_t tokens) {
    return sums_bytes(net, tokens) + 2 * round_up(4 * (tokens * CHUNK_NEURONS + W), 64);
  }

  static void task(void *self, int thread, int num_threads) { static_cast<FewTokens *>(self)->run(thread, num_threads); }

  // What an expert costs: its rows are read whatever the tokens, and each token adds arithmetic.
  int64_t cost(int64_t e) const {
    const int64_t n = lists.count[e];
    return n ? net.expert_size(e) * (4 + n) : 0;
  }

  void run(int thread, int num_threads) {
    char *own = memory + thread * per_thread;
    float *sums = (float *)own;
    memset(sums, 0, 4 * num_tokens * net.out_width);
    float *h = (float *)(own + sums_bytes(net, num_tokens));
    float *gate = h + round_up(num_tokens * CHUNK_NEURONS + W, 16);
    const int64_t experts = net.f.num_experts;
    int64_t total = 0, before = 0;
    for (int64_t e = 0; e < experts; e++) total += cost(e);
    const int64_t first = total * thread / num_threads, last = total * (thread + 1) / num_threads;
    for (int64_t e = 0; e < experts; e++) {
      const int64_t now = before;
      before += cost(e);
      if (before == now || now < first || now >= last) continue;  // the thread in whose share it begins
      expert(e, sums, h, gate);
    }
  }

  void expert(int64_t e, float *sums, float *h, float *gate) {
    typedef typename Net::Add Add;
    const uint16_t *token = lists.of(e);
    const int64_t n = lists.count[e];
    const X *in[FEW_TOKENS];
    for (int64_t i = 0; i < n; i++) in[i] = rows[token[i]];
    const int64_t start = net.first_neuron(e), size = net.expert_size(e);
    for (int64_t j = 0; j < size; j += CHUNK_NEURONS) {
      const int64_t neurons = min64(CHUNK_NEURONS, size - j);
      net.prefetch(net.f.down, net.f.down_stride, start + j, neurons, 0, net.f.d_out);
      net.hidden(in, n, start + j, neurons, h, gate);
      if (n == 1) {
        net.add_nonzero(sums + token[0] * net.out_width, h, start + j, neurons);
        continue;
      }
      Add::convert(h, n, neurons);
      for (int64_t c = 0; c < net.f.d_out; c += COLUMNS) net.add_columns(sums + c, token, n, net.out_width, h, start + j, neurons, c);
    }
  }

  // In the order of the threads.
  void finish(int num_threads) {
    typedef typename Net::Add Add;
    const IO *bias = (const IO *)net.f.down_bias;
    for (int64_t t = 0; t < num_tokens; t++) {
      float *sum = (float *)memory + t * net.out_width;
      for (int k = 1; k < num_threads; k++) {
        const float *other = (const float *)(memory + k * per_thread) + t * net.out_width;
        for (int64_t c = 0; c < net.out_width; c++) sum[c] += other[c];
      }
      for (int64_t c = 0; c < net.f.d_out; c += COLUMNS)
        write_block<Add, IO>(y + t * y_stride + c, sum + c, bias ? bias + c : nullptr, min64(COLUMNS, net.f.d_out - c));
    }
  }
};

// -- many tokens: threads share the tokens -------------------------------------------------------------------------------------------

template <class Net, class IO, class X>
struct ManyTokens {
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

  static int64_t hidden_floats(const Net &net, int64_t tokens) {
    return HIDDEN_FLOATS + tokens * min64(CHUNK_NEURONS, (net.f.num_neurons - 1) / net.f.num_experts + 1) + W;
  }
  static int64_t thread_bytes(const Net &net, int64_t tokens) {
    return Lists::bytes(tokens, net.f.num_experts) + 4 * tokens * net.out_width + 4 * round_up(hidden_floats(net, tokens), 16) +
           4 * round_up(tokens * CHUNK_NEURONS + W, 16) + (Rows<X, IO>::CONVERTS ? 4 * tokens * round_up(net.f.d_in, 16) : 0) + 256;
  }

  static void task(void *self, int thread, int) { static_cast<ManyTokens *>(self)->run(thread); }

  void run(int thread) {
    for (;;) {
      const int64_t first = next.fetch_add(block_tokens, std::memory_order_relaxed);
      if (first >= num_tokens) return;
      block(memory + thread * per_thread, first, min64(block_tokens, num_tokens - first));
    }
  }

  struct Piece {  // part of an expert whose h is ready
    int64_t expert, start, neurons, at;
  };

  // y of a block stands in columns of COLUMNS floats, all tokens of a column together: it stays in the first cache, and rows of a power
  // of two do not share its sets.
  void block(char *own, int64_t first, int64_t n) {
    typedef typename Net::Add Add;
    const int64_t experts = net.f.num_experts;
    Lists lists(own, block_tokens, experts);
    float *sums = (float *)(own + Lists::bytes(block_tokens, experts));
    float *h = sums + block_tokens * net.out_width;
    float *gate = h + round_up(hidden_floats(net, block_tokens), 16);
    X *converted = (X *)(gate + round_up(block_tokens * CHUNK_NEURONS + W, 16));
    lists.build(mask + first * experts, n, experts);
    memset(sums, 0, 4 * n * net.out_width);
    const X *rows[BLOCK_TOKENS];
    for (int64_t t = 0; t < n; t++)
      rows[t] = Rows<X, IO>::get(x + (first + t) * x_stride, converted + t * round_up(net.f.d_in, 16), net.f.d_in);

    Piece pieces[MAX_PIECES];
    int num_pieces = 0;
    int64_t used = 0;
    const X *in[BLOCK_TOKENS];
    for (int64_t e = 0; e < experts; e++) {
      const uint16_t *token = lists.of(e);
      const int64_t count = lists.count[e];
      if (!count) continue;
      for (int64_t i = 0; i < count; i++) in[i] = rows[token[i]];
      const int64_t start = net.first_neuron(e), size = net.expert_size(e);
      for (int64_t j = 0; j < size; j += CHUNK_NEURONS) {
        const int64_t neurons = min64(CHUNK_NEURONS, size - j);
        net.hidden(in, count, start + j, neurons, h + used, gate);
        Add::convert(h + used, count, neurons);
        pieces[num_pieces++] = {e, start + j, neurons, used};
        used += round_up(count * neurons, W);
        if (used >= HIDDEN_FLOATS || num_pieces == MAX_PIECES) {
          second(lists, sums, h, pieces, num_pieces, n);
          used = num_pieces = 0;
        }
      }
    }
    if (num_pieces) second(lists, sums, h, pieces, num_pieces, n);

    const IO *bias = (const IO *)net.f.down_bias;
    for (int64_t t = 0; t < n; t++)
      for (int64_t c = 0; c < net.f.d_out; c += COLUMNS)
        write_block<Add, IO>(y + (first + t) * y_stride + c, sums + c * n + t * COLUMNS, bias ? bias + c : nullptr,
                             min64(COLUMNS, net.f.d_out - c));
  }

  void second(const Lists &lists, float *sums, const float *h, const Piece *pieces, int num_pieces, int64_t n) {
    for (int64_t c = 0; c < net.f.d_out; c += COLUMNS)
      for (int p = 0; p < num_pieces; p++) {
        const Piece &piece = pieces[p];
        if (p + 1 < num_pieces)
          net.prefetch(net.f.down, net.f.down_stride, pieces[p + 1].start, pieces[p + 1].neurons, c, min64(COLUMNS, net.f.d_out - c));
        net.add_columns(sums + c * n, lists.of(piece.expert), lists.count[piece.expert], COLUMNS, h + piece.at, piece.start,
                        piece.neurons, c);
      }
  }
};

// -- entry ---------------------------------------------------------------------------------------------------------------------------

template <class Dot, class Add, class IO, class X, class Wt>
static int run(const moeify_ffn &f, const void *x, int64_t x_stride, const uint8_t *mask, int64_t num_tokens, void *y, int64_t y_stride,
               int num_threads) {
  typedef Network<Dot, Add, IO, X, Wt> Net;
  const Net net(f);
  if (num_tokens <= FEW_TOKENS) {
    typedef FewTokens<Net, IO, X> Job;
    const int64_t per_thread = Job::thread_bytes(net, num_tokens), list_bytes = Lists::bytes(num_tokens, f.num_experts);
    const int64_t row_bytes = round_up(f.d_in, 16) * (int64_t)sizeof(X) * (Rows<X, IO>::CONVERTS ? num_tokens : 0);
    char *memory = scratch(per_thread * num_threads + list_bytes + row_bytes);
    if (!memory) return MOEIFY_NO_MEMORY;
    char *after = memory + per_thread * num_threads;
    const X *rows[FEW_TOKENS];
    X *converted = (X *)(after + list_bytes);
    for (int64_t t = 0; t < num_tokens; t++)
      rows[t] = Rows<X, IO>::get((const IO *)x + t * x_stride, converted + t * round_up(f.d_in, 16), f.d_in);
    Lists lists(after, num_tokens, f.num_experts);
    lists.build(mask, num_tokens, f.num_experts);
    Job job{net, (const IO *)x, x_stride, num_tokens, (IO *)y, y_stride, lists, memory, per_thread, rows};
    job.finish(parallel(num_threads, &Job::task, &job));
    return MOEIFY_OK;
  }
  typedef ManyTokens<Net, IO, X> Job;
  int64_t pairs = 0;
  for (int64_t k = 0; k < num_tokens * f.num_experts; k++) pairs += mask[k] != 0;
  // Tokens enough for every expert, but at least one block a thread, and equal blocks.
  const int64_t share = (num_tokens + num_threads - 1) / num_threads;
  const int64_t wanted = min64(BLOCK_TOKENS, max64(128, EXPERT_TOKENS * num_tokens * f.num_experts / max64(pairs, 1)));
  const int64_t blocks = (share + wanted - 1) / wanted, block = (share + blocks - 1) / blocks;
  const int64_t per_thread = round_up(Job::thread_bytes(net, block), 64);
  char *memory = scratch(per_thread * num_threads);
  if (!memory) return MOEIFY_NO_MEMORY;
  Job job{net, (const IO *)x, x_stride, mask, num_tokens, block, (IO *)y, y_stride, memory, per_thread, {0}};
  parallel(num_threads, &Job::task, &job);
  return MOEIFY_OK;
}
