// AMX-BF16: bf16 weights and activations, many tokens. Everything else is AVX-512-BF16's, and not compiled again.
#define MOEIFY_NAMESPACE moeify_amx_bf16
#define MOEIFY_W 16
#define MOEIFY_TOKENS 6
#define MOEIFY_BF16_DOT 1
#define MOEIFY_INT16_DOT 0
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of GCC 12 in its own headers (its bug 105593)
#endif
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cassert>
#include <cstdint>
#include <cstring>

#include "internal.h"
#include "moeify.h"

namespace moeify_avx512_bf16 {
int run_ffn(const moeify_ffn &, const void *, int64_t, const uint8_t *, int64_t, void *, int64_t, int);
int route_tokens(const moeify_ffn &, const moeify_router &, const void *, int64_t, int64_t, uint8_t *, int);
int run_linear(const moeify_linear &, const void *, int64_t, int64_t, void *, int64_t, int);
int run_gated(const moeify_gated &, const void *, int64_t, int64_t, void *, int64_t, int);
int run_mask(const void *, const float *, int64_t, int64_t, int32_t, void *, int);
int run_neurons(const moeify_ffn &, const moeify_neurons &, const void *, int64_t, int64_t, uint8_t *, void *, int64_t, int);
int run_train(const moeify_train &, const TrainCall &, int);
}  // namespace moeify_avx512_bf16

namespace MOEIFY_NAMESPACE {
constexpr int NOT_HERE = -1;  // beside moeify_status

// A compiler that does not know the instructions (setup.py asks it) leaves them out; moeify_has_isa then says no.
#if !defined(MOEIFY_LEFT_OUT) && defined(__AVX512BF16__) && \
    (defined(MOEIFY_AMX_EMULATED) || (defined(__AMX_TILE__) && defined(__AMX_BF16__)))
#include "vec.h"
#include "ffn.h"
#include "amx.h"
extern const bool is_compiled = true;
#else
static int run_tiles(const moeify_ffn &, const void *, int64_t, const uint8_t *, int64_t, void *, int64_t, int) { return NOT_HERE; }
extern const bool is_compiled = false;
#endif

int run_ffn(const moeify_ffn &f, const void *x, int64_t x_stride, const uint8_t *mask, int64_t num_tokens, void *y, int64_t y_stride,
            int num_threads) {
  const int status = run_tiles(f, x, x_stride, mask, num_tokens, y, y_stride, num_threads);
  if (status != NOT_HERE) return status;
  return moeify_avx512_bf16::run_ffn(f, x, x_stride, mask, num_tokens, y, y_stride, num_threads);
}

int route_tokens(const moeify_ffn &f, const moeify_router &r, const void *x, int64_t x_stride, int64_t num_tokens, uint8_t *mask,
                 int num_threads) {
  return moeify_avx512_bf16::route_tokens(f, r, x, x_stride, num_tokens, mask, num_threads);
}

int run_linear(const moeify_linear &f, const void *x, int64_t x_stride, int64_t num_tokens, void *y, int64_t y_stride, int num_threads) {
  return moeify_avx512_bf16::run_linear(f, x, x_stride, num_tokens, y, y_stride, num_threads);
}

int run_gated(const moeify_gated &g, const void *x, int64_t x_stride, int64_t num_tokens, void *y, int64_t y_stride, int num_threads) {
  return moeify_avx512_bf16::run_gated(g, x, x_stride, num_tokens, y, y_stride, num_threads);
}

int run_neurons(const moeify_ffn &f, const moeify_neurons &n, const void *x, int64_t x_stride, int64_t num_tokens, uint8_t *mask, void *y,
                int64_t y_stride, int num_threads) {
  return moeify_avx512_bf16::run_neurons(f, n, x, x_stride, num_tokens, mask, y, y_stride, num_threads);
}

int run_train(const moeify_train &t, const TrainCall &c, int num_threads) { return moeify_avx512_bf16::run_train(t, c, num_threads); }

int run_mask(const void *x, const float *level, int64_t num_tokens, int64_t channels, int32_t dtype, void *y, int num_threads) {
  return moeify_avx512_bf16::run_mask(x, level, num_tokens, channels, dtype, y, num_threads);
}
}  // namespace MOEIFY_NAMESPACE
