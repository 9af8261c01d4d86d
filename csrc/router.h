// Router and selection rule; included once per instruction set, inside its namespace (see isa.h). The rules say what moeify.select says,
// ties, zeros and NaN included: a row with a NaN runs every expert (the k first for TOPK, NaN counting as the largest).
//
// Letters: T tokens, D input width, R router width, E experts.

// -- rules -----------------------------------------------------------------------------------------------------------------------------
//
// Scores are at least 0, so their bits, taken for integers, have the same order. As such keys NaN is the largest, and one number.

constexpr int32_t KEY_INFINITY = 0x7F800000, KEY_NAN = KEY_INFINITY + 1;
constexpr int32_t NO_KEY = -1;  // fills up a row to key_stride
constexpr int64_t KEY_STEP = 2 * W;

static inline int64_t key_stride(int64_t experts) { return round_up(experts, KEY_STEP); }

static inline int32_t key_of(float score) {
  int32_t bits;
  memcpy(&bits, &score, 4);
  return bits & INT32_MAX;
}
static inline float score_of(int32_t key) {
  float score;
  memcpy(&score, &key, 4);
  return score;
}

// The key of a score from what the router's last layer gives for it.
static inline vi key_of(vf z, bool is_abs) {
  vf half = z * 0.5f;
  half = half < -20.0f ? splat(-20.0f) : half;
  half = half > 20.0f ? splat(20.0f) : half;
  const vi key = (vi)(is_abs ? z : exp_of(half)) & INT32_MAX;
  return z != z ? vi{} + KEY_NAN : key;
}

static inline int32_t largest(const int32_t *key, int64_t experts) {
  vi most = vi{} + NO_KEY;
  for (int64_t e = 0; e < experts; e += W) {
    const vi k = load(key + e);
    most = k > most ? k : most;
  }
  return hmax(most);
}

struct Above {
  int64_t number;
  float mass;  // sum of their scores
};

// Of the keys above a level.
static inline Above above(const int32_t *key, int64_t experts, int32_t level) {
  vi number0 = {}, number1 = {};
  vf mass0 = {}, mass1 = {};
  for (int64_t e = 0; e < experts; e += KEY_STEP) {
    const vi key0 = load(key + e), key1 = load(key + e + W);
    const vi is0 = key0 > level, is1 = key1 > level;
    number0 -= is0, number1 -= is1;
    mass0 += (vf)(is0 & key0), mass1 += (vf)(is1 & key1);
  }
  return {(int64_t)hsum(__builtin_convertvector(number0 + number1, vf)), hsum(mass0 + mass1)};
}

static inline void at_least(const int32_t *__restrict key, int64_t experts, int32_t level, uint8_t *__restrict mask) {
  for (int64_t e = 0; e < experts; e++) mask[e] = key[e] >= level;
}

// Experts from the largest score down, of equal ones the lowest first, each as long as those before it have not reached what is wanted. The
// first one has not. Bisects the keys instead of sorting them.
template <class Reached>
static inline void from_the_top(const int32_t *key, int64_t experts, int32_t most, uint8_t *mask, const Reached &reached) {
  int32_t low = -1, high = most;  // above low it is reached, above high it is not
  int64_t number = experts;       // above low
  Above top = {0, 0.0f};          // above high
  while (number - top.number > 1 && high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    const Above a = above(key, experts, middle);
    if (reached(a))
      low = middle, number = a.number;
    else
      high = middle, top = a;
  }
  if (number - top.number == 1) return at_least(key, experts, low + 1, mask);
  for (int64_t e = 0; e < experts; e++) {  // some are equal to high
    mask[e] = key[e] > high || (key[e] == high && !reached(top));
    if (key[e] == high) top.number++, top.mass += score_of(high);
  }
}

// key: one row, filled up.
static inline void select_row(int32_t *key, int64_t experts, int32_t rule, float knob, uint8_t *mask) {
  if (experts < 1) __builtin_unreachable();  // checked at the entry; GCC warns of memset's size otherwise
  if (rule == MOEIFY_TOPK) {
    if (knob >= (float)experts)
      memset(mask, 1, experts);
    else if (knob < 1.0f)
      memset(mask, 0, experts);
    else
      from_the_top(key, experts, largest(key, experts), mask, [k = (int64_t)knob](const Above &a) { return a.number >= k; });
    return;
  }
  const int32_t most = largest(key, experts);
  const float score = score_of(most);
  if (most == KEY_NAN || (rule == MOEIFY_DYNK_MAX && knob == 0.0f) || (rule == MOEIFY_DYNK_MASS && knob >= 1.0f)) {
    memset(mask, 1, experts);
    return;
  }
  // No expert is below the largest score, so one runs at least.
  if (rule == MOEIFY_THRESHOLD) return at_least(key, experts, key_of(score < knob ? score : knob), mask);
  if (rule == MOEIFY_DYNK_MAX) return at_least(key, experts, key_of(knob * score < score ? knob * score : score), mask);
  // MOEIFY_DYNK_MASS
  if (most == 0)
    for (int64_t e = 0; e < experts; e++) key[e] = key_of(1.0f);
  const float total = above(key, experts, -1).mass;
  if (knob == 0.0f)
    from_the_top(key, experts, largest(key, experts), mask, [](const Above &a) { return a.number >= 1; });
  else  // inf / inf has not reached it: all are selected, as in Python
    from_the_top(key, experts, largest(key, experts), mask, [=](const Above &a) { return a.mass / total >= knob; });
}

// -- few tokens: dot products ----------------------------------------------------------------------------------------------------------

constexpr int64_t LANE_TOKENS = 5;  // from so many on, lanes are tokens

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

  // out[t * out_stride + j] for the rows j from first to last. scratch: scratch_floats(num_tokens).
  void run(const float *const *x, int64_t num_tokens, int64_t first, int64_t last, float *out, int64_t out_stride, float *scratch) const {
    for (int64_t j = first; j < last; j += CHUNK_NEURONS) {
      const Piece piece{nullptr, num_tokens, j, min64(CHUNK_NEURONS, last - j)};
      net.hidden(x, piece, scratch, nullptr);
      for (int64_t t = 0; t < num_tokens; t++) {
        float *to = out + t * out_stride + j;
        const float *from = scratch + t * piece.neurons;
        if (piece.neurons == CHUNK_NEURONS)  // a fixed number: no call, no `rep movs`
          memcpy(to, from, 4 * CHUNK_NEURONS);
        else
          memcpy(to, from, 4 * piece.neurons);
      }
    }
  }
};

template <class IO>
struct Routing {
  const moeify_ffn &f;
  const moeify_router &r;
  const IO *x;
  int64_t x_stride, num_tokens;
  uint8_t *mask;
  char *memory = nullptr;  // of all threads

  void decide(int32_t *key, int64_t t) const {
    uint8_t *row = mask + t * f.num_experts;
    select_row(key, f.num_experts, r.rule, r.knob, row);
    if (r.always_on)
      for (int64_t e = 0; e < f.num_experts; e++) row[e] |= r.always_on[e];
  }
};

// The threads share the rows of each layer.
template <class IO>
struct DotRouter : Routing<IO> {
  using Routing<IO>::f, Routing<IO>::r, Routing<IO>::x, Routing<IO>::num_tokens;
  const int num_threads;
  const int64_t stride = key_stride(f.num_experts);
  const Layer hidden_layer{r.hidden, r.hidden_bias, f.d_in, r.width, MOEIFY_RELU};
  const Layer out_layer{r.out, r.out_bias, r.width, f.num_experts, IDENTITY};
  const float *rows[LANE_TOKENS] = {}, *hidden_rows[LANE_TOKENS] = {};

  DotRouter(const Routing<IO> &routing, int num_threads) : Routing<IO>(routing), num_threads(num_threads) {}

  struct Shared {
    float *x, *hidden, *z;
    int32_t *key;
    Shared(Arena &arena, const DotRouter &router)
        : x(arena.take<float>(LANE_TOKENS * router.row_floats())),
          hidden(arena.take<float>(LANE_TOKENS * router.r.width)),
          z(arena.take<float>(LANE_TOKENS * router.stride)),
          key(arena.take<int32_t>(router.stride)) {}
  };
  struct Own {
    float *scratch;
    explicit Own(Arena &arena) : scratch(arena.take<float>(Layer::scratch_floats(LANE_TOKENS))) {}
  };
  int64_t row_floats() const { return Rows<float, IO>::elements(f.d_in); }
  int64_t bytes() const { return bytes_of<Shared>(*this) + num_threads * bytes_of<Own>(); }

  static void hidden_task(void *self, int thread, int threads) { static_cast<DotRouter *>(self)->share(0, thread, threads); }
  static void out_task(void *self, int thread, int threads) { static_cast<DotRouter *>(self)->share(1, thread, threads); }

  void share(int layer, int thread, int threads) {
    Arena arena(this->memory);
    const Shared shared(arena, *this);
    Arena mine(this->memory + arena.used + thread * bytes_of<Own>());
    const Own own(mine);
    const Layer &l = layer ? out_layer : hidden_layer;
    const int64_t groups = (l.f.num_neurons + ROWS - 1) / ROWS;
    const int64_t first = groups * thread / threads * ROWS, last = min64(groups * (thread + 1) / threads * ROWS, l.f.num_neurons);
    if (layer)
      l.run(hidden_rows, num_tokens, first, last, shared.z, stride, own.scratch);
    else
      l.run(rows, num_tokens, first, last, shared.hidden, r.width, own.scratch);
  }

  void run() {
    Arena arena(this->memory);
    const Shared shared(arena, *this);
    for (int64_t t = 0; t < num_tokens; t++) {
      rows[t] = Rows<float, IO>::get(x + t * this->x_stride, shared.x + t * row_floats(), f.d_in);
      hidden_rows[t] = shared.hidden + t * r.width;
    }
    parallel(num_threads, hidden_task, this);
    parallel(num_threads, out_task, this);
    for (int64_t t = 0; t < num_tokens; t++) {
      float *z = shared.z + t * stride;
      for (int64_t e = f.num_experts; e < stride; e++) z[e] = 0.0f;
      for (int64_t e = 0; e < stride; e += W) store(shared.key + e, key_of(load(z + e), r.is_abs));
      for (int64_t e = f.num_experts; e < stride; e++) shared.key[e] = NO_KEY;
      this->decide(shared.key, t);
    }
  }
};

// -- more tokens: lanes are tokens -------------------------------------------------------------------------------------------------------
//
// Tokens stand in panels of up to PANEL_VECTORS vectors: element k of token t at [k * lanes + t], lanes being those vectors' width. Both
// layers multiply vectors of tokens by single weights, so no sum runs across lanes, and one token's result does not depend on the others.

constexpr int PANEL_VECTORS = W == 16 ? 4 : 2;
constexpr int64_t PANEL_TOKENS = PANEL_VECTORS * W;

static inline int64_t vectors_of(int64_t tokens) { return (tokens + W - 1) / W; }

// Weight rows of a tile: as many as the registers hold sums beside its V vectors of tokens and a weight.
constexpr int ROW_UNIT = 4;  // threads share rows in such units
constexpr int tile_rows(int vectors) { return W < 16 ? (vectors == 1 ? 8 : 6) : vectors == 4 ? 6 : vectors == 3 ? 8 : 12; }

// out[j * V * W + t] = activation(bias[j] + sum over k of w[j * width + k] * in[k * V * W + t]) for j < N.
template <int V, int N>
static __attribute__((noinline)) void lane_tile(const float *in, const float *w, int64_t width, const float *bias, bool relu, float *out) {
  vf sum[N][V];
#pragma GCC unroll 16
  for (int j = 0; j < N; j++)
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) sum[j][v] = splat(bias[j]);
  for (int64_t k = 0; k < width; k++) {
    __builtin_prefetch(w + N * width + k * N);  // the next tile's rows, in the order of memory
    vf a[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) a[v] = load(in + (k * V + v) * W);
#pragma GCC unroll 16
    for (int j = 0; j < N; j++) {
      const vf b = splat(w[j * width + k]);
#pragma GCC unroll 16
      for (int v = 0; v < V; v++) sum[j][v] += b * a[v];
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < N; j++)
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) store(out + (j * V + v) * W, relu ? activate(sum[j][v], MOEIFY_RELU) : sum[j][v]);
}

// The rows from first to last of a layer for one panel.
template <int V>
static inline void lane_rows(const float *in, const float *w, int64_t width, const float *bias, bool relu, int64_t first, int64_t last,
                             float *out) {
  constexpr int N = tile_rows(V);
  int64_t j = first;
  for (; j + N <= last; j += N) lane_tile<V, N>(in, w + j * width, width, bias + j, relu, out + j * V * W);
  for (; j + ROW_UNIT <= last; j += ROW_UNIT) lane_tile<V, ROW_UNIT>(in, w + j * width, width, bias + j, relu, out + j * V * W);
  for (; j < last; j++) lane_tile<V, 1>(in, w + j * width, width, bias + j, relu, out + j * V * W);
}

// Few tokens, and fewer vectors of them than threads: these share the work of each step. Else they share the tokens.
template <class IO>
struct LaneRouter : Routing<IO> {
  using Routing<IO>::f, Routing<IO>::r, Routing<IO>::x, Routing<IO>::num_tokens;
  const int num_threads;  // at most
  const bool few = num_tokens <= FEW_TOKENS && vectors_of(num_tokens) < num_threads;
  const int64_t stride = key_stride(f.num_experts);
  const int64_t most_tokens = few ? vectors_of(num_tokens) * W : PANEL_TOKENS;  // of a thread's panels
  const int64_t d_rows = round_up(f.d_in, W);
  std::atomic<int64_t> next{0};  // vector of tokens that nobody has

  LaneRouter(const Routing<IO> &routing, int num_threads) : Routing<IO>(routing), num_threads(num_threads) {}

  // All threads' where they share the steps, else each thread's.
  struct Panels {
    float *x, *hidden, *z;
    Panels(Arena &arena, const LaneRouter &router)
        : x(arena.take<float>(router.d_rows * router.most_tokens)),
          hidden(arena.take<float>(router.r.width * router.most_tokens)),
          z(arena.take<float>(router.f.num_experts * router.most_tokens)) {}
  };
  struct Own {
    int32_t *key;  // of W tokens
    Own(Arena &arena, const LaneRouter &router) : key(arena.take<int32_t>(router.stride * W)) {}
  };
  int64_t bytes() const { return num_threads * bytes_of<Own>(*this) + (few ? 1 : num_threads) * bytes_of<Panels>(*this); }
  Own own(int thread) const {
    Arena arena(this->memory + thread * bytes_of<Own>(*this));
    return Own(arena, *this);
  }
  Panels panels(int thread) const {
    Arena arena(this->memory + num_threads * bytes_of<Own>(*this) + thread * bytes_of<Panels>(*this));
    return Panels(arena, *this);
  }

  // Elements first to last, of which first is a multiple of W, of the tokens from t on, to a panel of so many vectors.
  void read(int64_t t, int64_t vectors, int64_t first, int64_t last, float *panel) const {
    for (int64_t k = first; k < last; k += W)
      for (int64_t v = 0; v < vectors; v++) {
        vf row[W];
        const int64_t n = min64(num_tokens - t - v * W, W);
        const IO *from = x + (t + v * W) * this->x_stride + k;
        if (k + W <= last)
#pragma GCC unroll 16
          for (int i = 0; i < W; i++) row[i] = i < n ? load(from + i * this->x_stride) : vf{};
        else
          for (int i = 0; i < W; i++) row[i] = i < n ? load_first(from + i * this->x_stride, last - k) : vf{};
        transpose(row);
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) store(panel + ((k + i) * vectors + v) * W, row[i]);
      }
  }

  void layer(bool second, const float *in, int64_t vectors, int64_t first, int64_t last, float *out) const {
    const float *w = second ? r.out : r.hidden, *bias = second ? r.out_bias : r.hidden_bias;
    const int64_t width = second ? r.width : f.d_in;
    switch (vectors) {
      case 1: return lane_rows<1>(in, w, width, bias, !second, first, last, out);
#if MOEIFY_W == 16
      case 2: return lane_rows<2>(in, w, width, bias, !second, first, last, out);
      case 3: return lane_rows<3>(in, w, width, bias, !second, first, last, out);
#endif
      default: return lane_rows<PANEL_VECTORS>(in, w, width, bias, !second, first, last, out);
    }
  }

  // The rule for vector v of a panel, whose first token is t.
  void choose(const Own &own, int64_t t, const float *z, int64_t vectors, int64_t v) const {
    for (int64_t e = 0; e < stride; e += W) {
      vf row[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; i++)
        row[i] = e + i < f.num_experts ? (vf)key_of(load(z + ((e + i) * vectors + v) * W), r.is_abs) : (vf)(vi{} + NO_KEY);
      transpose(row);
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) store(own.key + i * stride + e, (vi)row[i]);
    }
    const int64_t n = min64(num_tokens - t - v * W, W);
    for (int64_t i = 0; i < n; i++) this->decide(own.key + i * stride, t + v * W + i);
  }

  // Tokens that a thread has to itself.
  void alone(int thread, int threads) {
    const Own own = this->own(thread);
    const Panels panels = this->panels(thread);
    const int64_t all = vectors_of(num_tokens);
    int64_t first = next.load(std::memory_order_relaxed);
    while (first < all) {
      const int64_t n = min64(PANEL_VECTORS, (all - first + threads - 1) / threads);  // fewer at the end, which all threads reach together
      if (!next.compare_exchange_weak(first, first + n, std::memory_order_relaxed)) continue;
      read(first * W, n, 0, f.d_in, panels.x);
      layer(false, panels.x, n, 0, r.width, panels.hidden);
      layer(true, panels.hidden, n, 0, f.num_experts, panels.z);
      for (int64_t v = 0; v < n; v++) choose(own, first * W, panels.z, n, v);
      first = next.load(std::memory_order_relaxed);
    }
  }

  static int64_t share(int64_t number, int64_t unit, int thread, int threads) {
    return min64((number + unit - 1) / unit * thread / threads * unit, number);
  }

  void read_share(int thread, int threads) const {
    const Panels panels = this->panels(0);
    const int64_t first = share(f.d_in, W, thread, threads), last = share(f.d_in, W, thread + 1, threads);
    for (int64_t t = 0; t < num_tokens; t += PANEL_TOKENS)
      read(t, min64(PANEL_VECTORS, vectors_of(num_tokens - t)), first, last, panels.x + t * d_rows);
  }

  void layer_share(bool second, int thread, int threads) const {
    const Panels panels = this->panels(0);
    const int64_t rows = second ? f.num_experts : r.width;
    const int64_t first = share(rows, ROW_UNIT, thread, threads), last = share(rows, ROW_UNIT, thread + 1, threads);
    for (int64_t t = 0; t < num_tokens; t += PANEL_TOKENS)
      layer(second, second ? panels.hidden + t * r.width : panels.x + t * d_rows, min64(PANEL_VECTORS, vectors_of(num_tokens - t)), first,
            last, second ? panels.z + t * f.num_experts : panels.hidden + t * r.width);
  }

  void choose_share(int thread, int threads) const {
    const Own own = this->own(thread);
    const Panels panels = this->panels(0);
    const int64_t all = vectors_of(num_tokens);
    for (int64_t v = all * thread / threads; v < all * (thread + 1) / threads; v++) {
      const int64_t t = v / PANEL_VECTORS * PANEL_TOKENS;
      choose(own, t, panels.z + t * f.num_experts, min64(PANEL_VECTORS, vectors_of(num_tokens - t)), v % PANEL_VECTORS);
    }
  }

  static void alone_task(void *self, int thread, int threads) { static_cast<LaneRouter *>(self)->alone(thread, threads); }
  static void read_task(void *self, int thread, int threads) { static_cast<LaneRouter *>(self)->read_share(thread, threads); }
  static void hidden_task(void *self, int thread, int threads) { static_cast<LaneRouter *>(self)->layer_share(false, thread, threads); }
  static void out_task(void *self, int thread, int threads) { static_cast<LaneRouter *>(self)->layer_share(true, thread, threads); }
  static void choose_task(void *self, int thread, int threads) { static_cast<LaneRouter *>(self)->choose_share(thread, threads); }

  void run() {
    if (few)
      for (const auto task : {read_task, hidden_task, out_task, choose_task}) parallel(num_threads, task, this);
    else
      parallel(num_threads, alone_task, this);
  }
};

// -- entry -------------------------------------------------------------------------------------------------------------------------------

template <class Router, class IO>
static int route(const Routing<IO> &routing, int num_threads) {
  Router router(routing, num_threads);
  router.memory = scratch(router.bytes());
  if (!router.memory) return MOEIFY_NO_MEMORY;
  router.run();
  return MOEIFY_OK;
}

template <class IO>
static int route(const moeify_ffn &f, const moeify_router &r, const void *x, int64_t x_stride, int64_t num_tokens, uint8_t *mask,
                 int num_threads) {
  const Routing<IO> routing{f, r, (const IO *)x, x_stride, num_tokens, mask};
  return num_tokens < LANE_TOKENS ? route<DotRouter<IO>>(routing, num_threads) : route<LaneRouter<IO>>(routing, num_threads);
}
