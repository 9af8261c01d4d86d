/* Plain C interface of the CPU kernels: one feed-forward network of experts, for any number of tokens, and its training; and linear
 * layers whose tokens skip input channels, for few tokens.
 *
 * Letters: T tokens, D input width, O output width, F neurons, E experts, R router width.
 *
 * Nothing here knows Python or torch. Pointers are borrowed for the call. Expert e owns a contiguous range of neurons: the first F % E
 * experts have F / E + 1, the others F / E. All matrices have one row per neuron (of linear layers per input channel), contiguous in
 * memory; strides count elements. */
#ifndef MOEIFY_H
#define MOEIFY_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

#define MOEIFY_ABI 8

enum moeify_isa { MOEIFY_PORTABLE = 0, MOEIFY_AVX2 = 1, MOEIFY_AVX512 = 2, MOEIFY_AVX512_BF16 = 3, MOEIFY_AMX_BF16 = 4 };
enum moeify_dtype { MOEIFY_FP32 = 0, MOEIFY_BF16 = 1, MOEIFY_INT8 = 2 };
enum moeify_activation {
  MOEIFY_RELU = 0, MOEIFY_SILU = 1, MOEIFY_GELU = 2, MOEIFY_GELU_TANH = 3, MOEIFY_QUICK_GELU = 4, MOEIFY_RELU2 = 5
};
enum moeify_rule { MOEIFY_THRESHOLD = 0, MOEIFY_DYNK_MAX = 1, MOEIFY_DYNK_MASS = 2, MOEIFY_TOPK = 3 };
enum moeify_status { MOEIFY_OK = 0, MOEIFY_BAD_ARGUMENT = 1, MOEIFY_NO_MEMORY = 2, MOEIFY_NO_ISA = 3 };

/* y = down_bias + sum over selected neurons j of act(x . up_j + up_bias_j) * down_j; gated: act(x . gate_j + ..) * (x . up_j + ..). */
typedef struct {
  const void *up, *gate, *down;                     /* (F, D), (F, D) or null, (F, O) */
  int64_t up_stride, gate_stride, down_stride;      /* elements from one neuron's row to the next */
  const void *up_bias, *gate_bias, *down_bias;      /* (F), (F), (O), of x's dtype; or null */
  const float *up_scale, *gate_scale, *down_scale;  /* with int8 weights, (F), (F), (O): what the sum over each output is multiplied by */
  int64_t num_neurons, num_experts, d_in, d_out;
  int32_t dtype;      /* of x and y: fp32 or bf16 */
  int32_t weight_dtype; /* x's, or int8 */
  int32_t activation;
} moeify_ffn;

/* Routed: mask[t * E + e] is 1 where expert e runs for token t. x (T, x_stride) and y (T, y_stride) are contiguous along the last axis.
 * isa: a moeify_isa that this processor has. num_threads: at most so many. */
int moeify_ffn_run(const moeify_ffn *ffn, const void *x, int64_t x_stride, const uint8_t *mask, int64_t num_tokens, void *y,
                   int64_t y_stride, int32_t isa, int32_t num_threads);

/* scores = exp(z / 2), or |z| where is_abs;  z = out relu(hidden x + hidden_bias) + out_bias, all in fp32.
 * Then the rule with its knob (theta, tau, mass, k) decides; always_on, (E) or null, is added. */
typedef struct {
  const float *hidden, *hidden_bias, *out, *out_bias; /* (R, D), (R), (E, R), (E); contiguous */
  const uint8_t *always_on;
  int64_t width;
  int32_t is_abs, rule;
  float knob;
} moeify_router;

/* Router, rule and network in one call; the selection is written to mask (T, E). y null: the selection alone. */
int moeify_routed_run(const moeify_ffn *ffn, const moeify_router *router, const void *x, int64_t x_stride, int64_t num_tokens,
                      uint8_t *mask, void *y, int64_t y_stride, int32_t isa, int32_t num_threads);

/* What a single neuron is worth to a token. Without `project` it is read off the network's own gate, abs(act(gate)) * scale, or without
 * `scale` off the neuron itself, abs(h), of which then only the rows of down are left to skip. With `project` it is predicted from a = project x: sqrt(E[act(g)^2] (u^2 + up_std^2)) * scale, g ~ N(gate a + gate_bias, gate_std^2), u = up a + up_bias; without
 * a gate sqrt(E[act(u)^2]) * scale, u ~ N(.., up_std^2); over the geometric mean of the token's neurons, of which none counts less than a
 * thousandth of the largest. E by three nodes of Gauss and Hermite. All tensors fp32 and contiguous. */
typedef struct {
  const float *scale;                          /* (F), or null */
  const float *project;                        /* (R, D) */
  const float *up, *up_bias, *up_std;          /* (F, R), (F), (F) */
  const float *gate, *gate_bias, *gate_std;    /* likewise, where the network has a gate */
  const uint8_t *always_on;                    /* (F), or null */
  int64_t rank;
  int32_t rule;
  float knob;
} moeify_neurons;

/* A network of experts of one neuron each, for few tokens: the neurons' worth, the rule, and the rows of up, gate and down of those that some
 * token keeps; a gate that was computed for its worth is not computed again. The selection is written to mask (T, F). */
int moeify_neurons_run(const moeify_ffn *ffn, const moeify_neurons *neurons, const void *x, int64_t x_stride, int64_t num_tokens,
                       uint8_t *mask, void *y, int64_t y_stride, int32_t isa, int32_t num_threads);

/* y = (x * keep) weight + bias, keep_tk = |x_tk| >= level_k. Letters: K input channels, N outputs. */
typedef struct {
  const void *weight;    /* (K, N): a row per input channel, contiguous */
  int64_t weight_stride; /* elements from one channel's row to the next */
  const float *level;    /* (K); null keeps all but zeros */
  const void *bias;      /* (N), of x's dtype; or null */
  const float *scale;    /* with int8 weights, (N): what the sum over each output is multiplied by; else null */
  int64_t d_in, d_out;
  int32_t dtype;         /* of x and y: fp32 or bf16 */
  int32_t weight_dtype;  /* x's, or int8 */
} moeify_linear;

/* Reads the rows of the channels that some of the tokens keep; x (T, x_stride) and y (T, y_stride) are contiguous along the last axis. */
int moeify_linear_run(const moeify_linear *linear, const void *x, int64_t x_stride, int64_t num_tokens, void *y, int64_t y_stride,
                      int32_t isa, int32_t num_threads);

/* y = down((act(gate(x)) * up(x)) * keep), each layer with levels of its own; what is between them is rounded to x's dtype once. */
typedef struct {
  moeify_linear gate, up, down; /* gate and up (K, F), down (F, N); of the same types */
  int32_t activation;
} moeify_gated;

int moeify_gated_run(const moeify_gated *gated, const void *x, int64_t x_stride, int64_t num_tokens, void *y, int64_t y_stride,
                     int32_t isa, int32_t num_threads);

/* y = x where not |x_tk| < level_k, elsewhere 0; x and y (T, K) contiguous, of dtype fp32 or bf16. */
int moeify_mask_run(const void *x, const float *level, int64_t num_tokens, int64_t channels, int32_t dtype, void *y, int32_t isa,
                    int32_t num_threads);

/* The network in training: forward and backward over the selected pairs. Weights are of x's dtype, without scales; of the two strides of each
 * matrix, from one neuron to the next (moeify_ffn) and from one column to the next, one is 1. */
typedef struct {
  moeify_ffn ffn;
  int64_t up_column, gate_column, down_column;
} moeify_train;

/* What backward writes, of x's dtype; null where it is not wanted. */
typedef struct moeify_gradients {
  void *x, *up, *gate, *down;                             /* (T, D), (F, D), (F, D), (F, O) */
  int64_t x_stride, up_stride, gate_stride, down_stride;  /* elements from one row to the next */
  int64_t up_column, gate_column, down_column;            /* from one column to the next: as of the weights */
  void *up_bias, *gate_bias;                              /* (F) */
  float *probs;              /* (T, E) zeros: at selected pairs <grad, y_e> is added */
} moeify_gradients;

/* y as moeify_ffn_run's. kept, or null: what backward wants of this pass, at most kept_elements of x's dtype: for each selected pair one for
 * each neuron of the expert, two with a gate. */
int moeify_train_forward(const moeify_train *train, const void *x, int64_t x_stride, const uint8_t *mask, int64_t num_tokens, void *y,
                         int64_t y_stride, void *kept, int64_t kept_elements, int32_t isa, int32_t num_threads);

/* grad: the gradient of y (T, grad_stride); x, mask and weights as forward had them. The gradient of down_bias is the sum of grad's rows.
 * Without tokens nothing is written. */
int moeify_train_backward(const moeify_train *train, const void *x, int64_t x_stride, const uint8_t *mask, int64_t num_tokens,
                          const void *kept, int64_t kept_elements, const void *grad, int64_t grad_stride, const moeify_gradients *out,
                          int32_t isa, int32_t num_threads);

/* Whether this processor and operating system run an instruction set; in moeify_isa's order, so the last 1 is the best. */
int moeify_has_isa(int32_t isa);

/* Threads come from the OpenMP runtime that the caller has loaded: GOMP_parallel, omp_get_thread_num and omp_get_num_threads. Without them
 * everything runs on the calling thread. */
void moeify_use_openmp(void *parallel, void *thread_num, void *num_threads);

int moeify_abi(void);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
