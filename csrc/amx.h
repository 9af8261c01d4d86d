// bf16 prefill on AMX tiles; included once, after ffn.h, inside the namespace of isa_amx_bf16.cpp. Letters as in ffn.h.
//
// A tile is 16 rows of 64 bytes: as A 16 tokens x 32 k, as B 16 pairs of k x 16 columns x 2, as C 16 tokens x 16 columns of fp32.
// Threads share blocks of tokens, as in ffn.h. Of a block, for a chunk of the neurons that any of its tokens takes:
//   first    experts one by one: their up and gate rows are packed as columns of B, once a block; the x of their tokens is gathered into A.
//            h goes, rounded to bf16 as dense bf16 layers round it, to its token's row of H (tokens x chunk), which is zero elsewhere.
//   second   Y += H down, a dense product with zeros for what a token does not take; tiles of H that are all zero are left out.
//
// Why dense: C can only be stored as 16 rows of equal distance. Adding it to the tokens of one expert costs a store, a load and a vector
// addition for each 16 columns of a token, 4 cycles where the tile's arithmetic for an expert of 8 to 32 neurons takes 1; zeros cost 1 / f.
// Experts of 128 neurons and more would be better off the other way at f = 0.5, those of 64 at 0.25.
//
// Cycles per token and expert of 8 gated neurons, D = 1024, active fraction f, where a tile product takes 16 cycles (1 a token), tiles are
// loaded from the first cache in 8, and lines of 64 bytes come from the second one every 1.5 to 2 cycles:
//   first    f * (48 for gathering 32 lines, the products' 32 hidden behind them, + 20 for activation and placing of h)
//   packing  40 cycles a tile: 1280 / tokens of the block = 2.5 of 512
//   second   16 + 2 for Y, which comes from the second or third cache once a chunk
//   memory   24 for the weights at 10 GB/s a core, behind the rest as long as they are asked for ahead, a few lines at a time
// At f = 0.5, 0.25, 0.1: 55, 38, 27. Dense: 48 at the peak, about 75 at the 65 % of it that large products reach, with its activation 80:
// 1.45, 2.1, 3 times as fast, if the estimates hold; none was measured.

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
#if defined(MOEIFY_AMX_EMULATED)
#include "amx_emulated.h"
#else
#include "amx_tiles.h"
#endif

constexpr int64_t TILE_ROWS = 16, TILE_K = 32, TILE_COLUMNS = 16;
constexpr int64_t TILE_ELEMENTS = TILE_ROWS * TILE_K;  // bf16
constexpr int64_t ACCUMULATORS = 4;    // C tiles; A and B take the other four
constexpr int64_t MOST_COLUMNS = 2 * TILE_COLUMNS;  // of a piece: two C tiles side by side
constexpr int64_t PANEL_TILES = 16;    // of gathered x: they stay in the first cache beside what they are multiplied by
constexpr int64_t CHUNK = 512;         // neurons of H at most: half a MB for the largest block, and panels of down of 32 KB
constexpr int64_t CHUNK_STRIDE = CHUNK + TILE_K;  // elements from row to row of H: a power of two would share the sets of the first cache
constexpr int64_t CHUNK_TILES = CHUNK / TILE_K;

static TileConfig whole_tiles() {
  TileConfig config;
  for (int t = 0; t < 8; t++) config.row_bytes[t] = 64, config.rows[t] = TILE_ROWS;
  return config;
}

// -- M x N tiles of C: tile (i, j) is register i * N + j, from c + i * 16 * stride + j * 16 on ---------------------

template <int M, int N>
static inline void load_sums(const float *c, int64_t stride) {
  const int64_t bytes = stride * 4;
  tile_load<0>(c, bytes);
  if constexpr (N > 1) tile_load<1>(c + 16, bytes);
  if constexpr (M > 1) tile_load<N>(c + 16 * stride, bytes);
  if constexpr (M > 1 && N > 1) tile_load<N + 1>(c + 16 * stride + 16, bytes);
  if constexpr (M > 2) tile_load<2>(c + 32 * stride, bytes);
  if constexpr (M > 3) tile_load<3>(c + 48 * stride, bytes);
}

template <int M, int N>
static inline void store_sums(float *c, int64_t stride) {
  const int64_t bytes = stride * 4;
  tile_store<0>(c, bytes);
  if constexpr (N > 1) tile_store<1>(c + 16, bytes);
  if constexpr (M > 1) tile_store<N>(c + 16 * stride, bytes);
  if constexpr (M > 1 && N > 1) tile_store<N + 1>(c + 16 * stride + 16, bytes);
  if constexpr (M > 2) tile_store<2>(c + 32 * stride, bytes);
  if constexpr (M > 3) tile_store<3>(c + 48 * stride, bytes);
}

// C += A B over 32 elements of k; the N tiles of B lie one after the other.
template <int M, int N>
static inline void multiply(const bf16 *a, int64_t stride, const bf16 *b) {
  static_assert(M * N <= ACCUMULATORS && N <= 2, "more than there are registers");
  const int64_t bytes = stride * 2;
  tile_load<4>(b, 64);
  if constexpr (N > 1) tile_load<5>(b + TILE_ELEMENTS, 64);
  tile_load<6>(a, bytes);
  tile_dot<0, 6, 4>();
  if constexpr (N > 1) tile_dot<1, 6, 5>();
  if constexpr (M > 1) tile_load<7>(a + 16 * stride, bytes), tile_dot<N, 7, 4>();
  if constexpr (M > 1 && N > 1) tile_dot<N + 1, 7, 5>();
  if constexpr (M > 2) tile_load<6>(a + 32 * stride, bytes), tile_dot<2, 6, 4>();
  if constexpr (M > 3) tile_load<7>(a + 48 * stride, bytes), tile_dot<3, 7, 4>();
}

// -- packing ---------------------------------------------------------------------------------------------------------------------------

static inline uint32_t first_bits(int64_t n) { return (uint32_t)(((uint64_t)1 << n) - 1); }

// Elements k to k + width of 16 rows (null: zeros) become the columns of a tile of B, zero beyond: pairs are transposed, four rows at once
// in each quarter of a register, which takes half the shuffles of a transposition of whole registers.
static void pack_columns(const bf16 *const *row, int64_t k, int64_t width, bf16 *to) {
  bf16 padded[TILE_ROWS][TILE_K];
  const bf16 *from[TILE_ROWS];
  for (int i = 0; i < TILE_ROWS; i++) {
    if (row[i] && width == TILE_K) {
      from[i] = row[i] + k;
    } else {
      _mm512_storeu_si512(padded[i], row[i] ? _mm512_maskz_loadu_epi16(first_bits(width), row[i] + k) : _mm512_setzero_si512());
      from[i] = padded[i];
    }
  }
  for (int quarter = 0; quarter < 4; quarter++) {
    __m512i z[4];  // quarter of rows i, 4 + i, 8 + i, 12 + i
    for (int i = 0; i < 4; i++) {
      __m512i v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(from[i] + 8 * quarter)));
      v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(from[4 + i] + 8 * quarter)), 1);
      v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(from[8 + i] + 8 * quarter)), 2);
      z[i] = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(from[12 + i] + 8 * quarter)), 3);
    }
    const __m512i low01 = _mm512_unpacklo_epi32(z[0], z[1]), low23 = _mm512_unpacklo_epi32(z[2], z[3]);
    const __m512i high01 = _mm512_unpackhi_epi32(z[0], z[1]), high23 = _mm512_unpackhi_epi32(z[2], z[3]);
    bf16 *pairs = to + 4 * quarter * TILE_K;
    _mm512_storeu_si512(pairs, _mm512_unpacklo_epi64(low01, low23));
    _mm512_storeu_si512(pairs + TILE_K, _mm512_unpackhi_epi64(low01, low23));
    _mm512_storeu_si512(pairs + 2 * TILE_K, _mm512_unpacklo_epi64(high01, high23));
    _mm512_storeu_si512(pairs + 3 * TILE_K, _mm512_unpackhi_epi64(high01, high23));
  }
}

// Columns c to c + width of n rows become pairs of tiles of B, zero beyond; two rows interleave to columns in the order of AddBf16.
// Returns whether all are finite.
static bool pack_rows(const bf16 *const *row, int64_t n, int64_t c, int64_t width, bf16 *to) {
  const __mmask32 columns = first_bits(width);
  const __m512i magnitude = _mm512_set1_epi16(0x7FFF);
  __m512i largest = _mm512_setzero_si512();
  for (int64_t j = 0; j < round_up(n, TILE_K); j += 2) {
    const __m512i a = j < n ? _mm512_maskz_loadu_epi16(columns, row[j] + c) : _mm512_setzero_si512();
    const __m512i b = j + 1 < n ? _mm512_maskz_loadu_epi16(columns, row[j + 1] + c) : _mm512_setzero_si512();
    largest = _mm512_max_epu16(largest, _mm512_max_epu16(_mm512_and_si512(a, magnitude), _mm512_and_si512(b, magnitude)));
    bf16 *pair = to + j / TILE_K * 2 * TILE_ELEMENTS + j % TILE_K / 2 * TILE_K;
    _mm512_storeu_si512(pair, _mm512_unpacklo_epi16(a, b));
    _mm512_storeu_si512(pair + TILE_ELEMENTS, _mm512_unpackhi_epi16(a, b));
  }
  return !_mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16(0x7F80));
}

// -- blocks of tokens ------------------------------------------------------------------------------------------------------------------

struct TiledTokens {
  typedef Network<DotBf16, AddBf16, bf16, bf16, bf16> Net;

  // What each thread has of its own, for one block.
  struct Own {
    Lists lists;
    float *sums;      // y: of COLUMNS columns all tokens, then of the next ones
    bf16 *hidden;     // H
    uint8_t *used;    // by tile of H: whether any of its tokens takes any of its neurons
    bf16 *weights;    // tiles of B
    bf16 *panel;      // tiles of A: x
    float *c, *h, *gate;
    bf16 *rounded;
    Own(Arena &arena, const Net &net, int64_t tokens)
        : lists(arena, tokens, net.f.num_experts),
          sums(arena.take<float>(round_up(tokens, TILE_ROWS) * net.out_width)),
          hidden(arena.take<bf16>(round_up(tokens, TILE_ROWS) * CHUNK_STRIDE)),
          used(arena.take<uint8_t>(round_up(tokens, TILE_ROWS) / TILE_ROWS * CHUNK_TILES)),
          weights(arena.take<bf16>(2 * TILE_ELEMENTS * max64(CHUNK_TILES, round_up(net.f.d_in, TILE_K) / TILE_K))),
          panel(arena.take<bf16>(PANEL_TILES * TILE_ELEMENTS)),
          c(arena.take<float>(ACCUMULATORS * TILE_ROWS * TILE_COLUMNS + W)),
          h(arena.take<float>(ACCUMULATORS * TILE_ROWS * TILE_COLUMNS + W)),
          gate(arena.take<float>(ACCUMULATORS * TILE_ROWS * TILE_COLUMNS + W)),
          rounded(arena.take<bf16>(ACCUMULATORS * TILE_ROWS * TILE_COLUMNS + 2 * W)) {}
  };

  const Net &net;
  const bf16 *x;
  int64_t x_stride;
  const uint8_t *mask;
  int64_t num_tokens, block_tokens;
  bf16 *y;
  int64_t y_stride;
  char *memory;
  int64_t per_thread;
  std::atomic<int64_t> next;  // first token that nobody has
  std::atomic<bool> is_finite;

  static void task(void *self, int thread, int) { static_cast<TiledTokens *>(self)->run(thread); }

  void run(int thread) {
    Arena arena(memory + thread * per_thread);
    Own own(arena, net, block_tokens);
    tile_config(whole_tiles());  // others who use tiles set them up before they do, too
    for (int64_t first; (first = next.fetch_add(block_tokens, std::memory_order_relaxed)) < num_tokens;)
      if (!block(own, first, min64(block_tokens, num_tokens - first))) is_finite.store(false, std::memory_order_relaxed);
    tile_release();
  }

  // False where a weight of down is not finite: zero times it is not zero.
  bool block(Own &own, int64_t first, int64_t n) {
    const int64_t experts = net.f.num_experts, rows = round_up(n, TILE_ROWS);
    own.lists.build(mask + first * experts, n, experts);
    memset(own.sums, 0, 4 * rows * net.out_width);
    const bf16 *down[CHUNK];
    int64_t at = 0;  // neurons of the chunk
    Pieces<Net> pieces{net, own.lists, n, experts, 0};
    pieces.most = MOST_COLUMNS / (net.f.gate ? 2 : 1);
    Piece piece = {}, following = {};
    for (bool more = pieces.next(&piece); more; piece = following) {
      more = pieces.next(&following);
      net.prefetch_second(piece, 0, COLUMNS);
      if (at == 0) {
        memset((void *)own.hidden, 0, 2 * rows * CHUNK_STRIDE);
        memset(own.used, 0, rows / TILE_ROWS * CHUNK_TILES);
      }
      hidden(own, x + first * x_stride, piece, at, more ? &following : nullptr);
      for (int64_t j = 0; j < piece.neurons; j++)
        down[at + j] = static_cast<const bf16 *>(net.f.down) + (piece.start + j) * net.f.down_stride;
      at += piece.neurons;
      if (more && at + following.neurons <= CHUNK) continue;
      if (!second(own, down, at, rows)) return false;
      at = 0;
    }
    for (int64_t t = 0; t < n; t++)
      for (int64_t c = 0; c < net.f.d_out; c += COLUMNS)
        write_block<AddBf16, bf16>(net.f, y + (first + t) * y_stride, own.sums + c * rows + t * COLUMNS, c);
    return true;
  }

  // h of a piece, to columns at and following of H.
  void hidden(const Own &own, const bf16 *x_block, const Piece &piece, int64_t at, const Piece *following) const {
    const moeify_ffn &f = net.f;
    const bf16 *row[MOST_COLUMNS] = {};
    float bias[MOST_COLUMNS] = {};
    for (int64_t j = 0; j < piece.neurons; j++) {
      const int64_t neuron = piece.start + j, gate = piece.neurons + j;
      row[j] = static_cast<const bf16 *>(f.up) + neuron * f.up_stride;
      if (f.up_bias) bias[j] = to_float(static_cast<const bf16 *>(f.up_bias)[neuron]);
      if (!f.gate) continue;
      row[gate] = static_cast<const bf16 *>(f.gate) + neuron * f.gate_stride;
      if (f.gate_bias) bias[gate] = to_float(static_cast<const bf16 *>(f.gate_bias)[neuron]);
    }
    const int64_t wide = piece.neurons * (f.gate ? 2 : 1) > TILE_COLUMNS ? 2 : 1;  // tiles side by side
    for (int64_t k = 0, tile = 0; k < f.d_in; k += TILE_K)
      for (int64_t j = 0; j < wide; j++, tile++)
        pack_columns(row + j * TILE_COLUMNS, k, min64(TILE_K, f.d_in - k), own.weights + tile * TILE_ELEMENTS);

    const int64_t most = ACCUMULATORS / wide * TILE_ROWS;
    Ahead ahead;
    if (following) net.ask_first(*following, ahead), ahead.spread((piece.num_tokens + most - 1) / most * ((f.d_in + TILE_K - 1) / TILE_K));
    for (int64_t i = 0; i < piece.num_tokens; i += most) {
      const uint16_t *token = piece.token + i;
      const int64_t n = min64(most, piece.num_tokens - i), tiles = (n + TILE_ROWS - 1) / TILE_ROWS;
      if (wide == 2)
        tiles == 1 ? project<1, 2>(own, x_block, token, n, bias, ahead) : project<2, 2>(own, x_block, token, n, bias, ahead);
      else if (tiles <= 2)
        tiles == 1 ? project<1, 1>(own, x_block, token, n, bias, ahead) : project<2, 1>(own, x_block, token, n, bias, ahead);
      else
        tiles == 3 ? project<3, 1>(own, x_block, token, n, bias, ahead) : project<4, 1>(own, x_block, token, n, bias, ahead);
      place(own, token, n, piece.neurons, wide * TILE_COLUMNS, at);
    }
  }

  // C of n tokens = bias + x . columns in own.weights.
  template <int M, int N>
  void project(const Own &own, const bf16 *x_block, const uint16_t *token, int64_t n, const float *bias, Ahead &ahead) const {
    const int64_t tiles = (net.f.d_in + TILE_K - 1) / TILE_K, step = PANEL_TILES / M;
    load_sums<M, N>(bias, 0);  // every row the same
    for (int64_t first = 0; first < tiles; first += step) {
      const int64_t number = min64(step, tiles - first);
      gather<M>(own, x_block, token, n, first, number);
      for (int64_t k = 0; k < number; k++) {
        multiply<M, N>(own.panel + k * M * TILE_ELEMENTS, TILE_K, own.weights + (first + k) * N * TILE_ELEMENTS);
        ahead.step();
      }
    }
    store_sums<M, N>(own.c, N * TILE_COLUMNS);
  }

  // Rows of A beyond the tokens keep what they had: no other row of C depends on them.
  template <int M>
  void gather(const Own &own, const bf16 *x_block, const uint16_t *token, int64_t n, int64_t first, int64_t number) const {
    const int64_t width = min64(number * TILE_K, net.f.d_in - first * TILE_K), whole = width / TILE_K;
    for (int64_t i = 0; i < n; i++) {
      const bf16 *from = x_block + token[i] * x_stride + first * TILE_K;
      bf16 *to = own.panel + i * TILE_K;
      for (int64_t k = 0; k < whole; k++) _mm512_storeu_si512(to + k * M * TILE_ELEMENTS, _mm512_loadu_si512(from + k * TILE_K));
      if (whole < number)
        _mm512_storeu_si512(to + whole * M * TILE_ELEMENTS, _mm512_maskz_loadu_epi16(first_bits(width % TILE_K), from + whole * TILE_K));
    }
  }

  // Activation and gate of rows of C, each the up columns and then the gate columns, and on to H.
  void place(const Own &own, const uint16_t *token, int64_t n, int64_t neurons, int64_t stride, int64_t at) const {
    const bool is_gated = net.f.gate != nullptr;
    for (int64_t i = 0; i < n; i++)  // whole vectors: the next row overwrites what is too much
      for (int64_t j = 0; j < neurons; j += W) {
        store(own.h + i * neurons + j, load(own.c + i * stride + j));
        if (is_gated) store(own.gate + i * neurons + j, load(own.c + i * stride + neurons + j));
      }
    const int64_t size = n * neurons;
    for (int64_t k = 0; k < size; k += W) {
      const vf h = load(own.h + k);
      const vf value = is_gated ? activate(load(own.gate + k), net.f.activation) * h : activate(h, net.f.activation);
      _mm256_storeu_si256((__m256i *)(own.rounded + k), (__m256i)_mm512_cvtneps_pbh((__m512)value));
    }
    const __mmask32 columns = first_bits(neurons);
    for (int64_t i = 0; i < n; i++) {
      _mm512_mask_storeu_epi16(own.hidden + token[i] * CHUNK_STRIDE + at, columns, _mm512_loadu_si512(own.rounded + i * neurons));
      uint8_t *used = own.used + token[i] / TILE_ROWS * CHUNK_TILES;
      used[at / TILE_K] = used[(at + neurons - 1) / TILE_K] = 1;
    }
  }

  // y += H . down, n neurons.
  bool second(const Own &own, const bf16 *const *down, int64_t n, int64_t rows) const {
    const int64_t tiles = (n + TILE_K - 1) / TILE_K;
    for (int64_t c = 0; c < net.f.d_out; c += COLUMNS) {
      if (!pack_rows(down, n, c, min64(COLUMNS, net.f.d_out - c), own.weights)) return false;
      for (int64_t t = 0; t < rows; t += 2 * TILE_ROWS) {
        if (c + COLUMNS < net.f.d_out)  // a line of each row: no prefetcher follows that
          for (int64_t j = n * t / rows; j < n * min64(t + 2 * TILE_ROWS, rows) / rows; j++) __builtin_prefetch(down[j] + c + COLUMNS);
        float *sums = own.sums + c * rows + t * COLUMNS;
        t + TILE_ROWS < rows ? accumulate<2>(own, t, tiles, sums) : accumulate<1>(own, t, tiles, sums);
      }
    }
    return true;
  }

  template <int M>
  void accumulate(const Own &own, int64_t t, int64_t tiles, float *sums) const {
    const uint8_t *used = own.used + t / TILE_ROWS * CHUNK_TILES;
    for (int64_t line = 0; line < M * TILE_ROWS * COLUMNS; line += 16)  // the next rows of y come from afar
      __builtin_prefetch(sums + M * TILE_ROWS * COLUMNS + line, 1);
    load_sums<M, 2>(sums, COLUMNS);
    for (int64_t k = 0; k < tiles; k++)
      if (used[k] | used[(M - 1) * CHUNK_TILES + k])
        multiply<M, 2>(own.hidden + t * CHUNK_STRIDE + k * TILE_K, CHUNK_STRIDE, own.weights + k * 2 * TILE_ELEMENTS);
    store_sums<M, 2>(sums, COLUMNS);
  }
};

// NOT_HERE: other types, few tokens, or a weight of down that is not finite: an expert that a token does not take would reach it.
static int run_tiles(const moeify_ffn &f, const void *x, int64_t x_stride, const uint8_t *mask, int64_t num_tokens, void *y,
                     int64_t y_stride, int num_threads) {
  if (f.dtype != MOEIFY_BF16 || f.weight_dtype != MOEIFY_BF16 || num_tokens <= FEW_TOKENS) return NOT_HERE;
  const TiledTokens::Net net(f);
  // Blocks as large as the caches allow, for each packs all weights; but at least one a thread, and equal ones.
  const int64_t share = (num_tokens + num_threads - 1) / num_threads;
  const int64_t most = min64(BLOCK_TOKENS, max64(128, BLOCK_BYTES / (f.d_in * (int64_t)sizeof(bf16))));
  const int64_t blocks = (share + most - 1) / most, block = (share + blocks - 1) / blocks;
  const int64_t per_thread = bytes_of<TiledTokens::Own>(net, block);
  char *memory = scratch(per_thread * num_threads);
  if (!memory) return MOEIFY_NO_MEMORY;
  TiledTokens job{net, (const bf16 *)x, x_stride, mask, num_tokens, block, (bf16 *)y, y_stride, memory, per_thread, {0}, {true}};
  parallel(num_threads, &TiledTokens::task, &job);
  return job.is_finite ? MOEIFY_OK : NOT_HERE;
}
