#define MOEIFY_NAMESPACE moeify_avx2
#define MOEIFY_W 8
#define MOEIFY_TOKENS 3
#define MOEIFY_BF16_DOT 0
#define MOEIFY_INT16_DOT 0
#if !defined(MOEIFY_LEFT_OUT) && defined(__AVX2__) && defined(__FMA__)
#include "isa.h"
#else
#include "isa_missing.h"
#endif
