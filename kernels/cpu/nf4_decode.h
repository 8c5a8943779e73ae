// NF4 -> values: level[code] · absmax in float32, rounded once; the 16 products of a block are a table in registers.
#pragma once
#include "vectors.h"

namespace {

alignas(64) const float LEVELS[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

struct Weight {
  const uint8_t* packed;
  const float* absmax;  // or, where null, in 8 bits:
  const uint8_t* codes;
  const float *nested, *offset, *map;
  int64_t blocksize;

  float scale(int64_t block) const {
    return absmax ? absmax[block] : map[codes[block]] * nested[block >> 8] + *offset;
  }
  void scales(float* out, int64_t first, int64_t n) const {
    if (absmax) {
      memcpy(out, absmax + first, n * sizeof(float));
      return;
    }
    for (int64_t block = first, stop; block < first + n; block = stop) {
      stop = at_most((block | 255) + 1, first + n);
      const float by = nested[block >> 8], shift = *offset;
      for (int64_t b = block; b < stop; b++) out[b - first] = map[codes[b]] * by + shift;
    }
  }
};

template <int BYTES> struct Entries;  // the table of one block, by the width of what is looked up

template <> struct Entries<4> {
  typedef float T;
  Entries() = default;
#if defined(ISA_AVX512)
  __m512 all;
  template <class D> explicit Entries(D, float absmax) { all = (__m512)D::round(load<vf>(LEVELS) * absmax); }
  static __m512i bytes(const uint8_t* p) { return _mm512_cvtepu8_epi32(load<__m128i>(p)); }
  // The values of the high and of the low nibbles of L bytes; a permutation reads the low four bits of an index.
  void both(const uint8_t* p, vf& high, vf& low) const {
    __m512i b = bytes(p);
    high = (vf)_mm512_permutexvar_ps(_mm512_srli_epi32(b, 4), all);
    low = (vf)_mm512_permutexvar_ps(b, all);
  }
  void in_order(T* out, const uint8_t* p) const {  // 2 L values of L bytes
    for (int i = 0; i < 2; i++) {
      __m512i b = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)(p + 8 * i)));
      b = _mm512_or_si512(_mm512_srli_epi64(b, 4), _mm512_slli_epi64(b, 32));
      store(out + L * i, _mm512_permutexvar_ps(b, all));
    }
  }
#elif defined(ISA_AVX2)
  __m256 lower, upper;
  template <class D> explicit Entries(D, float absmax) {
    lower = (__m256)D::round(load<vf>(LEVELS) * absmax);
    upper = (__m256)D::round(load<vf>(LEVELS + 8) * absmax);
  }
  vf of(__m256i index) const {  // by the low four bits
    __m256 a = _mm256_permutevar8x32_ps(lower, index), b = _mm256_permutevar8x32_ps(upper, index);
    return (vf)_mm256_blendv_ps(a, b, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  }
  void both(const uint8_t* p, vf& high, vf& low) const {
    __m256i b = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
    high = of(_mm256_srli_epi32(b, 4));
    low = of(b);
  }
  void in_order(T* out, const uint8_t* p) const {
    for (int i = 0; i < 2; i++) {
      int32_t four;
      memcpy(&four, p + 4 * i, 4);
      __m256i b = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
      store(out + L * i, of(_mm256_or_si256(_mm256_srli_epi64(b, 4), _mm256_slli_epi64(b, 32))));
    }
  }
#else
  T all[16];
  template <class D> explicit Entries(D, float absmax) {
    for (int i = 0; i < 16; i += L) store(all + i, D::round(load<vf>(LEVELS + i) * absmax));
  }
  void both(const uint8_t* p, vf& high, vf& low) const {
    for (int i = 0; i < L; i++) high[i] = all[p[i] >> 4], low[i] = all[p[i] & 15];
  }
  void in_order(T* out, const uint8_t* p) const {
    for (int i = 0; i < L; i++) out[2 * i] = all[p[i] >> 4], out[2 * i + 1] = all[p[i] & 15];
  }
#endif
};

template <> struct Entries<2> {
  typedef uint16_t T;
#if defined(ISA_AVX512)
  __m512i all;  // twice over: a permutation reads the low five bits of an index
  template <class D> explicit Entries(D, float absmax) {
    T once[16];
    D::narrow(once, load<vf>(LEVELS) * absmax);
    all = _mm512_broadcast_i64x4(load<__m256i>(once));
  }
  void in_order(T* out, const uint8_t* p) const {
    __m512i b = _mm512_cvtepu8_epi32(load<__m128i>(p));
    b = _mm512_or_si512(_mm512_srli_epi32(b, 4), _mm512_slli_epi32(b, 16));
    store(out, _mm512_permutexvar_epi16(b, all));
  }
#elif defined(ISA_AVX2)
  __m128i low, high;  // bytes of the entries
  template <class D> explicit Entries(D, float absmax) {
    T once[16];
    D::narrow(once, load<vf>(LEVELS) * absmax);
    D::narrow(once + 8, load<vf>(LEVELS + 8) * absmax);
    __m128i a = load<__m128i>(once), b = load<__m128i>(once + 8), mask = _mm_set1_epi16(0xff);
    low = _mm_packus_epi16(_mm_and_si128(a, mask), _mm_and_si128(b, mask));
    high = _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8));
  }
  void in_order(T* out, const uint8_t* p) const {
    __m128i b = _mm_loadl_epi64((const __m128i*)p), mask = _mm_set1_epi8(15);
    __m128i codes = _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16(b, 4), mask), _mm_and_si128(b, mask));
    __m128i lows = _mm_shuffle_epi8(low, codes), highs = _mm_shuffle_epi8(high, codes);
    store(out, _mm_unpacklo_epi8(lows, highs));
    store(out + 8, _mm_unpackhi_epi8(lows, highs));
  }
#else
  T all[16];
  template <class D> explicit Entries(D, float absmax) {
    for (int i = 0; i < 16; i += L) D::narrow(all + i, load<vf>(LEVELS + i) * absmax);
  }
  void in_order(T* out, const uint8_t* p) const {
    for (int i = 0; i < L; i++) out[2 * i] = all[p[i] >> 4], out[2 * i + 1] = all[p[i] & 15];
  }
#endif
};

// out[i] = value of element first + i, for first <= element < last, wherever blocks and bytes begin.
template <class D> inline void decode(typename D::T* out, const Weight& w, int64_t first, int64_t last) {
  typedef typename D::T T;
  int64_t block = first / w.blocksize;
  for (int64_t e = first; e < last; block++) {
    Entries<sizeof(T)> entries(D{}, w.scale(block));
    int64_t stop = at_most((block + 1) * w.blocksize, last);
    T pair[2 * L];
    uint8_t bytes[L] = {};
    if (e & 1) {  // the second half of a byte
      bytes[0] = w.packed[e / 2];
      entries.in_order(pair, bytes);
      *out++ = pair[1];
      e++;
    }
    for (; e + 2 * L <= stop; e += 2 * L, out += 2 * L) entries.in_order(out, w.packed + e / 2);
    if (e < stop) {
      memcpy(bytes, w.packed + e / 2, (stop - e + 1) / 2);
      entries.in_order(pair, bytes);
      memcpy(out, pair, (stop - e) * sizeof(T));
      out += stop - e;
      e = stop;
    }
  }
}

}  // namespace
