// Vectors of MOEIFY_W floats in the compilers' own vector types: one source for every instruction set. Included once per instruction set,
// inside its namespace (see isa.h).

typedef float vf __attribute__((vector_size(MOEIFY_W * 4)));
typedef int32_t vi __attribute__((vector_size(MOEIFY_W * 4)));
typedef uint32_t vu __attribute__((vector_size(MOEIFY_W * 4)));
typedef uint16_t vh __attribute__((vector_size(MOEIFY_W * 2)));
typedef int8_t vb __attribute__((vector_size(MOEIFY_W)));
// The same in memory, at any address.
typedef float vf_mem __attribute__((vector_size(MOEIFY_W * 4), aligned(4), may_alias));
typedef int32_t vi_mem __attribute__((vector_size(MOEIFY_W * 4), aligned(4), may_alias));
typedef uint16_t vh_mem __attribute__((vector_size(MOEIFY_W * 2), aligned(2), may_alias));
typedef int8_t vb_mem __attribute__((vector_size(MOEIFY_W), aligned(1), may_alias));

constexpr int W = MOEIFY_W;

static inline vf splat(float s) { return s - vf{}; }
static inline vf load(const float *p) { return *reinterpret_cast<const vf_mem *>(p); }
static inline vf load(const bf16 *p) {
  // Of the vector types' conversion GCC 12 makes two halves and puts them together.
#if MOEIFY_W == 16 && defined(__AVX512F__)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#elif MOEIFY_W == 8 && defined(__AVX2__)
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
#else
  const vh h = *reinterpret_cast<const vh_mem *>(p);
  return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}
static inline vf load(const int8_t *p) {
  // GCC 12 makes scalar code of the vector types' conversion.
#if MOEIFY_W == 16 && defined(__AVX512F__)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif MOEIFY_W == 8 && defined(__AVX2__)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
  const vb b = *reinterpret_cast<const vb_mem *>(p);
  return __builtin_convertvector(__builtin_convertvector(b, vi), vf);
#endif
}
static inline void store(float *p, vf v) { *reinterpret_cast<vf_mem *>(p) = v; }
static inline vi load(const int32_t *p) { return *reinterpret_cast<const vi_mem *>(p); }
static inline void store(int32_t *p, vi v) { *reinterpret_cast<vi_mem *>(p) = v; }

// The first n elements, the rest zero; reads nothing beyond them.
template <class T>
static inline vf load_first(const T *p, int64_t n) {
  T padded[W] = {};
  memcpy(padded, p, n * sizeof(T));
  return load(padded);
}

static inline float hsum(vf v) {
#if MOEIFY_W == 16 && defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float s[W];
  store(s, v);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; i++) s[i] += s[i + half];
  return s[0];
#endif
}

static inline int32_t hmax(vi v) {
#if MOEIFY_W == 16 && defined(__AVX512F__)
  return _mm512_reduce_max_epi32((__m512i)v);
#else
  int32_t s[W];
  store(s, v);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; i++) s[i] = s[i] > s[i + half] ? s[i] : s[i + half];
  return s[0];
#endif
}

// Element j of vector i goes to element i of vector j.
static inline void transpose(vf *row) {
#if MOEIFY_W == 16 && defined(__AVX512F__)
  __m512 pair[16], four[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    pair[i] = _mm512_unpacklo_ps((__m512)row[i], (__m512)row[i + 1]);
    pair[i + 1] = _mm512_unpackhi_ps((__m512)row[i], (__m512)row[i + 1]);
  }
  // Each 128 bits of four[4 g + c]: one column, c + a multiple of 4, of the rows 4 g to 4 g + 3.
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 16
    for (int h = 0; h < 2; h++) {
      const __m512d a = _mm512_castps_pd(pair[i + h]), b = _mm512_castps_pd(pair[i + 2 + h]);
      four[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      four[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
#pragma GCC unroll 16
  for (int c = 0; c < 4; c++) {
    const __m512 a = four[c], b = four[4 + c], d = four[8 + c], e = four[12 + c];
    const __m512 even0 = _mm512_shuffle_f32x4(a, b, 0x88), odd0 = _mm512_shuffle_f32x4(a, b, 0xDD);
    const __m512 even1 = _mm512_shuffle_f32x4(d, e, 0x88), odd1 = _mm512_shuffle_f32x4(d, e, 0xDD);
    row[c] = (vf)_mm512_shuffle_f32x4(even0, even1, 0x88), row[8 + c] = (vf)_mm512_shuffle_f32x4(even0, even1, 0xDD);
    row[4 + c] = (vf)_mm512_shuffle_f32x4(odd0, odd1, 0x88), row[12 + c] = (vf)_mm512_shuffle_f32x4(odd0, odd1, 0xDD);
  }
#elif MOEIFY_W == 8 && defined(__AVX2__)
  __m256 four[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4) {
    const __m256 a = (__m256)row[i], b = (__m256)row[i + 1], c = (__m256)row[i + 2], d = (__m256)row[i + 3];
    const __m256 low0 = _mm256_unpacklo_ps(a, b), high0 = _mm256_unpackhi_ps(a, b);
    const __m256 low1 = _mm256_unpacklo_ps(c, d), high1 = _mm256_unpackhi_ps(c, d);
    four[i] = _mm256_shuffle_ps(low0, low1, 0x44), four[i + 1] = _mm256_shuffle_ps(low0, low1, 0xEE);
    four[i + 2] = _mm256_shuffle_ps(high0, high1, 0x44), four[i + 3] = _mm256_shuffle_ps(high0, high1, 0xEE);
  }
#pragma GCC unroll 8
  for (int c = 0; c < 4; c++) {
    row[c] = (vf)_mm256_permute2f128_ps(four[c], four[4 + c], 0x20);
    row[4 + c] = (vf)_mm256_permute2f128_ps(four[c], four[4 + c], 0x31);
  }
#else
  float s[W][W];
  for (int i = 0; i < W; i++) store(s[i], row[i]);
  for (int j = 0; j < W; j++)
    for (int i = 0; i < W; i++) row[j][i] = s[i][j];
#endif
}

// out[0..3] = sums of a, b, c, d: a transposing tree needs 3 operations a vector, four separate sums 8.
static inline void hsum4(vf a, vf b, vf c, vf d, float *out) {
#if MOEIFY_W == 16 && defined(__AVX512F__)
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
  const __m512 s = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
  const __m256 q = _mm256_add_ps(_mm512_castps512_ps256(s), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(s), 1)));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(q), _mm256_extractf128_ps(q, 1)));
#elif MOEIFY_W == 8 && defined(__AVX2__)
  const __m256 ab = _mm256_hadd_ps((__m256)a, (__m256)b), cd = _mm256_hadd_ps((__m256)c, (__m256)d);
  const __m256 s = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
#else
  out[0] = hsum(a), out[1] = hsum(b), out[2] = hsum(c), out[3] = hsum(d);
#endif
}

// e^x, within 1e-7 of itself for x in [-87, 88]; outside, the value at the nearer end. Polynomial: least maximum error, own fit.
static inline vf exp_of(vf x) {
  x = x < -87.0f ? splat(-87.0f) : x;
  x = x > 88.0f ? splat(88.0f) : x;
  const vf shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf n = (x * 1.44269504f + shift) - shift;
  const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  vf p = splat(1.381459855e-03f);
  p = p * r + 8.368716926e-03f;
  p = p * r + 4.166838805e-02f;
  p = p * r + 1.666652063e-01f;
  p = p * r + 4.999999345e-01f;
  p = p * r * r + r + 1.0f;
  const vi exponent = (__builtin_convertvector(n, vi) + 127) << 23;
  return p * (vf)exponent;
}

// 1 + erf(z), which keeps its relative precision for negative z. Polynomials in z^2 below 0.92 and of log(erfc) up to 4: own fits.
static inline vf one_plus_erf(vf z) {
  const vf a = z < 0.0f ? -z : z, s = z * z;
  vf p = splat(8.382354815e-05f);
  p = p * s - 8.145589177e-04f;
  p = p * s + 5.201285354e-03f;
  p = p * s - 2.685949982e-02f;
  p = p * s + 1.128369732e-01f;
  p = p * s - 3.761263385e-01f;
  p = p * s + 1.128379167e+00f;
  const vf near = p * z + 1.0f;
  vf q = splat(1.949470184e-04f);
  q = q * a - 3.033695650e-03f;
  q = q * a + 2.218979224e-02f;
  q = q * a - 1.038564115e-01f;
  q = q * a - 6.372657046e-01f;
  q = q * a - 1.127627432e+00f;
  q = q * a - 2.070002469e-04f;
  const vf erfc = a > 4.0f ? vf{} : exp_of(q);
  const vf far = z < 0.0f ? erfc : 2.0f - erfc;
  return a < 0.92f ? near : far;
}

constexpr int32_t IDENTITY = -1;  // beside moeify_activation

static inline vf activate(vf x, int32_t activation) {
  switch (activation) {
    case IDENTITY: return x;
    case MOEIFY_RELU: return x > 0.0f ? x : (x != x ? x : vf{});
    case MOEIFY_SILU: return x / (1.0f + exp_of(-x));
    case MOEIFY_GELU: return 0.5f * x * one_plus_erf(x * 0.707106781f);
    // x / 2 * (1 + tanh(u)) = x * sigmoid(2 u)
    case MOEIFY_GELU_TANH: return x / (1.0f + exp_of(-1.595769122f * (x + 0.044715f * x * x * x)));
    case MOEIFY_QUICK_GELU: return x / (1.0f + exp_of(-1.702f * x));
    default: {  // MOEIFY_RELU2
      const vf r = x > 0.0f ? x : (x != x ? x : vf{});
      return r * r;
    }
  }
}
