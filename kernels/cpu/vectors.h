// Vectors of the widest float registers of an instruction set, and the three float types in memory.
//
// A source defines one of ISA_AVX512BF16, ISA_AVX512, ISA_AVX2 and ISA_PORTABLE before it includes this; everything is
// in an unnamed namespace, so that no symbol of one instruction set can stand in for that of another. Compiled without
// contraction: a fused product and sum is written `fma`, and results that are exact stay the same everywhere.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#if defined(ISA_AVX512BF16)
#define ISA_AVX512
#endif

namespace {

#if defined(ISA_AVX512)
constexpr int L = 16;  // float32 in a vector
#elif defined(ISA_AVX2)
constexpr int L = 8;
#else
constexpr int L = 4;
#endif

typedef float vf __attribute__((vector_size(4 * L)));
typedef int32_t vi __attribute__((vector_size(4 * L)));
typedef uint32_t vu __attribute__((vector_size(4 * L)));
typedef uint64_t vq __attribute__((vector_size(4 * L)));
typedef uint16_t vh __attribute__((vector_size(2 * L)));
typedef int16_t vs __attribute__((vector_size(2 * L)));

template <class V> inline V load(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V> inline void store(void* p, V v) { memcpy(p, &v, sizeof v); }
inline vf splat(float x) { return x - vf{}; }  // keeps -0 and NaN

inline vf fma(vf a, vf b, vf c) {
#if defined(ISA_AVX512)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(ISA_AVX2)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

inline float sum(vf v) {  // in the order of `sums`, so that no result depends on its neighbours
#if defined(ISA_AVX512)
  __m512 t = (__m512)v;
  t = _mm512_add_ps(t, _mm512_shuffle_ps(t, t, 0x4e));
  t = _mm512_add_ps(t, _mm512_shuffle_ps(t, t, 0xb1));
  t = _mm512_add_ps(t, _mm512_shuffle_f32x4(t, t, 0xb1));
  return _mm512_cvtss_f32(_mm512_add_ps(t, _mm512_shuffle_f32x4(t, t, 0x4e)));
#elif defined(ISA_AVX2)
  __m256 t = _mm256_hadd_ps((__m256)v, (__m256)v);
  t = _mm256_hadd_ps(t, t);
  return _mm_cvtss_f32(_mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

#if defined(ISA_AVX512)
inline __m512 sums_of_quarters(const float* p) {  // each 128 bits: the sums of those 128 bits of four vectors
  const __m512 a = _mm512_loadu_ps(p), b = _mm512_loadu_ps(p + 16);
  const __m512 c = _mm512_loadu_ps(p + 32), d = _mm512_loadu_ps(p + 48);
  const __m512d ab = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512d cd = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  return _mm512_add_ps((__m512)_mm512_unpacklo_pd(ab, cd), (__m512)_mm512_unpackhi_pd(ab, cd));
}
inline __m512 sums_of_pairs(__m512 a, __m512 b) {  // of 128 bits and the next, a's in the lower half
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
#endif

// out[i] = sum of the i-th of n vectors at p.
inline void sums(float* out, const float* p, int64_t n) {
  int64_t i = 0;
#if defined(ISA_AVX512)
  for (; i + 16 <= n; i += 16) {
    const float* q = p + i * 16;
    const __m512 lower = sums_of_pairs(sums_of_quarters(q), sums_of_quarters(q + 64));
    const __m512 upper = sums_of_pairs(sums_of_quarters(q + 128), sums_of_quarters(q + 192));
    store(out + i, sums_of_pairs(lower, upper));
  }
#elif defined(ISA_AVX2)
  for (; i + 4 <= n; i += 4) {
    const float* q = p + i * 8;
    const __m256 ab = _mm256_hadd_ps(_mm256_loadu_ps(q), _mm256_loadu_ps(q + 8));
    const __m256 all = _mm256_hadd_ps(ab, _mm256_hadd_ps(_mm256_loadu_ps(q + 16), _mm256_loadu_ps(q + 24)));
    store(out + i, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
  }
#endif
  for (; i < n; i++) out[i] = sum(load<vf>(p + i * L));
}

// a[0] b[0] a[1] b[1] ..., of the lower and of the upper halves of a and b.
inline vf lower_zipped(vf a, vf b) {
#if defined(ISA_AVX512)
  const __m512i order = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  return (vf)_mm512_permutex2var_ps((__m512)a, order, (__m512)b);
#elif defined(ISA_AVX2)
  const __m256 low = _mm256_unpacklo_ps((__m256)a, (__m256)b), high = _mm256_unpackhi_ps((__m256)a, (__m256)b);
  return (vf)_mm256_permute2f128_ps(low, high, 0x20);
#else
  return vf{a[0], b[0], a[1], b[1]};
#endif
}
inline vf upper_zipped(vf a, vf b) {
#if defined(ISA_AVX512)
  const __m512i order = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  return (vf)_mm512_permutex2var_ps((__m512)a, order, (__m512)b);
#elif defined(ISA_AVX2)
  const __m256 low = _mm256_unpacklo_ps((__m256)a, (__m256)b), high = _mm256_unpackhi_ps((__m256)a, (__m256)b);
  return (vf)_mm256_permute2f128_ps(low, high, 0x31);
#else
  return vf{a[2], b[2], a[3], b[3]};
#endif
}

inline void transpose(vf (&v)[L]) {  // log2(L) perfect shuffles
  for (int round = 1; round < L; round *= 2) {
    vf from[L];
    for (int i = 0; i < L; i++) from[i] = v[i];
    for (int i = 0; i < L / 2; i++) {
      v[2 * i] = lower_zipped(from[i], from[i + L / 2]);
      v[2 * i + 1] = upper_zipped(from[i], from[i + L / 2]);
    }
  }
}

inline vh low_halves(vu v) {
#if defined(ISA_AVX512)
  return (vh)_mm512_cvtepi32_epi16((__m512i)v);
#elif defined(ISA_AVX2)
  __m256i packed = _mm256_packus_epi32((__m256i)(v & 0xffff), _mm256_setzero_si256());
  return (vh)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(v, vh);
#endif
}

inline float half_to_float(uint16_t h) {
  uint32_t sign = (h & 0x8000u) << 16, magnitude = h & 0x7fffu, bits;
  if (magnitude >= 0x7c00) bits = 0x7f800000u | (magnitude & 0x3ff) << 13;
  else if (magnitude >= 0x400) bits = (magnitude << 13) + (112u << 23);
  else {  // subnormal: exact in float32
    float f = (float)magnitude * 0x1p-24f;
    memcpy(&bits, &f, 4);
  }
  bits |= sign;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
inline uint16_t float_to_half(float f) {  // to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &f, 4);
  uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;
  if (magnitude >= 0x38800000) return sign | (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  if (magnitude <= 0x33000000) return sign;
  uint32_t mantissa = (magnitude & 0x7fffff) | 0x800000, shift = 126 - (magnitude >> 23);
  uint32_t half = mantissa >> shift, rest = mantissa & ((1u << shift) - 1), middle = 1u << (shift - 1);
  return sign | (half + (rest > middle || (rest == middle && (half & 1))));
}

struct F32 {
  typedef float T;
  static constexpr bool PAIRS = false;  // whether products of pairs have an instruction
  static float widen_one(T x) { return x; }
  static vf widen(const T* p) { return load<vf>(p); }
  static void narrow(T* p, vf v) { store(p, v); }
  static void narrow_pair(T* p, vf a, vf b) { narrow(p, a), narrow(p + L, b); }
  static vf round(vf v) { return v; }
};

struct BF16 {  // to nearest, ties to even; in integers where there are subnormals, which vcvtneps2bf16 takes for zeros
  typedef uint16_t T;
  static constexpr bool PAIRS = true;
  static float widen_one(T x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
  }
  static vf widen(const T* p) { return (vf)(__builtin_convertvector(load<vh>(p), vu) << 16); }
  static vu rounded(vf v) {  // in the upper half; the lower is not cleared
    vu bits = (vu)v;
    return v == v ? bits + 0x7fff + (bits >> 16 & 1) : (bits | 0x400000);
  }
  static vf round(vf v) { return (vf)(rounded(v) & 0xffff0000u); }
  static void narrow(T* p, vf v) {
#if defined(ISA_AVX512BF16)
    if (!_mm512_fpclass_ps_mask((__m512)v, 0x20)) return store(p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#endif
    store(p, low_halves(rounded(v) >> 16));
  }
  static void narrow_pair(T* p, vf a, vf b) {
#if defined(ISA_AVX512BF16)
    const __mmask16 subnormal = _mm512_fpclass_ps_mask((__m512)a, 0x20) | _mm512_fpclass_ps_mask((__m512)b, 0x20);
    if (!subnormal) return store(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
#endif
    narrow(p, a), narrow(p + L, b);
  }
};

struct F16 {
  typedef uint16_t T;
  static constexpr bool PAIRS = false;
  static float widen_one(T x) { return half_to_float(x); }
  static vf widen(const T* p) {
#if defined(ISA_AVX512)
    return (vf)_mm512_cvtph_ps((__m256i)load<vh>(p));
#elif defined(ISA_AVX2)
    return (vf)_mm256_cvtph_ps((__m128i)load<vh>(p));
#elif defined(__aarch64__)
    return (vf)vcvt_f32_f16(load<float16x4_t>(p));
#else
    vf v;
    for (int i = 0; i < L; i++) v[i] = half_to_float(p[i]);
    return v;
#endif
  }
  static void narrow(T* p, vf v) {
#if defined(ISA_AVX512)
    store(p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(ISA_AVX2)
    store(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
    store(p, vcvt_f16_f32((float32x4_t)v));
#else
    for (int i = 0; i < L; i++) p[i] = float_to_half(v[i]);
#endif
  }
  static void narrow_pair(T* p, vf a, vf b) { narrow(p, a), narrow(p + L, b); }
  static vf round(vf v) {
    T half[L];
    narrow(half, v);
    return widen(half);
  }
};

template <class D> struct Rounded {  // float32 in memory that holds what D can hold
  typedef float T;
  static vf round(vf v) { return D::round(v); }
  static void narrow(T* p, vf v) { store(p, D::round(v)); }
};

// Of the first n < L elements; widened, the others are zero.
template <class D> inline vf widen_some(const typename D::T* p, int64_t n) {
  typename D::T some[L] = {};
  memcpy(some, p, n * sizeof *p);
  return D::widen(some);
}
template <class D> inline void narrow_some(typename D::T* p, vf v, int64_t n) {
  typename D::T some[L];
  D::narrow(some, v);
  memcpy(p, some, n * sizeof *p);
}

// f(F32{}), f(BF16{}) or f(F16{}), by the number that native.py gives a dtype.
template <class F> inline void with_dtype(int dtype, F f) {
  if (dtype == 0) f(F32{});
  else if (dtype == 1) f(BF16{});
  else f(F16{});
}

// f(part) for 0 <= part < parts; what a part computes does not depend on the number of threads.
template <class F> inline void parallel(int threads, int64_t parts, F f) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && parts > 1)
  for (int64_t part = 0; part < parts; part++) f(part);
}

inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t parts_of(int64_t n, int64_t size) { return (n + size - 1) / size; }
inline int64_t padded(int64_t n, int64_t to) { return parts_of(n, to) * to; }

template <class T> struct Scratch {  // n elements on a cache line, until the end of the scope
  T* p;
  explicit Scratch(int64_t n) : p((T*)aligned_alloc(64, (n * sizeof(T) + 64) / 64 * 64)) {}
  ~Scratch() { free(p); }
  Scratch(const Scratch&) = delete;
  operator T*() const { return p; }
};

}  // namespace
