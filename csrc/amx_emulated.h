// amx_tiles.h in plain C++, for processors without AMX: -DMOEIFY_AMX_EMULATED builds it in, so that tests run amx.h where AVX-512-BF16 is.
// Slow. What the processor would answer with a fault is an assertion here; reads and writes are ordinary ones, which sanitizers see.
//
// Source: Intel SDM vol. 1 ch. 18 and vol. 2, LDTILECFG, TILELOADD, TILESTORED, TDPBF16PS.

constexpr int NUM_TILES = 8, MAX_ROWS = 16, MAX_ROW_BYTES = 64;  // of palette 1

struct Tile {
  int rows, row_bytes;
  char data[MAX_ROWS][MAX_ROW_BYTES];
};
static thread_local Tile tiles_of_thread[NUM_TILES];
static thread_local bool is_configured = false;

static inline void tile_config(const TileConfig &config) {
  assert(config.palette == 1 && config.start_row == 0);
  for (uint8_t zero : config.reserved) assert(zero == 0), (void)zero;
  for (int t = 0; t < 16; t++) {
    const int rows = config.rows[t], row_bytes = config.row_bytes[t];
    assert(rows <= MAX_ROWS && row_bytes <= MAX_ROW_BYTES && (rows == 0) == (row_bytes == 0));
    if (t >= NUM_TILES)
      assert(rows == 0);
    else
      tiles_of_thread[t] = Tile{rows, row_bytes, {}};
  }
  is_configured = true;
}
static inline void tile_release() { is_configured = false; }

template <int TILE>
static inline Tile &tile() {
  static_assert(TILE >= 0 && TILE < NUM_TILES, "palette 1 has 8 tiles");
  assert(is_configured && tiles_of_thread[TILE].rows > 0);
  return tiles_of_thread[TILE];
}

template <int TILE>
static inline void tile_load(const void *from, int64_t stride) {
  Tile &t = tile<TILE>();
  memset(t.data, 0, sizeof(t.data));
  for (int m = 0; m < t.rows; m++) memcpy(t.data[m], (const char *)from + m * stride, t.row_bytes);
}
template <int TILE>
static inline void tile_store(void *to, int64_t stride) {
  const Tile &t = tile<TILE>();
  for (int m = 0; m < t.rows; m++) memcpy((char *)to + m * stride, t.data[m], t.row_bytes);
}

// Even and odd elements of k are summed apart by fused multiply-adds, then together, then onto C; rounded to nearest, denormals are zero.
static void dot_tiles(Tile &c, const Tile &a, const Tile &b) {
  assert(a.row_bytes % 4 == 0 && b.row_bytes == c.row_bytes && a.rows == c.rows && a.row_bytes / 4 == b.rows);
  const unsigned before = _mm_getcsr();
  _mm_setcsr(0x1F80 | 0x8040);  // no exceptions, round to nearest, flush denormals to zero, take them for zero
  for (int m = 0; m < c.rows; m++) {
    __m512 even = _mm512_setzero_ps(), odd = even, sum;
    for (int k = 0; k < b.rows; k++) {
      uint32_t pair;
      memcpy(&pair, a.data[m] + 4 * k, 4);
      const __m512i pairs = _mm512_loadu_si512(b.data[k]), high = _mm512_set1_epi32((int)0xFFFF0000);
      even = _mm512_fmadd_ps((__m512)_mm512_set1_epi32((int)(pair << 16)), (__m512)_mm512_slli_epi32(pairs, 16), even);
      odd = _mm512_fmadd_ps((__m512)_mm512_set1_epi32((int)(pair & 0xFFFF0000)), (__m512)_mm512_and_si512(pairs, high), odd);
    }
    memcpy(&sum, c.data[m], 64);
    sum = _mm512_add_ps(sum, _mm512_add_ps(even, odd));
    memset(c.data[m], 0, MAX_ROW_BYTES);
    memcpy(c.data[m], &sum, c.row_bytes);
  }
  for (int m = c.rows; m < MAX_ROWS; m++) memset(c.data[m], 0, MAX_ROW_BYTES);
  _mm_setcsr(before);
}
template <int C, int A, int B>
static inline void tile_dot() {
  static_assert(C != A && C != B && A != B, "the processor refuses the same tile twice");
  dot_tiles(tile<C>(), tile<A>(), tile<B>());
}
