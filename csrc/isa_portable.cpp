#define MOEIFY_NAMESPACE moeify_portable
#define MOEIFY_W 4
#define MOEIFY_TOKENS 3
#define MOEIFY_BF16_DOT 0
#define MOEIFY_INT16_DOT 0
#include "isa.h"
