// Routed experts in training: forward and backward over the selected (token, expert) pairs; included once per instruction set, inside its
// namespace (see isa.h).
//
// Letters: T tokens, D input width, O output width, F neurons, E experts, G neurons of a slice (an expert, or 64 neurons of it), n tokens of
// an expert.
//
// Five products, each the same loop, `tile`: 6 rows of sums, each 4 vectors wide, a number spread over a vector times a packed row.
//   blocks of tokens   h = act(x up'), y += h down            of each slice, for those of the block's tokens that take it
//                      dh = dy down', dx += dz up             likewise; h and dz are kept for what follows
//   slices             ddown = h' dy, dup = dz' x             over all tokens of the expert, whose rows are packed 128 at a time
// Tokens are read where they are. Packed is what many tokens share: the weights once a call, and the rows of 128 tokens for the 64 neurons
// of a slice. Every sum belongs to one thread and has one order, which no number of threads changes: experts ascend, and so do tokens.

constexpr int TILE_TOKENS = 6;                       // rows of a tile
constexpr int TILE_VECTORS = MOEIFY_W == 16 ? 4 : 2;  // columns of a tile: with the rows, what the registers hold
constexpr int64_t PANEL = TILE_VECTORS * W;           // columns packed together
constexpr int64_t SLICE_NEURONS = 64;
constexpr int64_t TRAIN_BLOCK_TOKENS = 256;
constexpr int64_t TRAIN_BLOCK_BYTES = 512 << 10;  // of the sums of a block: they stay in the second cache
constexpr int64_t REDUCED_TOKENS = 128;           // packed at a time: a panel of them stays in the first cache
constexpr int64_t TILE_STEPS = 512;               // of one sum before it is added to the others: keeps the error of long rows small

// What is multiplied in one step: a float, or the 32 bits of two bf16 that are next to each other in the direction of the sum.
typedef float unit __attribute__((may_alias, aligned(2)));

struct StepFp32 {
  typedef float element;
  static constexpr int64_t ELEMENTS = 1;  // of a unit
  static inline vf spread(const unit *a) { return splat(*a); }
  static inline vf add(vf sum, vf a, vf b) { return sum + a * b; }

  // W units of a row from element k on, zero beyond n elements.
  template <class IO>
  static inline vf units(const IO *row, int64_t n) {
    return n >= W ? load(row) : n > 0 ? load_first(row, n) : vf{};
  }
  // Row k of `to`, of `width` units: n elements of row a. There is no b.
  template <class IO>
  static inline void join(const IO *a, const IO *, int64_t n, int64_t width, unit *to) {
    for (int64_t j = 0; j < width; j += W) store((float *)to + j, units(a + j, n - j));
  }
};

#if MOEIFY_BF16_DOT
struct StepBf16 {
  typedef bf16 element;
  static constexpr int64_t ELEMENTS = 2;
  static inline vf spread(const unit *a) {
    int32_t bits;
    memcpy(&bits, a, 4);
    return (vf)_mm512_set1_epi32(bits);
  }
  static inline vf add(vf sum, vf a, vf b) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }

  static inline __mmask32 first(int64_t n) { return n >= 32 ? ~0u : n > 0 ? (1u << n) - 1u : 0u; }
  static inline vf units(const bf16 *row, int64_t n) { return (vf)_mm512_maskz_loadu_epi16(first(n), row); }
  // Elements j of the rows a and b become unit j; b null: zeros.
  static inline void join(const bf16 *a, const bf16 *b, int64_t n, int64_t width, unit *to) {
    alignas(64) static const uint16_t LOW[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(LOW), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t j = 0; j < width; j += 32) {
      const __m512i p = _mm512_maskz_loadu_epi16(first(n - j), a + j);
      const __m512i q = b ? _mm512_maskz_loadu_epi16(first(n - j), b + j) : _mm512_setzero_si512();
      _mm512_storeu_si512(to + j, _mm512_permutex2var_epi16(p, low, q));
      if (j + 16 < width) _mm512_storeu_si512(to + j + 16, _mm512_permutex2var_epi16(p, high, q));
    }
  }
};
#endif

// c[m] (+)= sum over k of a[m][k * a_step] * row k of b, which has N vectors.
template <class Step, int M, int N>
static void tile(int64_t steps, const unit *const *a, int64_t a_step, const unit *b, float *const *c, bool adds) {
  vf sum[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) sum[m][n] = vf{};
  const unit *row[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) row[m] = a[m];
  for (int64_t at = 0, end = steps * a_step; at < end; at += a_step, b += N * W) {
    vf right[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) right[n] = load((const float *)b + n * W);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const vf left = Step::spread(row[m] + at);
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) sum[m][n] = Step::add(sum[m][n], left, right[n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) store(c[m] + n * W, adds ? load(c[m] + n * W) + sum[m][n] : sum[m][n]);
}

// The same for m <= TILE_TOKENS rows and columns (a multiple of W, at most PANEL).
template <class Step>
static inline void any_tile(int64_t m, int64_t columns, int64_t steps, const unit *const *a, int64_t a_step, const unit *b,
                            float *const *c, bool adds) {
  typedef void (*Tile)(int64_t, const unit *const *, int64_t, const unit *, float *const *, bool);
#define TILES(n) {tile<Step, 1, n>, tile<Step, 2, n>, tile<Step, 3, n>, tile<Step, 4, n>, tile<Step, 5, n>, tile<Step, 6, n>}
#if MOEIFY_W == 16
  static constexpr Tile tiles[][TILE_TOKENS] = {TILES(1), TILES(2), TILES(3), TILES(4)};
#else
  static constexpr Tile tiles[][TILE_TOKENS] = {TILES(1), TILES(2)};
#endif
#undef TILES
  tiles[columns / W - 1][m - 1](steps, a, a_step, b, c, adds);
}

// -- packing -----------------------------------------------------------------------------------------------------------------------------
//
// A packed matrix is its panels, one after the other: of each, all rows k of units, PANEL columns wide (the last as wide as is left).

// Row k of the units is made of rows of memory: element j of row(k) belongs to column j < n of `width`.
template <class Step, class Row>
static inline void pack_rows(const Row &row, int64_t num_rows, int64_t n, int64_t width, unit *to) {
  for (int64_t k = 0; k < num_rows; k += Step::ELEMENTS, to += width)
    Step::join(row(k), k + 1 < num_rows ? row(k + 1) : nullptr, n, width, to);
}

// Column j < n is made of a row of memory that is `length` long.
template <class Step, class Row>
static inline void pack_columns(const Row &row, int64_t length, int64_t n, int64_t width, unit *to) {
  const int64_t steps = (length + Step::ELEMENTS - 1) / Step::ELEMENTS;
  for (int64_t j = 0; j < width; j += W)
    for (int64_t k = 0; k < steps; k += W) {
      vf square[W];
      for (int64_t i = 0; i < W; i++)
        square[i] = j + i < n ? Step::units(row(j + i) + k * Step::ELEMENTS, length - k * Step::ELEMENTS) : vf{};
      transpose(square);
      for (int64_t i = 0; i < min64(W, steps - k); i++) store((float *)to + (k + i) * width + j, square[i]);
    }
}

// Element (k, j) is at data + k * k_stride + j * j_stride; one of the strides is 1.
template <class IO>
struct Matrix {
  const IO *data;
  int64_t k_stride, j_stride;

  template <class Step>
  void pack(int64_t length, int64_t columns, int64_t padded, unit *to) const {
    const int64_t steps = (length + Step::ELEMENTS - 1) / Step::ELEMENTS;
    for (int64_t c = 0; c < padded; c += PANEL, to += steps * PANEL) {
      const int64_t n = min64(PANEL, columns - c), width = min64(PANEL, padded - c);
      if (j_stride == 1)
        pack_rows<Step>([&](int64_t k) { return data + k * k_stride + c; }, length, n, width, to);
      else
        pack_columns<Step>([&](int64_t j) { return data + (c + j) * j_stride; }, length, n, width, to);
    }
  }
};

// -- activations -------------------------------------------------------------------------------------------------------------------------

// act(x) and its derivative.
static inline vf activate_both(vf x, int32_t activation, vf *derivative) {
  const vf one = splat(1.0f), zero = vf{};
  const vf value = activate(x, activation);
  switch (activation) {
    case MOEIFY_RELU: *derivative = x > 0.0f ? one : (x != x ? x : zero); break;
    case MOEIFY_RELU2: *derivative = x > 0.0f ? 2.0f * x : (x != x ? x : zero); break;
    case MOEIFY_GELU:
      *derivative = 0.5f * one_plus_erf(x * 0.707106781f) + x * 0.398942280f * exp_of(-0.5f * x * x);
      break;
    default: {  // x sigmoid(u(x))
      vf u = x, slope = one;
      if (activation == MOEIFY_QUICK_GELU) u = 1.702f * x, slope = splat(1.702f);
      if (activation == MOEIFY_GELU_TANH) {
        u = 1.595769122f * (x + 0.044715f * x * x * x);
        slope = 1.595769122f * (1.0f + 0.134145f * x * x);
      }
      const vf sigmoid = 1.0f / (1.0f + exp_of(-u));
      // Far out the slope may be infinite where the sigmoid is 0 or 1 to the last bit.
      const vf bend = sigmoid * (1.0f / (1.0f + exp_of(u)));
      *derivative = sigmoid + (bend < 1e-30f ? zero : x * bend * slope);
    }
  }
  return value;
}

static inline void store(bf16 *p, vf v) {
#if MOEIFY_BF16_DOT
  const __m256bh b = _mm512_cvtneps_pbh((__m512)v);
  memcpy((void *)p, &b, 2 * W);
#else
  float f[W];
  store(f, v);
  for (int i = 0; i < W; i++) p[i] = to_bf16(f[i]);
#endif
}
template <class IO>
static inline void store_first(IO *p, vf v, int64_t n) {
  if (n >= W) return store(p, v);
  IO padded[W];
  store(padded, v);
  memcpy((void *)p, padded, n * sizeof(IO));
}

// -- one network -------------------------------------------------------------------------------------------------------------------------

struct Slice {
  int64_t expert, neuron, size, width;   // width: of the neurons, rounded up to vectors
  int64_t widths, units;                 // of the slices before: where its packed weights are
  int64_t kept, rows;                    // elements of what forward keeps, and of h and dz, before it
};

template <class Step, class IO>
struct Training {
  typedef typename Step::element element;
  static constexpr bool IN_PLACE = sizeof(element) == sizeof(IO);

  const moeify_train &t;
  const moeify_ffn &f;
  const int64_t num_tokens, block_tokens, num_blocks, num_slices;
  const int num_threads;

  // What all threads read.
  Slice *slices;
  int32_t *tokens, *start;  // of expert e: tokens + start[e]; start[b * E + e]: those from block b on
  unit *packed[3];          // up, gate, down
  element *h, *dz, *dz_gate;
  // Of one call.
  const IO *x, *grad, *kept;
  int64_t x_stride, grad_stride, y_stride;
  IO *y, *keeps;
  const moeify_gradients *out;
  std::atomic<int64_t> next;

  static int64_t steps(int64_t length) { return (length + Step::ELEMENTS - 1) / Step::ELEMENTS; }
  static int64_t padded(int64_t n) { return round_up(n, W); }

  int64_t expert_size(int64_t e) const { return f.num_neurons / f.num_experts + (e < f.num_neurons % f.num_experts); }
  static int64_t count_slices(const moeify_ffn &f) {
    const int64_t size = f.num_neurons / f.num_experts, larger = f.num_neurons % f.num_experts;
    const auto pieces = [](int64_t n) { return (n + SLICE_NEURONS - 1) / SLICE_NEURONS; };
    return larger * pieces(size + 1) + (f.num_experts - larger) * pieces(size);
  }
  static int64_t block_of(const moeify_ffn &f, int64_t num_tokens, int num_threads) {
    const int64_t width = std::max(padded(f.d_in), padded(f.d_out)) * 4;
    const int64_t most = max64(32, min64(TRAIN_BLOCK_TOKENS, TRAIN_BLOCK_BYTES / width));
    const int64_t share = (num_tokens + num_threads - 1) / num_threads, blocks = (share + most - 1) / most;
    return (share + blocks - 1) / blocks;
  }

  Training(const moeify_train &t, int64_t num_tokens, int num_threads)
      : t(t), f(t.ffn), num_tokens(num_tokens), block_tokens(block_of(t.ffn, num_tokens, num_threads)),
        num_blocks((num_tokens + block_tokens - 1) / block_tokens), num_slices(count_slices(t.ffn)), num_threads(num_threads) {}

  // Buffers of a block of tokens, and of the reduction over an expert's tokens; each thread has one of them.
  struct Own {
    float *sums, *first, *gate, *bias, *gate_bias;
    element *h;
    unit *rows;
    const unit **in;
    int32_t *local;
    float *weights[2];
    unit *left[2], *panel;
    Own(Arena &arena, const Training &n, int64_t in_width, int64_t out_width, bool reduces)
        : sums(arena.take<float>(n.block_tokens * padded(out_width))),
          first(arena.take<float>(n.block_tokens * SLICE_NEURONS)),
          gate(arena.take<float>(n.block_tokens * SLICE_NEURONS)),
          bias(arena.take<float>(SLICE_NEURONS)),
          gate_bias(arena.take<float>(SLICE_NEURONS)),
          h(arena.take<element>(n.block_tokens * SLICE_NEURONS)),
          rows((unit *)arena.take<float>(n.needs_copy(in_width) ? n.block_tokens * row_units(in_width) : 0)),
          in((const unit **)arena.take<void *>(n.block_tokens)),
          local(arena.take<int32_t>(n.block_tokens)) {
      const int64_t columns = reduces ? padded(max64(n.f.d_in, n.f.d_out)) : 0;
      for (int i = 0; i < 2; i++) {
        weights[i] = arena.take<float>(SLICE_NEURONS * columns);
        left[i] = (unit *)arena.take<float>(reduces ? REDUCED_TOKENS * SLICE_NEURONS : 0);
      }
      panel = (unit *)arena.take<float>(reduces ? REDUCED_TOKENS * PANEL : 0);
    }
  };

  bool needs_copy(int64_t width) const { return !IN_PLACE || width % Step::ELEMENTS; }
  static int64_t row_units(int64_t width) { return round_up(steps(width), W) + W; }

  // -- plan ------------------------------------------------------------------------------------------------------------------------------

  // Tokens of each expert in order, and what lies where. Returns the elements that forward keeps.
  int64_t plan(const uint8_t *mask) {
    const int64_t E = f.num_experts;
    int32_t *count = start;  // of tokens: row 0 for now
    for (int64_t e = 0; e < E; e++) count[e] = 0;
    for (int64_t i = 0; i < num_tokens; i++)
      for (int64_t e = 0; e < E; e++) count[e] += mask[i * E + e] != 0;
    int32_t before = 0;
    for (int64_t e = 0; e < E; e++) {
      const int32_t n = count[e];
      count[e] = before, before += n;
    }
    // Row b of `start` is where block b begins; the last row is one beyond.
    int32_t *at = start + num_blocks * E;
    for (int64_t e = 0; e < E; e++) at[e] = start[e];
    for (int64_t b = 0; b < num_blocks; b++) {
      for (int64_t e = 0; e < E; e++) start[b * E + e] = at[e];
      for (int64_t i = b * block_tokens; i < min64((b + 1) * block_tokens, num_tokens); i++)
        for (int64_t e = 0; e < E; e++)
          if (mask[i * E + e]) tokens[at[e]++] = (int32_t)i;
    }
    const int64_t projections = f.gate ? 2 : 1;
    Slice next = {};
    int64_t s = 0;
    for (int64_t e = 0; e < E; e++)
      for (int64_t size = expert_size(e); size > 0; size -= next.size, next.neuron += next.size, s++) {
        if (s) {
          const Slice &last = slices[s - 1];
          const int64_t m = start[num_blocks * E + last.expert] - start[last.expert];
          next.widths += last.width, next.units += steps(last.size), next.kept += m * last.size * projections, next.rows += m * last.width;
        }
        next.expert = e, next.size = min64(size, SLICE_NEURONS), next.width = padded(next.size);
        slices[s] = next;
      }
    const Slice &last = slices[num_slices - 1];
    return last.kept + (start[num_blocks * E + last.expert] - start[last.expert]) * last.size * projections;
  }

  int64_t pairs(const Slice &s, int64_t block) const { return start[(block + 1) * f.num_experts + s.expert] - start[block * f.num_experts + s.expert]; }

  // -- packing ---------------------------------------------------------------------------------------------------------------------------

  // Weights whose product is summed over their columns (along) or over the neurons of a slice (across).
  void pack_along(const void *weight, int64_t row, int64_t column, int64_t columns, const Slice &s, unit *to) const {
    const Matrix<IO> m{(const IO *)weight + s.neuron * row, column, row};
    m.template pack<Step>(columns, s.size, s.width, to + s.widths * steps(columns));
  }
  void pack_across(const void *weight, int64_t row, int64_t column, int64_t columns, const Slice &s, unit *to) const {
    const Matrix<IO> m{(const IO *)weight + s.neuron * row, row, column};
    m.template pack<Step>(s.size, columns, padded(columns), to + s.units * padded(columns));
  }

  // Element (k, j) of the stored matrix.
  static void pack_forward(void *self, int, int) {
    Training &n = *static_cast<Training *>(self);
    const moeify_ffn &f = n.f;
    for (int64_t i; (i = n.next.fetch_add(1, std::memory_order_relaxed)) < n.num_slices;) {
      const Slice &s = n.slices[i];
      n.pack_along(f.up, f.up_stride, n.t.up_column, f.d_in, s, n.packed[0]);
      if (f.gate) n.pack_along(f.gate, f.gate_stride, n.t.gate_column, f.d_in, s, n.packed[1]);
      n.pack_across(f.down, f.down_stride, n.t.down_column, f.d_out, s, n.packed[2]);
    }
  }
  static void pack_backward(void *self, int, int) {
    Training &n = *static_cast<Training *>(self);
    const moeify_ffn &f = n.f;
    for (int64_t i; (i = n.next.fetch_add(1, std::memory_order_relaxed)) < n.num_slices;) {
      const Slice &s = n.slices[i];
      if (n.out->x) {
        n.pack_across(f.up, f.up_stride, n.t.up_column, f.d_in, s, n.packed[0]);
        if (f.gate) n.pack_across(f.gate, f.gate_stride, n.t.gate_column, f.d_in, s, n.packed[1]);
      }
      n.pack_along(f.down, f.down_stride, n.t.down_column, f.d_out, s, n.packed[2]);
    }
  }

  // -- products of a block ---------------------------------------------------------------------------------------------------------------

  // The units of a block's rows: where they are, or converted.
  const unit *row_of(const Own &own, const IO *data, int64_t stride, int64_t width, int64_t first, int64_t i) const {
    return needs_copy(width) ? own.rows + i * row_units(width) : (const unit *)(data + (first + i) * stride);
  }
  void copy_rows(const Own &own, const IO *data, int64_t stride, int64_t width, int64_t first, int64_t n) const {
    if (!needs_copy(width)) return;
    for (int64_t i = 0; i < n; i++) {
      const IO *row = data + (first + i) * stride;
      unit *to = own.rows + i * row_units(width);
      for (int64_t k = 0; k < steps(width); k += W)
        store((float *)to + k, Step::units(row + k * Step::ELEMENTS, width - k * Step::ELEMENTS));
    }
  }

  // c (n, s.width) = rows in `in` times the weights packed along.
  void project(const Slice &s, const unit *packed, int64_t columns, const unit *const *in, int64_t n, float *c) const {
    const int64_t length = steps(columns);
    const unit *weights = packed + s.widths * length;
    for (int64_t p = 0; p < s.width; p += PANEL) {
      const int64_t width = min64(PANEL, s.width - p);
      for (int64_t k = 0; k < length; k += TILE_STEPS)
        for (int64_t i = 0; i < n; i += TILE_TOKENS) {
          const int64_t m = min64(TILE_TOKENS, n - i);
          const unit *a[TILE_TOKENS];
          float *to[TILE_TOKENS];
          for (int64_t r = 0; r < m; r++) a[r] = in[i + r] + k, to[r] = c + (i + r) * s.width + p;
          any_tile<Step>(m, width, min64(TILE_STEPS, length - k), a, 1, weights + p * length + k * width, to, k > 0);
        }
    }
  }

  // sums += h (n, s.width) times the weights packed across. Sums stand in panels, all tokens of a panel together.
  void combine(const Slice &s, const unit *packed, int64_t columns, const element *h, const int32_t *local, int64_t n, float *sums) const {
    const int64_t all = padded(columns), length = steps(s.size);
    const unit *weights = packed + s.units * all;
    for (int64_t c = 0; c < all; c += PANEL) {
      const int64_t width = min64(PANEL, all - c);
      for (int64_t i = 0; i < n; i += TILE_TOKENS) {
        const int64_t m = min64(TILE_TOKENS, n - i);
        const unit *a[TILE_TOKENS];
        float *to[TILE_TOKENS];
        for (int64_t r = 0; r < m; r++) a[r] = (const unit *)(h + (i + r) * s.width), to[r] = sums + c * block_tokens + local[i + r] * width;
        any_tile<Step>(m, width, length, a, 1, weights + c * length, to, true);
      }
    }
  }

  void write_block(IO *y, int64_t stride, int64_t columns, const void *bias, const float *sums, int64_t first, int64_t n) const {
    const int64_t all = padded(columns);
    for (int64_t c = 0; c < columns; c += PANEL) {
      const int64_t width = min64(PANEL, all - c);
      for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < width && c + j < columns; j += W) {
          vf v = load(sums + c * block_tokens + i * width + j);
          if (bias) v += StepFp32::units((const IO *)bias + c + j, columns - c - j);
          store_first(y + (first + i) * stride + c + j, v, columns - c - j);
        }
    }
  }

  void take_bias(const void *bias, const Slice &s, float *to) const {
    for (int64_t j = 0; j < s.width; j++) to[j] = bias && j < s.size ? to_float(((const IO *)bias)[s.neuron + j]) : 0.0f;
  }

  static void run_forward(void *self, int thread, int) { static_cast<Training *>(self)->forward_blocks(thread); }
  static void run_backward(void *self, int thread, int) { static_cast<Training *>(self)->backward_blocks(thread); }
  static void run_reduce(void *self, int thread, int) { static_cast<Training *>(self)->reduce_slices(thread); }

  char *memory;
  int64_t per_thread;
  Own own(int thread, int64_t in_width, int64_t out_width, bool reduces) const {
    Arena arena(memory + thread * per_thread);
    return Own(arena, *this, in_width, out_width, reduces);
  }

  // Tokens of the block that take the slice: their rows and their places in the block.
  int64_t gather(const Own &own, const IO *data, int64_t stride, int64_t width, const Slice &s, int64_t block) const {
    const int64_t first = block * block_tokens, n = pairs(s, block);
    const int32_t *token = tokens + start[block * f.num_experts + s.expert];
    for (int64_t i = 0; i < n; i++) {
      own.local[i] = token[i] - (int32_t)first;
      own.in[i] = row_of(own, data, stride, width, first, own.local[i]);
    }
    return n;
  }

  void forward_blocks(int thread) {
    const Own own = this->own(thread, f.d_in, f.d_out, false);
    const int64_t projections = f.gate ? 2 : 1;
    for (int64_t b; (b = next.fetch_add(1, std::memory_order_relaxed)) < num_blocks;) {
      const int64_t first = b * block_tokens, number = min64(block_tokens, num_tokens - first);
      memset(own.sums, 0, 4 * block_tokens * padded(f.d_out));
      copy_rows(own, x, x_stride, f.d_in, first, number);
      for (int64_t k = 0; k < num_slices; k++) {
        const Slice &s = slices[k];
        const int64_t n = gather(own, x, x_stride, f.d_in, s, b);
        if (!n) continue;
        project(s, packed[0], f.d_in, own.in, n, own.first);
        if (f.gate) project(s, packed[1], f.d_in, own.in, n, own.gate);
        take_bias(f.up_bias, s, own.bias), take_bias(f.gate_bias, s, own.gate_bias);
        const int64_t before = start[b * f.num_experts + s.expert] - start[s.expert];
        IO *keep = keeps ? keeps + s.kept + before * s.size * projections : nullptr;
        for (int64_t i = 0; i < n; i++)
          for (int64_t j = 0; j < s.width; j += W) {
            const vf up = load(own.first + i * s.width + j) + load(own.bias + j);
            if (keep) store_first(keep + i * s.size * projections + j, up, s.size - j);
            vf value = up;
            if (f.gate) {
              const vf gate = load(own.gate + i * s.width + j) + load(own.gate_bias + j);
              if (keep) store_first(keep + i * s.size * 2 + s.size + j, gate, s.size - j);
              value = activate(gate, f.activation) * up;
            } else {
              value = activate(up, f.activation);
            }
            store(own.h + i * s.width + j, value);
          }
        combine(s, packed[2], f.d_out, own.h, own.local, n, own.sums);
      }
      write_block(y, y_stride, f.d_out, f.down_bias, own.sums, first, number);
    }
  }

  void backward_blocks(int thread) {
    const Own own = this->own(thread, f.d_out, f.d_in, true);
    const int64_t projections = f.gate ? 2 : 1;
    for (int64_t b; (b = next.fetch_add(1, std::memory_order_relaxed)) < num_blocks;) {
      const int64_t first = b * block_tokens, number = min64(block_tokens, num_tokens - first);
      if (out->x) memset(own.sums, 0, 4 * block_tokens * padded(f.d_in));
      copy_rows(own, grad, grad_stride, f.d_out, first, number);
      for (int64_t k = 0; k < num_slices; k++) {
        const Slice &s = slices[k];
        const int64_t n = gather(own, grad, grad_stride, f.d_out, s, b);
        if (!n) continue;
        project(s, packed[2], f.d_out, own.in, n, own.first);
        const int64_t before = start[b * f.num_experts + s.expert] - start[s.expert];
        const IO *keep = kept + s.kept + before * s.size * projections;
        element *h_rows = h + s.rows + before * s.width, *dz_rows = dz + s.rows + before * s.width;
        element *dz_gate_rows = f.gate ? dz_gate + s.rows + before * s.width : nullptr;
        for (int64_t i = 0; i < n; i++) {
          vf energy = vf{};
          for (int64_t j = 0; j < s.width; j += W) {
            const vf dh = load(own.first + i * s.width + j);
            const vf up = StepFp32::units(keep + i * s.size * projections + j, s.size - j);
            vf slope, value, dup;
            if (f.gate) {
              const vf act = activate_both(StepFp32::units(keep + i * s.size * 2 + s.size + j, s.size - j), f.activation, &slope);
              value = act * up, dup = dh * act;
              store(dz_gate_rows + i * s.width + j, dh * up * slope);
            } else {
              value = activate_both(up, f.activation, &slope);
              dup = dh * slope;
            }
            store(h_rows + i * s.width + j, value);
            store(dz_rows + i * s.width + j, dup);
            energy += value * dh;
          }
          if (out->probs) out->probs[(first + own.local[i]) * f.num_experts + s.expert] += hsum(energy);
        }
        if (!out->x) continue;
        combine(s, packed[0], f.d_in, dz_rows, own.local, n, own.sums);
        if (f.gate) combine(s, packed[1], f.d_in, dz_gate_rows, own.local, n, own.sums);
      }
      if (out->x) write_block((IO *)out->x, out->x_stride, f.d_in, nullptr, own.sums, first, number);
    }
  }

  // -- gradients of weights --------------------------------------------------------------------------------------------------------------

  // weights[i] (s.size, padded(columns)) = left[i]' times the rows of the expert's tokens.
  void reduce(const Own &own, const Slice &s, const element *const *left, int number, const IO *data, int64_t stride, int64_t columns) const {
    const int64_t all = padded(columns), n = start[num_blocks * f.num_experts + s.expert] - start[s.expert];
    const int32_t *token = tokens + start[s.expert];
    for (int i = 0; i < number; i++) memset(own.weights[i], 0, 4 * s.size * all);
    for (int64_t from = 0; from < n; from += REDUCED_TOKENS) {
      const int64_t rows = min64(REDUCED_TOKENS, n - from);
      for (int i = 0; i < number; i++)
        pack_rows<Step>([&](int64_t k) { return left[i] + (from + k) * s.width; }, rows, s.width, s.width, own.left[i]);
      for (int64_t c = 0; c < all; c += PANEL) {
        const int64_t width = min64(PANEL, all - c);
        pack_rows<Step>([&](int64_t k) { return data + token[from + k] * stride + c; }, rows, min64(PANEL, columns - c), width, own.panel);
        for (int i = 0; i < number; i++)
          for (int64_t g = 0; g < s.size; g += TILE_TOKENS) {
            const int64_t m = min64(TILE_TOKENS, s.size - g);
            const unit *a[TILE_TOKENS];
            float *to[TILE_TOKENS];
            for (int64_t r = 0; r < m; r++) a[r] = own.left[i] + g + r, to[r] = own.weights[i] + (g + r) * all + c;
            any_tile<Step>(m, width, steps(rows), a, s.width, own.panel, to, true);
          }
      }
    }
  }

  void write_weights(const float *from, const Slice &s, int64_t columns, void *gradient, int64_t row, int64_t column) const {
    IO *to = (IO *)gradient + s.neuron * row;
    const int64_t all = padded(columns);
    if (column == 1) {
      for (int64_t g = 0; g < s.size; g++)
        for (int64_t c = 0; c < columns; c += W) store_first(to + g * row + c, load(from + g * all + c), columns - c);
      return;
    }
    for (int64_t g = 0; g < s.size; g += W)
      for (int64_t c = 0; c < columns; c += W) {
        vf square[W];
        for (int64_t i = 0; i < W; i++) square[i] = g + i < s.size ? load(from + (g + i) * all + c) : vf{};
        transpose(square);
        for (int64_t i = 0; i < min64(W, columns - c); i++) store_first(to + g * row + (c + i) * column, square[i], s.size - g);
      }
  }

  void write_bias(const element *rows, const Slice &s, void *gradient) const {
    const int64_t n = start[num_blocks * f.num_experts + s.expert] - start[s.expert];
    for (int64_t j = 0; j < s.width; j += W) {
      vf sum = vf{};
      for (int64_t from = 0; from < n; from += REDUCED_TOKENS) {
        vf part = vf{};
        for (int64_t i = from; i < min64(from + REDUCED_TOKENS, n); i++) part += load(rows + i * s.width + j);
        sum += part;
      }
      store_first((IO *)gradient + s.neuron + j, sum, s.size - j);
    }
  }

  void reduce_slices(int thread) {
    const Own own = this->own(thread, f.d_out, f.d_in, true);
    for (int64_t k; (k = next.fetch_add(1, std::memory_order_relaxed)) < num_slices;) {
      const Slice &s = slices[k];
      const element *of_h[] = {h + s.rows}, *of_dz[] = {dz + s.rows, f.gate ? dz_gate + s.rows : nullptr};
      if (out->down) {
        reduce(own, s, of_h, 1, grad, grad_stride, f.d_out);
        write_weights(own.weights[0], s, f.d_out, out->down, out->down_stride, out->down_column);
      }
      if (out->up || out->gate) {
        reduce(own, s, of_dz, f.gate ? 2 : 1, x, x_stride, f.d_in);
        if (out->up) write_weights(own.weights[0], s, f.d_in, out->up, out->up_stride, out->up_column);
        if (out->gate) write_weights(own.weights[1], s, f.d_in, out->gate, out->gate_stride, out->gate_column);
      }
      if (out->up_bias) write_bias(of_dz[0], s, out->up_bias);
      if (out->gate_bias) write_bias(of_dz[1], s, out->gate_bias);
    }
  }

  // -- entry -----------------------------------------------------------------------------------------------------------------------------

  void start_phase(void (*task)(void *, int, int)) {
    next.store(0);
    parallel(num_threads, task, this);
  }

  // What lies in scratch memory beside the threads' own: the index, packed weights, and of a backward pass h and dz.
  void lay_out(Arena &arena, int64_t pairs, bool is_backward) {
    int64_t widths = 0, units = 0;
    for (int64_t e = 0; e < f.num_experts; e++)
      for (int64_t size = expert_size(e); size > 0; size -= SLICE_NEURONS)
        widths += padded(min64(size, SLICE_NEURONS)), units += steps(min64(size, SLICE_NEURONS));
    slices = arena.take<Slice>(num_slices);
    start = arena.take<int32_t>((num_blocks + 1) * f.num_experts);
    tokens = arena.take<int32_t>(pairs);
    const int64_t first = is_backward ? units * padded(f.d_in) : widths * steps(f.d_in);
    packed[0] = (unit *)arena.take<float>(first);
    packed[1] = (unit *)arena.take<float>(f.gate ? first : 0);
    packed[2] = (unit *)arena.take<float>(is_backward ? widths * steps(f.d_out) : units * padded(f.d_out));
    const int64_t size = expert_size(0), whole = size / SLICE_NEURONS * SLICE_NEURONS;
    const int64_t elements = is_backward ? pairs * (whole + padded(size - whole)) : 0;  // of the larger experts
    h = arena.take<element>(elements), dz = arena.take<element>(elements), dz_gate = arena.take<element>(f.gate ? elements : 0);
  }

  int prepare(const TrainCall &c) {
    const bool is_backward = c.out != nullptr;
    int64_t pairs = 0;
    for (int64_t i = 0; i < num_tokens * f.num_experts; i++) pairs += c.mask[i] != 0;
    if (pairs > INT32_MAX) return MOEIFY_BAD_ARGUMENT;
    Arena own_bytes(nullptr), bytes(nullptr);
    const Own counted(own_bytes, *this, is_backward ? f.d_out : f.d_in, is_backward ? f.d_in : f.d_out, is_backward);
    (void)counted;
    per_thread = own_bytes.used;
    lay_out(bytes, pairs, is_backward);
    memory = scratch(per_thread * num_threads + bytes.used);
    if (!memory) return MOEIFY_NO_MEMORY;
    Arena arena(memory + per_thread * num_threads);
    lay_out(arena, pairs, is_backward);
    const int64_t needed = plan(c.mask);
    return c.kept && needed > c.kept_elements ? MOEIFY_BAD_ARGUMENT : MOEIFY_OK;
  }
};

template <class Step, class IO>
static int run_training(const moeify_train &t, const TrainCall &c, int num_threads) {
  Training<Step, IO> job(t, c.num_tokens, num_threads);
  job.x = (const IO *)c.x, job.x_stride = c.x_stride, job.out = c.out;
  if (const int status = job.prepare(c)) return status;
  if (!c.out) {
    job.y = (IO *)c.y, job.y_stride = c.y_stride, job.keeps = (IO *)c.kept;
    job.start_phase(&Training<Step, IO>::pack_forward);
    job.start_phase(&Training<Step, IO>::run_forward);
    return MOEIFY_OK;
  }
  job.kept = (const IO *)c.kept, job.grad = (const IO *)c.grad, job.grad_stride = c.grad_stride;
  job.start_phase(&Training<Step, IO>::pack_backward);
  job.start_phase(&Training<Step, IO>::run_backward);
  const moeify_gradients &g = *c.out;
  if (g.up || g.gate || g.down || g.up_bias || g.gate_bias) job.start_phase(&Training<Step, IO>::run_reduce);
  return MOEIFY_OK;
}
