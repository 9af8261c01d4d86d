// Linear layers whose tokens skip input channels; included once per instruction set, inside its namespace, after ffn.h (see isa.h).
//
// Letters: T tokens, K input channels, N outputs.
//
// Rows of W^T, one for each input channel, are contiguous. First the kept channels are listed: one comparison each, and only their rows are
// read. STREAMS rows at a time are added to sums of fp32, which stay in the first cache: the rows of a group are as many streams that the
// processor follows, and each sum is loaded and stored once a group. Threads share the columns; where there are too few for all, the
// channels, too, and the first thread adds up.

constexpr int STREAMS = 8;                     // rows added at once
constexpr int64_t SHARE = 32;                 // columns, of which a thread takes a multiple: no two write to one line of y
constexpr int64_t RUN_BYTES = 256;            // of a row that a thread reads at least, before threads share channels
constexpr int64_t THREAD_BYTES = 16 << 10;    // of weights that are worth another thread
constexpr int64_t MOST_TOKENS = 64;           // at once
constexpr int64_t SUM_FLOATS = 2 << 10;       // of sums at once: they stay in the first cache beside the rows; SHARE columns of most tokens
constexpr int64_t BLOCK_STREAMS = 32;         // times STREAMS rows are summed apart before they are added: K / 8 additions in turn are too many
constexpr int64_t AHEAD_BYTES = 1 << 10;      // of each row, asked for before it is needed

// The channels that some of the tokens keep.
struct Kept {
  int32_t *index;
  float *value;        // value[j * tokens + t]: what token t multiplies row index[j] by; 0 where it skips it
  int64_t number = 0;

  Kept(Arena &arena, int64_t channels, int64_t tokens)
      : index(arena.take<int32_t>(channels + W)), value(arena.take<float>(channels * tokens + W)) {}

  // keep = |x| >= level, or everything without levels; a value that is no number is kept, a zero adds nothing and is not.
  template <class IO>
  void list(const IO *x, int64_t x_stride, int64_t tokens, const float *level, int64_t channels) {
    int64_t k = 0;
    number = 0;
#if MOEIFY_W == 16 && defined(__AVX512F__)
    if (tokens == 1) {
      __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      for (; k + W <= channels; k += W) {
        const __m512 v = (__m512)load(x + k);
        const __mmask16 large = _mm512_cmp_ps_mask(_mm512_abs_ps(v), level ? (__m512)load(level + k) : _mm512_setzero_ps(), _CMP_NLT_UQ);
        const __mmask16 keep = _mm512_mask_cmp_ps_mask(large, v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
        _mm512_storeu_si512(index + number, _mm512_maskz_compress_epi32(keep, at));
        _mm512_storeu_ps(value + number, _mm512_maskz_compress_ps(keep, v));
        number += __builtin_popcount(keep);
        at = _mm512_add_epi32(at, _mm512_set1_epi32(W));
      }
    }
#endif
    for (; k < channels; k++) {  // without a branch: half of them would be guessed wrong
      bool any = false;
      for (int64_t t = 0; t < tokens; t++) {
        const float v = to_float(x[t * x_stride + k]);
        const bool keep = !(level && fabsf(v) < level[k]) & (v != 0.0f);
        value[number * tokens + t] = keep ? v : 0.0f;
        any |= keep;
      }
      index[number] = (int32_t)k;
      number += any;
    }
  }
};

// Rows of W^T, from a column on, in the order of the kept channels; beyond the last the first of all, which costs nothing to ask for again.
template <class Wt>
struct RowSet {
  const Wt *row[STREAMS];
  RowSet(const Wt *weight, int64_t stride, const int32_t *index, int64_t left) {
#pragma GCC unroll 8
    for (int j = 0; j < STREAMS; j++) row[j] = weight + (j < left ? index[j] * stride : 0);
  }
  inline void prefetch(int64_t c) const {
#pragma GCC unroll 8
    for (int j = 0; j < STREAMS; j++) __builtin_prefetch(row[j] + c);
    asm volatile("");  // keeps GCC from making two loops of the one around: all that is asked for first, then the arithmetic
  }
};

// Of each row, what is asked for before it is needed: `distance` columns from here, which are those of the rows `near` while there are any,
// then of `far`.
template <class Wt>
struct Lookahead {
  const RowSet<Wt> &near, &far;
  int64_t distance, width;
  inline void at(int64_t c) const {
    if (c + distance < width)
      near.prefetch(c + distance);
    else
      far.prefetch(c + distance - width);
  }
};

// sum[t * sum_stride + c] += sum over R rows of value[j * tokens + t] * row[j][c], for c < width; a last part of a vector is read alone.
// The rows are summed before they are added: rounding errors of one addition a row would be several times those of a dot product's lanes.
template <class Wt, int R>
static void add_rows(float *sum, int64_t sum_stride, int64_t tokens, const float *value, const Wt *const *rows, int64_t width,
                     const Lookahead<Wt> *ahead) {
  constexpr int64_t LINE = 64 / (int64_t)sizeof(Wt);
  const int64_t vectors = width / W * W;
  const Wt *row[R];
#pragma GCC unroll 8
  for (int j = 0; j < R; j++) row[j] = rows[j];
  int64_t c = 0;
  if (tokens == 1) {
    vf factor[R];
#pragma GCC unroll 8
    for (int j = 0; j < R; j++) factor[j] = splat(value[j]);
    const auto add = [&](int64_t i) {
      vf s = factor[0] * load(row[0] + i);
#pragma GCC unroll 8
      for (int j = 1; j < R; j++) s += factor[j] * load(row[j] + i);
      store(sum + i, load(sum + i) + s);
    };
    for (; c + LINE <= vectors; c += LINE) {
      if (ahead) ahead->at(c);
#pragma GCC unroll 16
      for (int64_t i = 0; i < LINE; i += W) add(c + i);
    }
    for (; c < vectors; c += W) add(c);
  } else {
    for (; c < vectors; c += W) {
      if (ahead && c % LINE == 0) ahead->at(c);
      vf r[R];
#pragma GCC unroll 8
      for (int j = 0; j < R; j++) r[j] = load(row[j] + c);
      for (int64_t t = 0; t < tokens; t++) {
        float *total = sum + t * sum_stride + c;
        vf s = splat(value[t]) * r[0];
#pragma GCC unroll 8
        for (int j = 1; j < R; j++) s += splat(value[j * tokens + t]) * r[j];
        store(total, load(total) + s);
      }
    }
  }
  if (vectors == width) return;
  for (int j = 0; j < R; j++) {
    const vf r = load_first(row[j] + vectors, width - vectors);
    for (int64_t t = 0; t < tokens; t++) {
      float *s = sum + t * sum_stride + vectors;  // sums are padded to whole vectors
      store(s, load(s) + splat(value[j * tokens + t]) * r);
    }
  }
}

template <class Wt>
struct Columns {  // of W^T
  const Wt *weight;
  int64_t stride;

  // sum[t * sum_stride + i] += sums of the kept channels from one to another, over `width` columns from c on
  void add(float *sum, int64_t sum_stride, int64_t tokens, const Kept &kept, int64_t first, int64_t last, int64_t c, int64_t width) const {
    const int64_t most = SUM_FLOATS / tokens / SHARE * SHARE;
    for (int64_t done = 0; done < width; done += most)
      add_some(sum + done, sum_stride, tokens, kept, first, last, weight + c + done, min64(most, width - done));
  }

  void add_some(float *sum, int64_t sum_stride, int64_t tokens, const Kept &kept, int64_t first, int64_t last, const Wt *at,
                int64_t width) const {
    constexpr int64_t LINE = 64 / (int64_t)sizeof(Wt), AHEAD = AHEAD_BYTES / (int64_t)sizeof(Wt), BLOCK = BLOCK_STREAMS * STREAMS;
    const int64_t whole = round_up(width, LINE), skip = AHEAD / whole, columns = AHEAD % whole;
    const auto rows = [&](int64_t j) { return RowSet<Wt>(at, stride, kept.index + j, last - j); };
    for (int64_t j = first; j < first + skip * STREAMS; j += STREAMS)
      for (int64_t c = 0; c < width; c += LINE) rows(j).prefetch(c);
    for (int64_t c = 0; c < columns; c += LINE) rows(first + skip * STREAMS).prefetch(c);
    RowSet<Wt> far = rows(first + skip * STREAMS);
    alignas(64) float part[SUM_FLOATS];
    const int64_t part_stride = round_up(width, W);
    for (int64_t j = first; j < last;) {
      const int64_t end = min64(j + BLOCK, last);
      memset(part, 0, 4 * tokens * part_stride);
      for (; j + STREAMS <= end; j += STREAMS) {
        const RowSet<Wt> near = far, now = rows(j);
        far = rows(j + (skip + 1) * STREAMS);
        const Lookahead<Wt> ahead{near, far, columns, whole};
        add_rows<Wt, STREAMS>(part, part_stride, tokens, kept.value + j * tokens, now.row, width, &ahead);
      }
      for (; j + 2 <= end; j += 2) add_rows<Wt, 2>(part, part_stride, tokens, kept.value + j * tokens, rows(j).row, width, nullptr);
      for (; j < end; j++) add_rows<Wt, 1>(part, part_stride, tokens, kept.value + j * tokens, rows(j).row, width, nullptr);
      for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < part_stride; i += W) {
          float *total = sum + t * sum_stride + i;
          store(total, load(total) + load(part + t * part_stride + i));
        }
    }
  }
};

// How threads share columns, and channels where columns are too few.
struct Grid {
  int64_t columns, parts;  // threads side by side, and one behind the other

  Grid(int64_t width, int64_t element_bytes, int threads)
      : columns(max64(1, min64(threads, width * element_bytes / RUN_BYTES))), parts(threads / columns) {
    if (columns * parts < threads) columns = threads, parts = 1;
  }
};

// The first of the columns of share i.
static inline int64_t share(int64_t width, int64_t i, int64_t of) { return min64((width + SHARE - 1) / SHARE * i / of * SHARE, width); }

static inline int64_t sum_stride(const moeify_linear &f) { return round_up(f.d_out, SHARE); }

// Threads that so many kept channels are worth.
static inline int worth(const moeify_linear &f, int64_t kept, int64_t element_bytes, int num_threads) {
  return (int)max64(1, min64(num_threads, kept * f.d_out * element_bytes / THREAD_BYTES));
}

// Sums over the kept channels from one to another of columns from c to end; row t is at sum + t * sum_stride(f).
template <class Wt>
static void add_columns(const moeify_linear &f, const Kept &kept, int64_t tokens, int64_t first, int64_t last, int64_t c, int64_t end,
                        float *sum) {
  const int64_t stride = sum_stride(f);
  for (int64_t t = 0; t < tokens; t++) memset(sum + t * stride + c, 0, 4 * round_up(end - c, W));
  Columns<Wt>{(const Wt *)f.weight, f.weight_stride}.add(sum + c, stride, tokens, kept, first, last, c, end - c);
}

// sum * scale + bias, in place, of one token
template <class IO>
static inline void finish(const moeify_linear &f, float *sum, int64_t c, int64_t end) {
  if (f.scale)
    for (int64_t k = c; k < end; k++) sum[k] *= f.scale[k];
  if (f.bias)
    for (int64_t k = c; k < end; k++) sum[k] += to_float(((const IO *)f.bias)[k]);
}

template <class IO, class Wt>
struct SparseLinear {
  // What all threads share.
  struct Shared {
    Kept kept;
    float *sums;  // of each part those of all tokens
    Shared(Arena &arena, const moeify_linear &f, int64_t tokens, int64_t parts)
        : kept(arena, f.d_in, tokens), sums(arena.take<float>(parts * tokens * sum_stride(f))) {}
  };

  const moeify_linear &f;
  Shared &shared;
  int64_t tokens;
  IO *y;
  int64_t y_stride;

  static void task(void *self, int thread, int number) { static_cast<const SparseLinear *>(self)->run(thread, number); }

  void run(int thread, int number) const {
    const Grid grid(f.d_out, sizeof(Wt), number);
    const int64_t column = thread % grid.columns, part = thread / grid.columns, kept = shared.kept.number;
    const int64_t c = share(f.d_out, column, grid.columns), end = share(f.d_out, column + 1, grid.columns);
    if (c == end) return;
    add_columns<Wt>(f, shared.kept, tokens, kept * part / grid.parts, kept * (part + 1) / grid.parts, c, end, sums(part, 0));
    if (grid.parts == 1) write(c, end);
  }

  float *sums(int64_t part, int64_t t) const { return shared.sums + (part * tokens + t) * sum_stride(f); }

  void write(int64_t c, int64_t end) const {
    for (int64_t t = 0; t < tokens; t++) {
      float *sum = sums(0, t);
      finish<IO>(f, sum, c, end);
      for (int64_t k = c; k < end; k++) convert_to(y[t * y_stride + k], sum[k]);
    }
  }

  void execute(const IO *x, int64_t x_stride, int num_threads) {
    shared.kept.list(x, x_stride, tokens, f.level, f.d_in);
    const Grid grid(f.d_out, sizeof(Wt), parallel(worth(f, shared.kept.number, sizeof(Wt), num_threads), task, this));
    if (grid.parts == 1) return;
    for (int64_t part = 1; part < grid.parts; part++)  // in order: the same bits for the same number of threads
      for (int64_t t = 0; t < tokens; t++)
        for (int64_t k = 0; k < f.d_out; k++) sums(0, t)[k] += sums(part, t)[k];
    write(0, f.d_out);
  }
};

template <class IO, class Wt>
static int run_linear_of(const moeify_linear &f, const void *x, int64_t x_stride, int64_t tokens, void *y, int64_t y_stride,
                         int num_threads) {
  typedef SparseLinear<IO, Wt> Job;
  char *memory = scratch(bytes_of<typename Job::Shared>(f, tokens, num_threads));
  if (!memory) return MOEIFY_NO_MEMORY;
  Arena arena(memory);
  typename Job::Shared shared(arena, f, tokens, num_threads);
  Job{f, shared, tokens, (IO *)y, y_stride}.execute((const IO *)x, x_stride, num_threads);
  return MOEIFY_OK;
}

// -- three layers of a gated feed-forward network ---------------------------------------------------------------------------------------

template <class IO, class Wt>
struct SparseGated {
  struct Shared {
    Kept gate_kept, up_kept;
    float *gate, *up;  // tokens x F
    IO *h;             // tokens x F
    typename SparseLinear<IO, Wt>::Shared down;
    Shared(Arena &arena, const moeify_gated &g, int64_t tokens, int64_t parts)
        : gate_kept(arena, g.gate.d_in, tokens), up_kept(arena, g.up.d_in, tokens), gate(arena.take<float>(tokens * sum_stride(g.gate))),
          up(arena.take<float>(tokens * sum_stride(g.up))), h(arena.take<IO>(tokens * sum_stride(g.up))), down(arena, g.down, tokens, parts) {}
  };

  const moeify_gated &g;
  Shared &shared;
  int64_t tokens;

  static void task(void *self, int thread, int number) { static_cast<const SparseGated *>(self)->run(thread, number); }

  void run(int thread, int number) const {
    const int64_t width = g.up.d_out, c = share(width, thread, number), end = share(width, thread + 1, number), stride = sum_stride(g.up);
    if (c == end) return;
    add_columns<Wt>(g.gate, shared.gate_kept, tokens, 0, shared.gate_kept.number, c, end, shared.gate);
    add_columns<Wt>(g.up, shared.up_kept, tokens, 0, shared.up_kept.number, c, end, shared.up);
    for (int64_t t = 0; t < tokens; t++) {
      float *gate = shared.gate + t * stride, *up = shared.up + t * stride;
      IO *h = shared.h + t * stride;
      finish<IO>(g.gate, gate, c, end);
      finish<IO>(g.up, up, c, end);
      for (int64_t k = c; k < end; k += W) {  // sums are padded to whole vectors
        store(up + k, activate(load(gate + k), g.activation) * load(up + k));
        for (int64_t i = k; i < min64(k + W, end); i++) convert_to(h[i], up[i]);
      }
    }
  }
};

template <class IO, class Wt>
static int run_gated_of(const moeify_gated &g, const void *x, int64_t x_stride, int64_t tokens, void *y, int64_t y_stride,
                        int num_threads) {
  typedef SparseGated<IO, Wt> Job;
  char *memory = scratch(bytes_of<typename Job::Shared>(g, tokens, num_threads));
  if (!memory) return MOEIFY_NO_MEMORY;
  Arena arena(memory);
  typename Job::Shared shared(arena, g, tokens, num_threads);
  shared.gate_kept.list((const IO *)x, x_stride, tokens, g.gate.level, g.gate.d_in);
  shared.up_kept.list((const IO *)x, x_stride, tokens, g.up.level, g.up.d_in);
  Job job{g, shared, tokens};
  parallel(worth(g.up, shared.gate_kept.number + shared.up_kept.number, sizeof(Wt), num_threads), Job::task, &job);
  SparseLinear<IO, Wt>{g.down, shared.down, tokens, (IO *)y, y_stride}.execute(shared.h, sum_stride(g.up), num_threads);
  return MOEIFY_OK;
}

// -- the mask alone ---------------------------------------------------------------------------------------------------------------------

// to = |from| < level ? 0 : from, W at a time; returns how many that were. With the numbers' types left to it, GCC makes branches for bf16.
static inline int64_t mask_vectors(const float *from, const float *level, int64_t channels, float *to) {
  int64_t k = 0;
  for (; k + W <= channels; k += W) {
    const vf v = load(from + k);
    store(to + k, (v < 0.0f ? -v : v) < load(level + k) ? vf{} : v);
  }
  return k;
}
static inline int64_t mask_vectors(const bf16 *from, const float *level, int64_t channels, bf16 *to) {
  int64_t k = 0;
  for (; k + W <= channels; k += W) {
    const vf v = load(from + k);
    const vi below = (v < 0.0f ? -v : v) < load(level + k);
    *reinterpret_cast<vh_mem *>(to + k) = *reinterpret_cast<const vh_mem *>(from + k) & ~__builtin_convertvector(below, vh);
  }
  return k;
}

// For whoever multiplies by the whole weight: x with its skipped channels at zero, in one pass over it.
template <class IO>
struct Mask {
  const IO *x;
  const float *level;
  int64_t tokens, channels;
  IO *y;

  static void task(void *self, int thread, int number) { static_cast<const Mask *>(self)->run(thread, number); }

  void run(int thread, int number) const {
    for (int64_t t = tokens * thread / number; t < tokens * (thread + 1) / number; t++) {
      const IO *from = x + t * channels;
      IO *to = y + t * channels;
      for (int64_t k = mask_vectors(from, level, channels, to); k < channels; k++) to[k] = fabsf(to_float(from[k])) < level[k] ? IO{} : from[k];
    }
  }
};

template <class IO>
static void mask_of(const void *x, const float *level, int64_t tokens, int64_t channels, void *y, int num_threads) {
  Mask<IO> job{(const IO *)x, level, tokens, channels, (IO *)y};
  parallel((int)max64(1, min64(num_threads, tokens * channels * (int64_t)sizeof(IO) / THREAD_BYTES)), Mask<IO>::task, &job);
}

// -- entry -------------------------------------------------------------------------------------------------------------------------------

template <class Layer>
using Run = int (*)(const Layer &, const void *, int64_t, int64_t, void *, int64_t, int);

// So many tokens at once that their sums fit.
template <class IO, class Layer>
static int in_turn(Run<Layer> run, const Layer &layer, const void *x, int64_t x_stride, int64_t num_tokens, void *y, int64_t y_stride,
                   int num_threads) {
  int status = MOEIFY_OK;
  for (int64_t t = 0; t < num_tokens && status == MOEIFY_OK; t += MOST_TOKENS)
    status = run(layer, (const IO *)x + t * x_stride, x_stride, min64(MOST_TOKENS, num_tokens - t), (IO *)y + t * y_stride, y_stride,
                 num_threads);
  return status;
}

int run_linear(const moeify_linear &f, const void *x, int64_t x_stride, int64_t num_tokens, void *y, int64_t y_stride, int num_threads) {
  const bool is_int8 = f.weight_dtype == MOEIFY_INT8;
  if (f.dtype == MOEIFY_FP32)
    return in_turn<float>(is_int8 ? run_linear_of<float, int8_t> : run_linear_of<float, float>, f, x, x_stride, num_tokens, y, y_stride,
                          num_threads);
  return in_turn<bf16>(is_int8 ? run_linear_of<bf16, int8_t> : run_linear_of<bf16, bf16>, f, x, x_stride, num_tokens, y, y_stride,
                       num_threads);
}

int run_gated(const moeify_gated &g, const void *x, int64_t x_stride, int64_t num_tokens, void *y, int64_t y_stride, int num_threads) {
  const bool is_int8 = g.up.weight_dtype == MOEIFY_INT8;
  if (g.up.dtype == MOEIFY_FP32)
    return in_turn<float>(is_int8 ? run_gated_of<float, int8_t> : run_gated_of<float, float>, g, x, x_stride, num_tokens, y, y_stride,
                          num_threads);
  return in_turn<bf16>(is_int8 ? run_gated_of<bf16, int8_t> : run_gated_of<bf16, bf16>, g, x, x_stride, num_tokens, y, y_stride,
                       num_threads);
}

int run_mask(const void *x, const float *level, int64_t num_tokens, int64_t channels, int32_t dtype, void *y, int num_threads) {
  (dtype == MOEIFY_FP32 ? mask_of<float> : mask_of<bf16>)(x, level, num_tokens, channels, y, num_threads);
  return MOEIFY_OK;
}
