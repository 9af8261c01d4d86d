// Router and selection rule; included once per instruction set, inside its namespace (see isa.h). The rules say what moeify.select says,
// ties, zeros and NaN included: a row with a NaN runs every expert (the k first for TOPK, NaN counting as the largest).
//
// Letters: T tokens, D input width, R router width, E experts.

static inline float largest(const float *score, int64_t experts, bool *has_nan) {
  float most = score[0];
  *has_nan = false;
  for (int64_t e = 0; e < experts; e++) {
    *has_nan |= score[e] != score[e];
    most = score[e] > most ? score[e] : most;
  }
  return most;
}

// Experts whose score is at least a level; no expert is below its own score, so one runs at least.
static inline void at_least(const float *score, int64_t experts, float level, uint8_t *mask) {
  for (int64_t e = 0; e < experts; e++) mask[e] = !(score[e] < level);
}

static inline void select_row(float *score, int64_t experts, int32_t rule, float knob, int32_t *order, uint8_t *mask) {
  bool has_nan;
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
  std::stable_sort(order, order + experts, [score](int32_t a, int32_t b) { return score[a] > score[b]; });
  float total = 0.0f, before = 0.0f;
  for (int64_t i = 0; i < experts; i++) total += score[order[i]];
  for (int64_t i = 0; i < experts; i++) {
    mask[order[i]] = i == 0 || before / total < knob;
    before += score[order[i]];
  }
}

// Rows of a matrix times a few tokens, the rows shared by the threads.
template <class X>
struct Scores {
  const X *const *x;
  int64_t num_tokens, width;
  const float *weight, *bias;
  int64_t num_rows;
  float *out;  // (T, num_rows)
  bool relu;

  static void task(void *self, int thread, int num_threads) { static_cast<Scores *>(self)->run(thread, num_threads); }

  void run(int thread, int num_threads) {
    const int64_t groups = (num_rows + ROWS - 1) / ROWS;
    const int64_t first = groups * thread / num_threads * ROWS, last = min64(groups * (thread + 1) / num_threads * ROWS, num_rows);
    const Tiles tiles(num_tokens, TOKENS);
    for (int64_t j = first; j < last; j += ROWS) {
      const int64_t n = min64(ROWS, last - j);
      for (int64_t tile = 0; tile < tiles.number; tile++) {
        const int64_t i = tiles.start(tile), m = tiles.start(tile + 1) - i;
        float *to = out + i * num_rows + j;
        dot_any<DotFp32, X, float>(x + i, m, weight + j * width, width, 0, width, to, num_rows, n);
        for (int64_t t = 0; t < m; t++)
          for (int64_t r = 0; r < n; r++) {
            const float value = to[t * num_rows + r] + bias[j + r];
            to[t * num_rows + r] = relu && value < 0.0f ? 0.0f : value;
          }
      }
    }
  }
};

template <class IO>
static int route(const moeify_ffn &f, const moeify_router &r, const void *x, int64_t x_stride, int64_t num_tokens, uint8_t *mask,
                 int num_threads) {
  const int64_t experts = f.num_experts, width = round_up(f.d_in, 16);
  for (int64_t start = 0; start < num_tokens; start += FEW_TOKENS) {
    const int64_t n = min64(FEW_TOKENS, num_tokens - start);
    const int64_t row_floats = Rows<float, IO>::CONVERTS ? n * width : 0, hidden_floats = round_up(n * r.width, 16);
    const int64_t score_floats = round_up(n * experts + W, 16);
    float *memory = (float *)scratch(4 * (row_floats + hidden_floats + score_floats + experts));
    if (!memory) return MOEIFY_NO_MEMORY;
    float *hidden = memory + row_floats, *scores = hidden + hidden_floats;
    int32_t *order = (int32_t *)(scores + score_floats);
    const float *rows[FEW_TOKENS], *hidden_rows[FEW_TOKENS];
    for (int64_t t = 0; t < n; t++) {
      rows[t] = Rows<float, IO>::get((const IO *)x + (start + t) * x_stride, memory + t * width, f.d_in);
      hidden_rows[t] = hidden + t * r.width;
    }
    Scores<float> first{rows, n, f.d_in, r.hidden, r.hidden_bias, r.width, hidden, true};
    parallel(num_threads, &Scores<float>::task, &first);
    Scores<float> second{hidden_rows, n, r.width, r.out, r.out_bias, experts, scores, false};
    parallel(num_threads, &Scores<float>::task, &second);
    for (int64_t k = 0; k < n * experts; k += W) {
      const vf z = load(scores + k);
      vf half = z * 0.5f;
      half = half < -20.0f ? splat(-20.0f) : half;
      half = half > 20.0f ? splat(20.0f) : half;
      const vf score = r.is_abs ? (z < 0.0f ? -z : z) : exp_of(half);
      store(scores + k, z != z ? z : score);
    }
    for (int64_t t = 0; t < n; t++) {
      uint8_t *row = mask + (start + t) * experts;
      select_row(scores + t * experts, experts, r.rule, r.knob, order, row);
      if (r.always_on)
        for (int64_t e = 0; e < experts; e++) row[e] |= r.always_on[e];
    }
  }
  return MOEIFY_OK;
}
