// What the instruction sets share: number types, scratch memory, threads. Compiled for the oldest processor only; the inline functions are
// static, so that no copy compiled for a newer one is ever taken.
#ifndef MOEIFY_INTERNAL_H
#define MOEIFY_INTERNAL_H

#include <cstdint>
#include <cstring>

struct bf16 {
  uint16_t bits;
};

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
static inline bf16 to_bf16(float x) {  // to the nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return {(uint16_t)(bits >> 16 | 0x40)};
  return {(uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
static inline void convert_to(float &y, float x) { y = x; }
static inline void convert_to(bf16 &y, float x) { y = to_bf16(x); }

struct moeify_gradients;

// What the two entry points of training are called with.
struct TrainCall {
  const void *x;
  int64_t x_stride;
  const uint8_t *mask;
  int64_t num_tokens;
  void *kept;
  int64_t kept_elements;
  void *y;  // forward
  int64_t y_stride;
  const void *grad;  // backward
  int64_t grad_stride;
  const moeify_gradients *out;  // null in forward
};

// Memory of the calling thread, at 64 bytes, kept until it ends; null if there is none left. The next call may return the same.
char *scratch(int64_t bytes);

// What lies between buffers that were cut from it: nobody may touch it, and AddressSanitizer, where it is there, sees who does.
void forbid(void *memory, int64_t bytes);

// task(argument, thread, threads) on at most num_threads threads; returns when all have finished, with how many they were.
int parallel(int num_threads, void (*task)(void *, int, int), void *argument);

#endif
