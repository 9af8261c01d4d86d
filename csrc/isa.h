// One instruction set: define MOEIFY_NAMESPACE, MOEIFY_W (floats of a vector), MOEIFY_TOKENS (tokens of a tile), MOEIFY_BF16_DOT and
// MOEIFY_INT16_DOT, then include this. What a file compiled for a newer processor defines must not be shared with the others (the linker
// would keep either copy), so everything is static or inside the namespace.
#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "internal.h"
#include "moeify.h"

namespace MOEIFY_NAMESPACE {
extern const bool is_compiled = true;

#include "vec.h"
#include "ffn.h"
#include "router.h"
#include "linear.h"
#include "neurons.h"
#include "train.h"

int run_ffn(const moeify_ffn &f, const void *x, int64_t x_stride, const uint8_t *mask, int64_t num_tokens, void *y, int64_t y_stride,
            int num_threads) {
  return by_type(f, x, x_stride, num_tokens, Call{f, x, x_stride, mask, num_tokens, y, y_stride, num_threads});
}

int route_tokens(const moeify_ffn &f, const moeify_router &r, const void *x, int64_t x_stride, int64_t num_tokens, uint8_t *mask,
                 int num_threads) {
  if (f.dtype == MOEIFY_FP32) return route<float>(f, r, x, x_stride, num_tokens, mask, num_threads);
  return route<bf16>(f, r, x, x_stride, num_tokens, mask, num_threads);
}

int run_train(const moeify_train &t, const TrainCall &c, int num_threads) {
  if (t.ffn.dtype == MOEIFY_FP32) return run_training<StepFp32, float>(t, c, num_threads);
#if MOEIFY_BF16_DOT
  return run_training<StepBf16, bf16>(t, c, num_threads);
#else
  return run_training<StepFp32, bf16>(t, c, num_threads);
#endif
}
}  // namespace MOEIFY_NAMESPACE
