#define MOEIFY_NAMESPACE moeify_avx512
#define MOEIFY_W 16
#define MOEIFY_TOKENS 6
#define MOEIFY_BF16_DOT 0
#define MOEIFY_INT16_DOT 0
#include "isa.h"
