#define MOEIFY_NAMESPACE moeify_avx512_bf16
#define MOEIFY_W 16
#define MOEIFY_TOKENS 6
#define MOEIFY_BF16_DOT 1
#define MOEIFY_INT16_DOT 1
#if !defined(MOEIFY_LEFT_OUT) && defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "isa.h"
#else
#include "isa_missing.h"
#endif
