// The tile instructions that amx.h uses, as functions of register numbers; included inside the namespace of isa_amx_bf16.cpp.
//
// Written in assembly rather than by the compilers' intrinsics: GCC's are macros that want literal numbers, not template arguments, and
// those of GCC 12 do not say that they touch memory, so that what fills a panel may be moved behind the instruction that loads it.

static inline void tile_config(const TileConfig &config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
static inline void tile_release() { asm volatile("tilerelease"); }

// Rows are stride bytes apart.
template <int TILE>
static inline void tile_load(const void *from, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(TILE), "r"(from), "r"(stride) : "memory");
}
template <int TILE>
static inline void tile_store(void *to, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(TILE), "r"(to), "r"(stride) : "memory");
}

// C += A B: row k of B holds elements 2 k and 2 k + 1 of each column.
template <int C, int A, int B>
static inline void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
