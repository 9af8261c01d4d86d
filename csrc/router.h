// Router and selection rule; included once per instruction set, inside its namespace (see isa.h). The rules say what moeify.select says,
// ties, zeros and NaN included: a row with a NaN runs every expert (the k first for TOPK, NaN counting as the largest).
//
// Letters: T tokens, D input width, R router width, E experts.

static inline float largest(const float *score, int64_t experts, bool *has_nan) {
  vf most = splat(score[0]);
  vi nan = {};
  int64_t e = 0;
  for (; e + W <= experts; e += W) {
    const vf s = load(score + e);
    nan |= s != s;
    most = s > most ? s : most;
  }
  float lane[W], result = score[0];
  store(lane, most);
  for (int i = 0; i < W; i++) *has_nan |= nan[i] != 0, result = lane[i] > result ? lane[i] : result;
  for (; e < experts; e++) *has_nan |= score[e] != score[e], result = score[e] > result ? score[e] : result;
  return result;
}

// Experts whose score is at least a level; no expert is below its own score, so one runs at least.
static inline void at_least(const float *score, int64_t experts, float level, uint8_t *mask) {
  for (int64_t e = 0; e < experts; e++) mask[e] = !(score[e] < level);
}

static inline void select_row(float *score, int64_t experts, int32_t rule, float knob, int32_t *order, uint8_t *mask) {
  if (experts < 1) __builtin_unreachable();  // checked at the entry; GCC warns of memset's size otherwise
  bool has_nan = false;
  const float most = largest(score, experts, &has_nan);
  if (rule == MOEIFY_TOPK) {
    const int64_t k = knob < (float)experts ? (int64_t)knob : experts;
    for (int64_t e = 0; e < experts; e++) order[e] = (int32_t)e;
    const auto before = [score](int32_t a, int32_t b) {  // largest first, NaN before all, lowest expert of equals
      const bool nan_a = score[a] != score[a], nan_b = score[b] != score[b];
      if (nan_a != nan_b) return nan_a;
      if (!nan_a && score[a] != score[b]) return score[a] > score[b];
      return a < b;
    };
    if (k < experts) std::nth_element(order, order + k, order + experts, before);
    memset(mask, 0, experts);
    for (int64_t i = 0; i < k; i++) mask[order[i]] = 1;
    return;
  }
  if (has_nan) {
    memset(mask, 1, experts);
    return;
  }
  if (rule == MOEIFY_THRESHOLD) return at_least(score, experts, most < knob ? most : knob, mask);
  if (rule == MOEIFY_DYNK_MAX) {
    if (knob == 0.0f) {
      memset(mask, 1, experts);
      return;
    }
    return at_least(score, experts, knob * most < most ? knob * most : most, mask);
  }
  // MOEIFY_DYNK_MASS
  if (knob >= 1.0f) {
    memset(mask, 1, experts);
    return;
  }
  for (int64_t e = 0; e < experts; e++) {
    score[e] = most <= 0.0f ? 1.0f : score[e] > 0.0f ? score[e] : 0.0f;
    order[e] = (int32_t)e;
  }
  // Not stable_sort: it needs functions of the C++ library's own, of which the linker keeps any instruction set's copy.
  std::sort(order, order + experts, [score](int32_t a, int32_t b) { return score[a] != score[b] ? score[a] > score[b] : a < b; });
  float total = 0.0f, before = 0.0f;
  for (int64_t i = 0; i < experts; i++) total += score[order[i]];
  for (int64_t i = 0; i < experts; i++) {
    mask[order[i]] = i == 0 || !(before / total >= knob);  // inf / inf: selected, as in Python
    before += score[order[i]];
  }
}

// A layer of the router is a network of which only the first half runs.
struct Layer {
  typedef Network<DotFp32, AddFp32, float, float, float> Net;
  moeify_ffn f = {};
  Net net{f};
  Layer(const Layer &) = delete;  // net refers to f

  Layer(const float *weight, const float *bias, int64_t width, int64_t num_rows, int32_t activation) {
    f.up = weight, f.up_bias = bias, f.up_stride = f.d_in = width, f.num_neurons = num_rows, f.activation = activation;
  }

  static int64_t scratch_floats(int64_t tokens) { return tokens * CHUNK_NEURONS + W; }

  // out[t * num_neurons + j] for the rows j from first to last. scratch: scratch_floats(num_tokens).
  void run(const float *const *x, int64_t num_tokens, int64_t first, int64_t last, float *out, float *scratch) const {
    for (int64_t j = first; j < last; j += CHUNK_NEURONS) {
      const Piece piece{nullptr, num_tokens, j, min64(CHUNK_NEURONS, last - j)};
      net.hidden(x, piece, scratch, nullptr);
      for (int64_t t = 0; t < num_tokens; t++) {
        float *to = out + t * f.num_neurons + j;
        const float *from = scratch + t * piece.neurons;
        if (piece.neurons == CHUNK_NEURONS)  // a fixed number: no call, no `rep movs`
          memcpy(to, from, 4 * CHUNK_NEURONS);
        else
          memcpy(to, from, 4 * piece.neurons);
      }
    }
  }
};

// Up to FEW_TOKENS tokens at a time. Where they are all, the threads share the rows of each layer; else they share the tokens.
template <class IO>
struct Router {
  const moeify_ffn &f;
  const moeify_router &r;
  const IO *x;
  int64_t x_stride, num_tokens;
  uint8_t *mask;
  char *memory = nullptr;  // per_thread bytes for each thread
  int64_t per_thread = bytes_of<Own>(*this);
  const Layer hidden_layer{r.hidden, r.hidden_bias, f.d_in, r.width, MOEIFY_RELU};
  const Layer out_layer{r.out, r.out_bias, r.width, f.num_experts, IDENTITY};
  std::atomic<int64_t> next{0};
  const float *rows[FEW_TOKENS] = {};  // of the few tokens, for all threads
  const float *hidden_rows[FEW_TOKENS] = {};

  // What each thread has of its own.
  struct Own {
    float *x, *hidden, *scores, *scratch;
    int32_t *order;
    Own(Arena &arena, const Router &router)
        : x(arena.take<float>(FEW_TOKENS * router.row_floats())),
          hidden(arena.take<float>(FEW_TOKENS * router.r.width)),
          scores(arena.take<float>(FEW_TOKENS * router.f.num_experts + W)),
          scratch(arena.take<float>(Layer::scratch_floats(FEW_TOKENS))),
          order(arena.take<int32_t>(router.f.num_experts)) {}
  };
  Own own(int thread) const {
    Arena arena(memory + thread * per_thread);
    return Own(arena, *this);
  }
  int64_t row_floats() const { return Rows<float, IO>::elements(f.d_in); }

  void read(const Own &own, int64_t first, int64_t n, const float **in, const float **hidden) const {
    for (int64_t t = 0; t < n; t++) {
      in[t] = Rows<float, IO>::get(x + (first + t) * x_stride, own.x + t * row_floats(), f.d_in);
      hidden[t] = own.hidden + t * r.width;
    }
  }

  void choose(const Own &own, int64_t first, int64_t n) const {
    float *scores = own.scores;
    const int64_t experts = f.num_experts;
    for (int64_t k = 0; k < n * experts; k += W) {
      const vf z = load(scores + k);
      vf half = z * 0.5f;
      half = half < -20.0f ? splat(-20.0f) : half;
      half = half > 20.0f ? splat(20.0f) : half;
      const vf score = r.is_abs ? (z < 0.0f ? -z : z) : exp_of(half);
      store(scores + k, z != z ? z : score);
    }
    for (int64_t t = 0; t < n; t++) {
      uint8_t *row = mask + (first + t) * experts;
      select_row(scores + t * experts, experts, r.rule, r.knob, own.order, row);
      if (r.always_on)
        for (int64_t e = 0; e < experts; e++) row[e] |= r.always_on[e];
    }
  }

  static void hidden_task(void *self, int thread, int threads) { static_cast<Router *>(self)->share(0, thread, threads); }
  static void out_task(void *self, int thread, int threads) { static_cast<Router *>(self)->share(1, thread, threads); }
  static void tokens_task(void *self, int thread, int) { static_cast<Router *>(self)->blocks(thread); }

  void share(int layer, int thread, int threads) {
    const Layer &l = layer ? out_layer : hidden_layer;
    const int64_t groups = (l.f.num_neurons + ROWS - 1) / ROWS;
    const int64_t first = groups * thread / threads * ROWS, last = min64(groups * (thread + 1) / threads * ROWS, l.f.num_neurons);
    l.run(layer ? hidden_rows : rows, num_tokens, first, last, layer ? own(0).scores : own(0).hidden, own(thread).scratch);
  }

  void blocks(int thread) {
    const Own own = this->own(thread);
    const float *in[FEW_TOKENS], *hidden[FEW_TOKENS];
    for (int64_t first; (first = next.fetch_add(FEW_TOKENS, std::memory_order_relaxed)) < num_tokens;) {
      const int64_t n = min64(FEW_TOKENS, num_tokens - first);
      read(own, first, n, in, hidden);
      hidden_layer.run(in, n, 0, r.width, own.hidden, own.scratch);
      out_layer.run(hidden, n, 0, f.num_experts, own.scores, own.scratch);
      choose(own, first, n);
    }
  }

  void run(int num_threads) {
    if (num_tokens > FEW_TOKENS) {
      parallel(num_threads, tokens_task, this);
      return;
    }
    read(own(0), 0, num_tokens, rows, hidden_rows);
    parallel(num_threads, hidden_task, this);
    parallel(num_threads, out_task, this);
    choose(own(0), 0, num_tokens);
  }
};

template <class IO>
static int route(const moeify_ffn &f, const moeify_router &r, const void *x, int64_t x_stride, int64_t num_tokens, uint8_t *mask,
                 int num_threads) {
  Router<IO> router{f, r, (const IO *)x, x_stride, num_tokens, mask};
  router.memory = scratch(router.per_thread * num_threads);
  if (!router.memory) return MOEIFY_NO_MEMORY;
  router.run(num_threads);
  return MOEIFY_OK;
}
