// In place of isa.h, where the compiler does not know the instruction set (setup.py asks it): nothing runs, and moeify_has_isa says no.
#include "internal.h"
#include "moeify.h"

namespace MOEIFY_NAMESPACE {
extern const bool is_compiled = false;

int run_ffn(const moeify_ffn &, const void *, int64_t, const uint8_t *, int64_t, void *, int64_t, int) { return MOEIFY_NO_ISA; }
int route_tokens(const moeify_ffn &, const moeify_router &, const void *, int64_t, int64_t, uint8_t *, int) { return MOEIFY_NO_ISA; }
int run_linear(const moeify_linear &, const void *, int64_t, int64_t, void *, int64_t, int) { return MOEIFY_NO_ISA; }
int run_gated(const moeify_gated &, const void *, int64_t, int64_t, void *, int64_t, int) { return MOEIFY_NO_ISA; }
int run_mask(const void *, const float *, int64_t, int64_t, int32_t, void *, int) { return MOEIFY_NO_ISA; }
int run_neurons(const moeify_ffn &, const moeify_neurons &, const void *, int64_t, int64_t, uint8_t *, void *, int64_t, int) {
  return MOEIFY_NO_ISA;
}
int run_train(const moeify_train &, const TrainCall &, int) { return MOEIFY_NO_ISA; }
}  // namespace MOEIFY_NAMESPACE
