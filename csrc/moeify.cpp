// Entry points: argument checks, choice of the instruction set, threads, scratch memory. Compiled for the oldest processor.
#include "moeify.h"

#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#endif

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1  // as GCC says it
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "internal.h"

#define DECLARE(name)                                                                                                      \
  namespace name {                                                                                                         \
  extern const bool is_compiled; /* false where the compiler did not know it */                                            \
  int run_ffn(const moeify_ffn &, const void *, int64_t, const uint8_t *, int64_t, void *, int64_t, int);                 \
  int route_tokens(const moeify_ffn &, const moeify_router &, const void *, int64_t, int64_t, uint8_t *, int);            \
  int run_linear(const moeify_linear &, const void *, int64_t, int64_t, void *, int64_t, int);                            \
  int run_gated(const moeify_gated &, const void *, int64_t, int64_t, void *, int64_t, int);                              \
  int run_mask(const void *, const float *, int64_t, int64_t, int32_t, void *, int);                                       \
  int run_neurons(const moeify_ffn &, const moeify_neurons &, const void *, int64_t, int64_t, uint8_t *, void *, int64_t,  \
                  int);                                                                                                    \
  int run_train(const moeify_train &, const TrainCall &, int);                                                             \
  }
DECLARE(moeify_portable)
#if defined(__x86_64__)
DECLARE(moeify_avx2)
DECLARE(moeify_avx512)
DECLARE(moeify_avx512_bf16)
DECLARE(moeify_amx_bf16)
#endif

namespace {

typedef void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned);
typedef int (*gomp_number)(void);
std::atomic<gomp_parallel> openmp_parallel{nullptr};
std::atomic<gomp_number> openmp_thread_num{nullptr}, openmp_num_threads{nullptr};
std::atomic<pid_t> openmp_process{0};

struct Call {
  void (*task)(void *, int, int);
  void *argument;
  int num_threads;  // that came: the runtime may give fewer than asked for
};

void enter(void *data) {
  Call *call = static_cast<Call *>(data);
  const int thread = openmp_thread_num.load(std::memory_order_relaxed)(), number = openmp_num_threads.load(std::memory_order_relaxed)();
  if (thread == 0) call->num_threads = number;
  call->task(call->argument, thread, number);
}

struct Scratch {
  char *memory = nullptr;
  int64_t bytes = 0;
  ~Scratch() { free(memory); }
};

#if defined(__x86_64__)
// Whether this process may use tiles: Linux keeps 8 KB of them a thread only for those that ask.
bool has_tiles() {
  if (!moeify_amx_bf16::is_compiled) return false;
#if defined(MOEIFY_AMX_EMULATED)
  return true;
#elif defined(__linux__)
  constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;
  constexpr uint32_t TILE_STATE = 3u << 17;                    // in XCR0: what the operating system saves
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM and its component, which older headers lack
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || ~d & (AMX_BF16 | AMX_TILE)) return false;
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & TILE_STATE) == TILE_STATE && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
  return false;
#endif
}
#endif

uint32_t instruction_sets() {  // one bit each
  uint32_t found = 1u << MOEIFY_PORTABLE;
#if defined(__x86_64__)
  __builtin_cpu_init();  // asks the operating system, too, whether it saves the registers
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return found;
  if (moeify_avx2::is_compiled) found |= 1u << MOEIFY_AVX2;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512vl"))
    return found;
  if (moeify_avx512::is_compiled) found |= 1u << MOEIFY_AVX512;
  unsigned a = 0, b = 0, c = 0, d = 0;
  // With bf16 come products of 16-bit integers (VNNI), which int8 weights use.
  if (!__builtin_cpu_supports("avx512vnni") || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return found;
  if (!moeify_avx512_bf16::is_compiled) return found;  // to which AMX leaves what it has not
  found |= 1u << MOEIFY_AVX512_BF16;
  if (has_tiles()) found |= 1u << MOEIFY_AMX_BF16;
#endif
  return found;
}

}  // namespace

char *scratch(int64_t bytes) {
  static thread_local Scratch own;
  if (own.bytes < bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(own.memory, (size_t)own.bytes);
#endif
    free(own.memory);
    void *memory = nullptr;
    const int failed = posix_memalign(&memory, 64, (size_t)bytes);
    own.memory = failed ? nullptr : static_cast<char *>(memory);
    own.bytes = failed ? 0 : bytes;
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(own.memory, (size_t)own.bytes);
#endif
  return own.memory;
}

void forbid(void *memory, int64_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(memory, (size_t)bytes);
#else
  (void)memory, (void)bytes;
#endif
}

int parallel(int num_threads, void (*task)(void *, int, int), void *argument) {
  const gomp_parallel region = openmp_parallel.load(std::memory_order_acquire);
  Call call{task, argument, 1};
  // A forked child has the parent's OpenMP state but not its threads, and would wait for them for ever.
  if (num_threads > 1 && region && openmp_process.load() == getpid())
    region(enter, &call, (unsigned)num_threads, 0);
  else
    task(argument, 0, 1);
  return call.num_threads;
}

extern "C" {

int moeify_abi(void) { return MOEIFY_ABI; }

void moeify_use_openmp(void *parallel_region, void *thread_num, void *num_threads) {
  openmp_thread_num = reinterpret_cast<gomp_number>(thread_num);
  openmp_num_threads = reinterpret_cast<gomp_number>(num_threads);
  openmp_process = getpid();
  openmp_parallel = thread_num && num_threads ? reinterpret_cast<gomp_parallel>(parallel_region) : nullptr;
}

int moeify_has_isa(int32_t isa) {
  // Once: under a hypervisor each question to the processor takes microseconds.
  static const uint32_t available = instruction_sets();
  return isa >= 0 && isa < 32 && (available >> isa & 1);
}

}

namespace {

int check(const moeify_ffn *ffn, int64_t num_tokens, int32_t isa, int32_t num_threads) {
  if (!ffn || num_tokens < 0 || num_threads < 1) return MOEIFY_BAD_ARGUMENT;
  const moeify_ffn &f = *ffn;
  if (!f.up || !f.down || f.num_experts < 1 || f.num_experts > f.num_neurons || f.d_in < 1 || f.d_out < 1 || f.activation < 0 ||
      f.activation > MOEIFY_RELU2 || (f.dtype != MOEIFY_FP32 && f.dtype != MOEIFY_BF16) ||
      (f.weight_dtype != f.dtype && f.weight_dtype != MOEIFY_INT8))
    return MOEIFY_BAD_ARGUMENT;
  const bool is_int8 = f.weight_dtype == MOEIFY_INT8;
  if (is_int8 != (f.up_scale != nullptr) || is_int8 != (f.down_scale != nullptr) || (is_int8 && f.gate) != (f.gate_scale != nullptr))
    return MOEIFY_BAD_ARGUMENT;
  return moeify_has_isa(isa) ? MOEIFY_OK : MOEIFY_NO_ISA;
}

bool is_dense(int64_t row, int64_t column) { return row == 1 || column == 1; }

int check(const moeify_train *train, int64_t num_tokens, int32_t isa, int32_t num_threads) {
  if (!train || num_tokens > INT32_MAX) return MOEIFY_BAD_ARGUMENT;
  if (const int status = check(&train->ffn, num_tokens, isa, num_threads)) return status;
  const moeify_ffn &f = train->ffn;
  if (f.weight_dtype != f.dtype || !is_dense(f.up_stride, train->up_column) || !is_dense(f.down_stride, train->down_column) ||
      (f.gate && !is_dense(f.gate_stride, train->gate_column)))
    return MOEIFY_BAD_ARGUMENT;
  return MOEIFY_OK;
}

int check(const moeify_linear &f) {
  if (!f.weight || f.d_in < 1 || f.d_in > INT32_MAX || f.d_out < 1 || f.weight_stride < f.d_out ||
      (f.dtype != MOEIFY_FP32 && f.dtype != MOEIFY_BF16) || (f.weight_dtype != f.dtype && f.weight_dtype != MOEIFY_INT8) ||
      (f.weight_dtype == MOEIFY_INT8) != (f.scale != nullptr))
    return MOEIFY_BAD_ARGUMENT;
  return MOEIFY_OK;
}

bool same_types(const moeify_linear &a, const moeify_linear &b) { return a.dtype == b.dtype && a.weight_dtype == b.weight_dtype; }

}  // namespace

#if defined(__x86_64__)
#define FOR_ISA(call)                                           \
  switch (isa) {                                                \
    case MOEIFY_AVX2: return moeify_avx2::call;                 \
    case MOEIFY_AVX512: return moeify_avx512::call;             \
    case MOEIFY_AVX512_BF16: return moeify_avx512_bf16::call;   \
    case MOEIFY_AMX_BF16: return moeify_amx_bf16::call;         \
    default: return moeify_portable::call;                      \
  }
#else
#define FOR_ISA(call) return moeify_portable::call;
#endif

static int run_ffn(const moeify_ffn &f, const void *x, int64_t x_stride, const uint8_t *mask, int64_t num_tokens, void *y, int64_t y_stride,
                   int32_t isa, int num_threads) {
  (void)isa;
  FOR_ISA(run_ffn(f, x, x_stride, mask, num_tokens, y, y_stride, num_threads))
}

static int route_tokens(const moeify_ffn &f, const moeify_router &r, const void *x, int64_t x_stride, int64_t num_tokens, uint8_t *mask,
                        int32_t isa, int num_threads) {
  (void)isa;
  FOR_ISA(route_tokens(f, r, x, x_stride, num_tokens, mask, num_threads))
}

static int run_linear(const moeify_linear &f, const void *x, int64_t x_stride, int64_t num_tokens, void *y, int64_t y_stride, int32_t isa,
                      int num_threads) {
  (void)isa;
  FOR_ISA(run_linear(f, x, x_stride, num_tokens, y, y_stride, num_threads))
}

static int run_gated(const moeify_gated &g, const void *x, int64_t x_stride, int64_t num_tokens, void *y, int64_t y_stride, int32_t isa,
                     int num_threads) {
  (void)isa;
  FOR_ISA(run_gated(g, x, x_stride, num_tokens, y, y_stride, num_threads))
}

static int run_neurons(const moeify_ffn &f, const moeify_neurons &n, const void *x, int64_t x_stride, int64_t num_tokens, uint8_t *mask,
                       void *y, int64_t y_stride, int32_t isa, int num_threads) {
  (void)isa;
  FOR_ISA(run_neurons(f, n, x, x_stride, num_tokens, mask, y, y_stride, num_threads))
}

static int run_mask(const void *x, const float *level, int64_t num_tokens, int64_t channels, int32_t dtype, void *y, int32_t isa,
                    int num_threads) {
  (void)isa;
  FOR_ISA(run_mask(x, level, num_tokens, channels, dtype, y, num_threads))
}

static int run_train(const moeify_train &t, const TrainCall &c, int32_t isa, int num_threads) {
  (void)isa;
  FOR_ISA(run_train(t, c, num_threads))
}

extern "C" {

int moeify_linear_run(const moeify_linear *linear, const void *x, int64_t x_stride, int64_t num_tokens, void *y, int64_t y_stride,
                      int32_t isa, int32_t num_threads) {
  if (!linear || num_tokens < 0 || num_threads < 1 || check(*linear)) return MOEIFY_BAD_ARGUMENT;
  if (!moeify_has_isa(isa)) return MOEIFY_NO_ISA;
  if (!num_tokens) return MOEIFY_OK;
  if (!x || !y) return MOEIFY_BAD_ARGUMENT;
  return run_linear(*linear, x, x_stride, num_tokens, y, y_stride, isa, num_threads);
}

int moeify_gated_run(const moeify_gated *gated, const void *x, int64_t x_stride, int64_t num_tokens, void *y, int64_t y_stride,
                     int32_t isa, int32_t num_threads) {
  if (!gated || num_tokens < 0 || num_threads < 1) return MOEIFY_BAD_ARGUMENT;
  const moeify_gated &g = *gated;
  if (check(g.gate) || check(g.up) || check(g.down) || g.gate.d_in != g.up.d_in || g.gate.d_out != g.up.d_out ||
      g.down.d_in != g.up.d_out || !same_types(g.gate, g.up) || !same_types(g.down, g.up) || g.activation < 0 ||
      g.activation > MOEIFY_RELU2)
    return MOEIFY_BAD_ARGUMENT;
  if (!moeify_has_isa(isa)) return MOEIFY_NO_ISA;
  if (!num_tokens) return MOEIFY_OK;
  if (!x || !y) return MOEIFY_BAD_ARGUMENT;
  return run_gated(g, x, x_stride, num_tokens, y, y_stride, isa, num_threads);
}

int moeify_mask_run(const void *x, const float *level, int64_t num_tokens, int64_t channels, int32_t dtype, void *y, int32_t isa,
                    int32_t num_threads) {
  if (num_tokens < 0 || channels < 1 || num_threads < 1 || (dtype != MOEIFY_FP32 && dtype != MOEIFY_BF16)) return MOEIFY_BAD_ARGUMENT;
  if (!moeify_has_isa(isa)) return MOEIFY_NO_ISA;
  if (!num_tokens) return MOEIFY_OK;
  if (!x || !level || !y) return MOEIFY_BAD_ARGUMENT;
  return run_mask(x, level, num_tokens, channels, dtype, y, isa, num_threads);
}

int moeify_ffn_run(const moeify_ffn *ffn, const void *x, int64_t x_stride, const uint8_t *mask, int64_t num_tokens, void *y,
                   int64_t y_stride, int32_t isa, int32_t num_threads) {
  if (const int status = check(ffn, num_tokens, isa, num_threads)) return status;
  if (!num_tokens) return MOEIFY_OK;
  if (!x || !mask || !y) return MOEIFY_BAD_ARGUMENT;
  return run_ffn(*ffn, x, x_stride, mask, num_tokens, y, y_stride, isa, num_threads);
}

int moeify_routed_run(const moeify_ffn *ffn, const moeify_router *router, const void *x, int64_t x_stride, int64_t num_tokens,
                      uint8_t *mask, void *y, int64_t y_stride, int32_t isa, int32_t num_threads) {
  if (const int status = check(ffn, num_tokens, isa, num_threads)) return status;
  if (!router || !router->hidden || !router->hidden_bias || !router->out || !router->out_bias || router->width < 1 || router->rule < 0 ||
      router->rule > MOEIFY_TOPK || !(router->knob >= 0))
    return MOEIFY_BAD_ARGUMENT;
  if (!num_tokens) return MOEIFY_OK;
  if (!x || !mask) return MOEIFY_BAD_ARGUMENT;
  if (const int status = route_tokens(*ffn, *router, x, x_stride, num_tokens, mask, isa, num_threads)) return status;
  return y ? run_ffn(*ffn, x, x_stride, mask, num_tokens, y, y_stride, isa, num_threads) : MOEIFY_OK;
}

int moeify_neurons_run(const moeify_ffn *ffn, const moeify_neurons *neurons, const void *x, int64_t x_stride, int64_t num_tokens,
                       uint8_t *mask, void *y, int64_t y_stride, int32_t isa, int32_t num_threads) {
  if (const int status = check(ffn, num_tokens, isa, num_threads)) return status;
  if (!neurons) return MOEIFY_BAD_ARGUMENT;
  const moeify_neurons &n = *neurons;
  if (n.rule < 0 || n.rule > MOEIFY_TOPK || !(n.knob >= 0) || ffn->num_experts != ffn->num_neurons ||
      ffn->num_neurons > INT32_MAX)
    return MOEIFY_BAD_ARGUMENT;
  const bool is_low_rank = n.project != nullptr, has_gate = ffn->gate != nullptr;
  if (is_low_rank ? n.rank < 1 || !n.scale || !n.up || !n.up_bias || !n.up_std : n.scale && !has_gate) return MOEIFY_BAD_ARGUMENT;
  if (is_low_rank && has_gate && (!n.gate || !n.gate_bias || !n.gate_std)) return MOEIFY_BAD_ARGUMENT;
  if (!num_tokens) return MOEIFY_OK;
  if (!x || !mask || !y) return MOEIFY_BAD_ARGUMENT;
  return run_neurons(*ffn, n, x, x_stride, num_tokens, mask, y, y_stride, isa, num_threads);
}

int moeify_train_forward(const moeify_train *train, const void *x, int64_t x_stride, const uint8_t *mask, int64_t num_tokens, void *y,
                         int64_t y_stride, void *kept, int64_t kept_elements, int32_t isa, int32_t num_threads) {
  if (const int status = check(train, num_tokens, isa, num_threads)) return status;
  if (!num_tokens) return MOEIFY_OK;
  if (!x || !mask || !y) return MOEIFY_BAD_ARGUMENT;
  return run_train(*train, TrainCall{x, x_stride, mask, num_tokens, kept, kept_elements, y, y_stride, nullptr, 0, nullptr}, isa, num_threads);
}

int moeify_train_backward(const moeify_train *train, const void *x, int64_t x_stride, const uint8_t *mask, int64_t num_tokens,
                          const void *kept, int64_t kept_elements, const void *grad, int64_t grad_stride, const moeify_gradients *out,
                          int32_t isa, int32_t num_threads) {
  if (const int status = check(train, num_tokens, isa, num_threads)) return status;
  if (!num_tokens) return MOEIFY_OK;
  if (!out || (!train->ffn.gate && (out->gate || out->gate_bias)) || !x || !mask || !kept || !grad) return MOEIFY_BAD_ARGUMENT;
  if ((out->up && !is_dense(out->up_stride, out->up_column)) || (out->gate && !is_dense(out->gate_stride, out->gate_column)) ||
      (out->down && !is_dense(out->down_stride, out->down_column)))
    return MOEIFY_BAD_ARGUMENT;
  TrainCall call{x, x_stride, mask, num_tokens, const_cast<void *>(kept), kept_elements, nullptr, 0, grad, grad_stride, out};
  return run_train(*train, call, isa, num_threads);
}
}
