#define MOEIFY_NAMESPACE moeify_avx512_bf16
#define MOEIFY_W 16
#define MOEIFY_TOKENS 6
#define MOEIFY_BF16_DOT 1
#define MOEIFY_INT16_DOT 1
#include "isa.h"
