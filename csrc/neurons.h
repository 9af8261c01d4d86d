// Single neurons of a network, for few tokens; included once per instruction set, inside its namespace, after router.h (see isa.h).
//
// Letters: T tokens, D input width, O output width, F neurons, R rank of a prediction.
//
// In turn: what each neuron is worth to each token, read off the gate or off the neuron itself, or predicted; the rule, on one thread, which
// sees whole rows; and of the neurons that some token keeps what has not been read: rows of up, of a prediction also of gate, and of down.
// Threads share the neurons, of the last step the kept ones, and each has a y of its own that is added up at the end. Every row is read once,
// whatever the number of tokens.

constexpr int64_t NEURON_TOKENS = 16;  // at once
constexpr int64_t BLOCK_GROUPS = 8;    // of neurons, whose rows of down are summed apart: thousands of additions in turn are too many

static inline vf root_of(vf v) {
#if MOEIFY_W == 16 && defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)v);
#elif MOEIFY_W == 8 && defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < W; i++) v[i] = sqrtf(v[i]);
  return v;
#endif
}

// The key of a score, which is at least 0, or NaN.
static inline vi key_of_score(vf score) { return score != score ? vi{} + KEY_NAN : (vi)score & INT32_MAX; }

// E[act(z)^2], z ~ N(mean, std^2), by Gauss and Hermite's three nodes.
static inline vf expected_square(vf mean, vf std, int32_t activation) {
  const vf step = std * 1.7320508f, low = activate(mean - step, activation), high = activate(mean + step, activation);
  const vf middle = activate(mean, activation);
  return (low * low + high * high) * (1.0f / 6) + middle * middle * (2.0f / 3);
}

// e^ of the mean log of positive numbers, none below `floor`; what stands behind the last does not count.
static inline float geometric_mean(const float *value, int64_t number, float floor) {
  constexpr int64_t RUN = 64;  // mantissas, each below 2, whose product is a number
  vf product = splat(1.0f);
  vi exponent = {};
  const auto split = [&](vf v) {
    const vi bits = (vi)v;
    exponent += (bits >> 23) - 127;
    return (vf)((bits & 0x7FFFFF) | 0x3F800000);
  };
  for (int64_t k = 0, n = 0; k < number; k += W) {
    vf v = k + W <= number ? load(value + k) : load_first(value + k, number - k);
    v = v < floor ? splat(floor) : v;
    for (int64_t i = number - k; i < W; i++) v[i] = 1.0f;
    product *= split(v);
    if (++n % RUN == 0) product = split(product);
  }
  double sum = 0.0;
  for (int i = 0; i < W; i++) sum += (double)exponent[i] + log2((double)product[i]);
  return (float)exp2(sum / (double)number);
}

template <class Net, class IO, class X, class Wt>
struct NeuronJob {
  // What all threads read, and write their shares of.
  struct Shared {
    X *converted;    // x, where it is not read as it is
    float *widened;  // x in fp32, where it is predicted from and not read as it is
    float *image;    // T x R: project x
    float *value;    // T x stride: act(gate) of each neuron, or h, or what it is predicted to be worth
    int32_t *key;    // of one token
    int32_t *kept;   // neurons that some token keeps
    Shared(Arena &arena, const NeuronJob &job)
        : converted(arena.take<X>(job.num_tokens * Rows<X, IO>::elements(job.net.f.d_in))),
          widened(arena.take<float>(job.n.project ? job.num_tokens * Rows<float, IO>::elements(job.net.f.d_in) : 0)),
          image(arena.take<float>(job.n.project ? job.num_tokens * job.n.rank : 0)), value(arena.take<float>(job.num_tokens * job.stride)),
          key(arena.take<int32_t>(job.stride)), kept(arena.take<int32_t>(job.net.f.num_neurons)) {}
  };
  // What each thread has of its own.
  struct Own {
    float *sums, *part, *h[2], *gate;
    Own(Arena &arena, const NeuronJob &job)
        : sums(arena.take<float>(job.num_tokens * job.net.out_width)), part(arena.take<float>(job.num_tokens * job.net.out_width)),
          h{arena.take<float>(job.num_tokens * CHUNK_NEURONS + W), arena.take<float>(job.num_tokens * CHUNK_NEURONS + W)},
          gate(arena.take<float>(job.num_tokens * CHUNK_NEURONS + W)) {}
  };

  const Net &net;
  const moeify_neurons &n;
  const IO *x;
  int64_t x_stride, num_tokens;
  uint8_t *mask;
  IO *y;
  int64_t y_stride;
  int num_threads;
  int64_t stride = key_stride(net.f.num_neurons);
  char *memory = nullptr;
  int64_t per_thread = 0, num_kept = 0;
  const X *rows[NEURON_TOKENS] = {};       // x of each token
  const float *exact[NEURON_TOKENS] = {};  // likewise, for a prediction

  Own own(int thread) const {
    Arena arena(memory + thread * per_thread);
    return Own(arena, *this);
  }
  Shared shared() const {
    Arena arena(memory + num_threads * per_thread);
    return Shared(arena, *this);
  }
  bool is_predicted() const { return n.project != nullptr; }
  bool is_hidden() const { return !n.project && !n.scale; }             // worth is read off h
  bool computes_gate() const { return is_predicted() && net.f.gate; }  // in the last step

  static void first_task(void *self, int thread, int threads) { static_cast<const NeuronJob *>(self)->first_share(thread, threads); }
  static void image_task(void *self, int thread, int threads) { static_cast<const NeuronJob *>(self)->image_share(thread, threads); }
  static void predict_task(void *self, int thread, int threads) { static_cast<const NeuronJob *>(self)->predict_share(thread, threads); }
  static void kept_task(void *self, int thread, int threads) { static_cast<const NeuronJob *>(self)->kept_share(thread, threads); }

  int run() {
    per_thread = bytes_of<Own>(*this);
    memory = scratch(per_thread * num_threads + bytes_of<Shared>(*this));
    if (!memory) return MOEIFY_NO_MEMORY;
    const Shared shared = this->shared();
    const int64_t elements = Rows<X, IO>::elements(net.f.d_in);
    for (int64_t t = 0; t < num_tokens; t++) rows[t] = Rows<X, IO>::get(x + t * x_stride, shared.converted + t * elements, net.f.d_in);
    if (is_predicted()) {
      const int64_t floats = Rows<float, IO>::elements(net.f.d_in);
      for (int64_t t = 0; t < num_tokens; t++) exact[t] = Rows<float, IO>::get(x + t * x_stride, shared.widened + t * floats, net.f.d_in);
      parallel(num_threads, image_task, this);
      parallel(num_threads, predict_task, this);
    } else {
      parallel(num_threads, first_task, this);
    }
    select(shared);
    add_up<Net>(*this, parallel(num_threads, kept_task, this));
    return MOEIFY_OK;
  }

  // -- what neurons are worth --

  // Chunks of neurons: no two threads write to one vector.
  static int64_t share(int64_t number, int thread, int threads) {
    return min64((number + CHUNK_NEURONS - 1) / CHUNK_NEURONS * thread / threads * CHUNK_NEURONS, number);
  }

  // act(gate), or h, of all neurons.
  void first_share(int thread, int threads) const {
    moeify_ffn f = net.f;
    if (!is_hidden()) f.up = f.gate, f.up_stride = f.gate_stride, f.up_bias = f.gate_bias, f.up_scale = f.gate_scale, f.gate = nullptr;
    const Net first(f);
    const Own own = this->own(thread);
    const Shared shared = this->shared();
    const int64_t last = share(net.f.num_neurons, thread + 1, threads);
    Ahead ahead;
    ahead.clear(0);
    for (int64_t j = share(net.f.num_neurons, thread, threads); j < last; j += CHUNK_NEURONS) {
      const Piece piece{nullptr, num_tokens, j, min64(CHUNK_NEURONS, last - j)};
      const Piece following{nullptr, num_tokens, j + CHUNK_NEURONS, max64(0, min64(CHUNK_NEURONS, last - j - CHUNK_NEURONS))};
      first.ask_first(following, ahead);
      ahead.spread(first.first_steps(piece));
      first.hidden(rows, piece, own.h[0], own.gate, ahead);
      ahead.rest();
      for (int64_t t = 0; t < num_tokens; t++)
        memcpy(shared.value + t * stride + j, own.h[0] + t * piece.neurons, 4 * piece.neurons);
    }
  }

  void image_share(int thread, int threads) const {
    const Layer layer(n.project, nullptr, net.f.d_in, n.rank, IDENTITY);
    layer.run(exact, num_tokens, share(n.rank, thread, threads), share(n.rank, thread + 1, threads), shared().image, n.rank,
              own(thread).gate);
  }

  void predict_share(int thread, int threads) const {
    const Own own = this->own(thread);
    const Shared shared = this->shared();
    const int64_t neurons = net.f.num_neurons, last = share(neurons, thread + 1, threads);
    const Layer up(n.up, n.up_bias, n.rank, neurons, IDENTITY), gate(n.gate, n.gate_bias, n.rank, neurons, IDENTITY);
    const float *image[NEURON_TOKENS];
    Ahead ahead;
    for (int64_t t = 0; t < num_tokens; t++) image[t] = shared.image + t * n.rank;
    for (int64_t j = share(neurons, thread, threads); j < last; j += CHUNK_NEURONS) {
      const Piece piece{nullptr, num_tokens, j, min64(CHUNK_NEURONS, last - j)};
      const Piece following{nullptr, num_tokens, j + CHUNK_NEURONS, max64(0, min64(CHUNK_NEURONS, last - j - CHUNK_NEURONS))};
      up.net.ask_first(following, ahead);
      ahead.spread(up.net.first_steps(piece));
      up.net.hidden(image, piece, own.h[0], nullptr, ahead);
      ahead.rest();
      if (net.f.gate) {
        gate.net.ask_first(following, ahead);
        ahead.spread(gate.net.first_steps(piece));
        gate.net.hidden(image, piece, own.h[1], nullptr, ahead);
        ahead.rest();
      }
      for (int64_t t = 0; t < num_tokens; t++)
        for (int64_t i = 0; i < piece.neurons; i += W) {
          const int64_t left = piece.neurons - i;
          const auto part = [&](const float *p) { return left >= W ? load(p + j + i) : load_first(p + j + i, left); };
          const vf u = load(own.h[0] + t * piece.neurons + i), up_std = part(n.up_std);
          const vf energy = net.f.gate ? expected_square(load(own.h[1] + t * piece.neurons + i), part(n.gate_std), net.f.activation) *
                                             (u * u + up_std * up_std)
                                       : expected_square(u, up_std, net.f.activation);
          store(shared.value + t * stride + j + i, root_of(energy) * part(n.scale));
        }
    }
  }

  // -- which of them run --

  void select(const Shared &shared) {
    const int64_t neurons = net.f.num_neurons;
    for (int64_t t = 0; t < num_tokens; t++) {
      uint8_t *row = mask + t * neurons;
      to_keys(shared.value + t * stride, shared.key);
      select_row(shared.key, neurons, n.rule, n.knob, row);
      if (n.always_on)
        for (int64_t j = 0; j < neurons; j++) row[j] |= n.always_on[j];
    }
    num_kept = 0;
    for (int64_t j = 0; j < neurons; j++) {  // without a branch: half of them would be guessed wrong
      uint8_t any = 0;
      for (int64_t t = 0; t < num_tokens; t++) any |= mask[t * neurons + j];
      shared.kept[num_kept] = (int32_t)j;
      num_kept += any != 0;
    }
  }

  // One token's scores; a row with a NaN is not looked at further.
  void to_keys(float *value, int32_t *key) const {
    const int64_t neurons = net.f.num_neurons;
    const auto keys = [&](const auto &score) {
      for (int64_t j = 0; j < neurons; j += W) store(key + j, key_of_score(score(j)));
      for (int64_t j = neurons; j < stride; j++) key[j] = NO_KEY;
    };
    const auto scale = [&](int64_t j) { return j + W <= neurons ? load(n.scale + j) : load_first(n.scale + j, neurons - j); };
    if (n.scale && !is_predicted()) return keys([&](int64_t j) { return load(value + j) * scale(j); });
    keys([&](int64_t j) { return load(value + j); });
    if (is_hidden()) return;
    const int32_t most = largest(key, neurons);
    if (most >= KEY_INFINITY) {  // over an infinite mean: NaN for what is infinite, 0 for the others
      for (int64_t j = 0; j < neurons; j++) key[j] = most == KEY_NAN || key[j] == KEY_INFINITY ? KEY_NAN : 0;
      return;
    }
    const vf mean = splat(geometric_mean(value, neurons, std::max(1e-3f * score_of(most), FLT_MIN)));
    keys([&](int64_t j) { return load(value + j) / mean; });
  }

  // -- the network of those --

  struct Group {  // neurons that are computed together
    const int32_t *neuron;
    int64_t number;
  };

  Listed<Wt> list(const Group &group, const void *matrix, int64_t row_stride, const Wt **row) const {
    for (int64_t j = 0; j < group.number; j++) row[j] = static_cast<const Wt *>(matrix) + group.neuron[j] * row_stride;
    return {row};
  }

  void ask_first(const Group &group, Ahead &ahead) const {
    ahead.clear(net.f.d_in * (int64_t)sizeof(Wt));
    if (is_hidden()) return;
    for (int64_t j = 0; j < group.number; j++) {
      ahead.add((const Wt *)net.f.up + group.neuron[j] * net.f.up_stride);
      if (computes_gate()) ahead.add((const Wt *)net.f.gate + group.neuron[j] * net.f.gate_stride);
    }
  }
  void ask_second(const Group &group, Ahead &ahead) const {
    ahead.clear(net.f.d_out * (int64_t)sizeof(Wt));
    for (int64_t j = 0; j < group.number; j++) ahead.add((const Wt *)net.f.down + group.neuron[j] * net.f.down_stride);
  }
  int64_t first_steps(const Group &group) const {
    return net.first_steps({nullptr, num_tokens, 0, group.number}) / (net.f.gate && !computes_gate() ? 2 : 1);
  }
  int64_t second_steps(const Group &group) const { return num_tokens * net.second_steps({nullptr, 1, 0, group.number}); }

  // Three groups are under way, as in FewTokens.
  void kept_share(int thread, int threads) const {
    const Own own = this->own(thread);
    const int32_t *kept = shared().kept;
    const int64_t floats = num_tokens * net.out_width;
    memset(own.sums, 0, 4 * floats), memset(own.part, 0, 4 * floats);
    const auto flush = [&] {
      for (int64_t c = 0; c < floats; c += W) store(own.sums + c, load(own.sums + c) + load(own.part + c)), store(own.part + c, vf{});
    };
    int64_t in_part = 0;
    int64_t at = num_kept * thread / threads;
    const int64_t last = num_kept * (thread + 1) / threads;
    const auto next = [&] {
      const Group group{kept + at, min64(CHUNK_NEURONS, last - at)};
      at += group.number;
      return group;
    };
    Group group = next(), done = {nullptr, 0};
    float *h = own.h[0], *h_done = own.h[1];
    Ahead ahead;
    ask_first(group, ahead), ahead.rest();
    while (group.number || done.number) {
      if (group.number) {
        ahead.spread(first_steps(group));
        first_product(group, h, own.gate, ahead);
      }
      ahead.rest();
      const Group following = next();
      ask_first(following, ahead);
      if (done.number) {
        ahead.spread(second_steps(done));
        second_product(done, h_done, own.part, ahead);
        if (++in_part % BLOCK_GROUPS == 0) flush();
      }
      ahead.rest();
      ask_second(group, ahead);
      std::swap(h, h_done);
      done = group, group = following;
    }
    flush();
  }

  void products(const Group &group, const void *matrix, int64_t row_stride, const float *scale, const void *bias, float *out,
                Ahead &ahead) const {
    const Wt *row[CHUNK_NEURONS];
    const Listed<Wt> listed = list(group, matrix, row_stride, row);
    const int64_t step = net.dot_width();
    const Tiles tiles(num_tokens, TOKENS);
    for (int64_t j = 0; j < group.number; j += ROWS)
      for (int64_t k = 0; k < net.f.d_in; k += step)
        for (int64_t tile = 0; tile < tiles.number; tile++) {
          const int64_t i = tiles.start(tile);
          dot_any<typename Net::Dot, X>(rows + i, tiles.start(tile + 1) - i, Listed<Wt>{listed.row + j}, k, min64(k + step, net.f.d_in),
                                        out + i * group.number + j, group.number, min64(ROWS, group.number - j), ahead);
        }
    if (!scale && !bias) return;
    for (int64_t t = 0; t < num_tokens; t++)
      for (int64_t j = 0; j < group.number; j++) {
        float &value = out[t * group.number + j];
        if (scale) value *= scale[group.neuron[j]] * unit_of(rows[t]);
        if (bias) value += to_float(static_cast<const IO *>(bias)[group.neuron[j]]);
      }
  }

  // h[t * number + j], in fp32; zero where the token does not keep the neuron, whatever its weights are.
  void first_product(const Group &group, float *h, float *gate, Ahead &ahead) const {
    const moeify_ffn &f = net.f;
    const int64_t number = group.number, size = num_tokens * number;
    if (!is_hidden()) products(group, f.up, f.up_stride, f.up_scale, f.up_bias, h, ahead);
    if (computes_gate()) products(group, f.gate, f.gate_stride, f.gate_scale, f.gate_bias, gate, ahead);
    if (is_predicted() && !f.gate)
      for (int64_t k = 0; k < size; k += W) store(h + k, activate(load(h + k), f.activation));
    if (computes_gate())
      for (int64_t k = 0; k < size; k += W) store(h + k, activate(load(gate + k), f.activation) * load(h + k));
    const float *value = shared().value;
    for (int64_t t = 0; t < num_tokens; t++)
      for (int64_t j = 0; j < number; j++) {
        const int64_t neuron = group.neuron[j];
        float &here = h[t * number + j];
        if (is_hidden())
          here = value[t * stride + neuron];
        else if (!is_predicted())
          here *= value[t * stride + neuron];
        here = mask[t * f.num_neurons + neuron] ? here : 0.0f;
      }
  }

  void second_product(const Group &group, const float *h, float *sums, Ahead &ahead) const {
    const Wt *row[CHUNK_NEURONS];
    const Listed<Wt> down = list(group, net.f.down, net.f.down_stride, row);
    for (int64_t t = 0; t < num_tokens; t++) net.add_nonzero(sums + t * net.out_width, h + t * group.number, down, group.number, ahead);
  }
};

// -- entry -------------------------------------------------------------------------------------------------------------------------------

struct NeuronCall {
  const moeify_ffn &f;
  const moeify_neurons &n;
  const void *x;
  int64_t x_stride, num_tokens;
  uint8_t *mask;
  void *y;
  int64_t y_stride;
  int num_threads;

  template <class Dot, class Add, class IO, class X, class Wt>
  int run() const {
    typedef Network<Dot, Add, IO, X, Wt> Net;
    const Net net(f);
    return NeuronJob<Net, IO, X, Wt>{net, n, (const IO *)x, x_stride, num_tokens, mask, (IO *)y, y_stride, num_threads}.run();
  }
};

int run_neurons(const moeify_ffn &f, const moeify_neurons &n, const void *x, int64_t x_stride, int64_t num_tokens, uint8_t *mask, void *y,
                int64_t y_stride, int num_threads) {
  const int64_t bytes = f.dtype == MOEIFY_FP32 ? 4 : 2;
  for (int64_t t = 0; t < num_tokens; t += NEURON_TOKENS) {  // so many tokens at once that what they share stays in the caches
    const int64_t number = min64(NEURON_TOKENS, num_tokens - t);
    const void *from = (const char *)x + t * x_stride * bytes;
    const NeuronCall call{f, n, from, x_stride, number, mask + t * f.num_neurons, (char *)y + t * y_stride * bytes, y_stride, num_threads};
    if (const int status = by_type(f, from, x_stride, number, call)) return status;
  }
  return MOEIFY_OK;
}
