// Values -> NF4: the number of midpoints of neighbouring levels below w · (1/absmax), block by block.
#pragma once
#include "nf4_decode.h"

namespace {

inline float inverse_of(float absmax) {
  float inverse = 1.0f / absmax;
  return __builtin_isinf(inverse) ? 0.0f : inverse;
}

// The largest |x|; NaN where there is one, whose bits are the largest of all.
inline float largest(const float* x, int64_t n) {
  vi most = {};
  for (int64_t i = 0; i < n; i += L) {
    vi bits = (vi)load<vf>(x + i) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  int32_t top = 0;
  for (int i = 0; i < L; i++) top = most[i] > top ? most[i] : top;
  float f;
  memcpy(&f, &top, 4);
  return f;
}

struct Thresholds {
  float t[16];
  Thresholds() {
    for (int i = 0; i < 15; i++) t[i] = (LEVELS[i + 1] + LEVELS[i]) / 2;
    t[15] = __builtin_inff();
  }
  vi codes(vf x) const {
#if defined(ISA_AVX512)  // a search in four steps
    __m512 all = _mm512_loadu_ps(t), v = (__m512)x;
    __m512i c = _mm512_setzero_si512();
    for (int step = 8; step; step /= 2) {
      __m512 middle = _mm512_permutexvar_ps(_mm512_add_epi32(c, _mm512_set1_epi32(step - 1)), all);
      c = _mm512_mask_add_epi32(c, _mm512_cmp_ps_mask(v, middle, _CMP_GT_OQ), c, _mm512_set1_epi32(step));
    }
    return (vi)c;
#else
    vi c = {};
    for (int i = 0; i < 15; i++) c -= x > t[i];
    return c;
#endif
  }
};

inline void pack(uint8_t* out, vi codes) {  // L / 2 bytes
#if defined(ISA_AVX512)
  __m512i q = (__m512i)codes;
  const __m512i bytes = _mm512_or_si512(_mm512_slli_epi64(q, 4), _mm512_srli_epi64(q, 32));
  _mm_storel_epi64((__m128i*)out, _mm512_cvtepi64_epi8(bytes));
#else
  for (int i = 0; i < L / 2; i++) out[i] = codes[2 * i] << 4 | codes[2 * i + 1];
#endif
}

template <class D>
void quantize(uint8_t* packed, float* absmax, const typename D::T* w, int64_t n, int64_t blocksize, int threads) {
  const Thresholds thresholds;
  const int64_t blocks = parts_of(n, blocksize), per_part = parts_of(1 << 15, blocksize);
  parallel(threads, parts_of(blocks, per_part), [&](int64_t part) {
    Scratch<float> x(blocksize + L);
    for (int64_t block = part * per_part; block < at_most((part + 1) * per_part, blocks); block++) {
      const int64_t first = block * blocksize, size = at_most(blocksize, n - first), whole = size / L * L;
      for (int64_t i = 0; i < whole; i += L) store(x + i, D::widen(w + first + i));
      if (whole < size) store(x + whole, widen_some<D>(w + first + whole, size - whole));
      absmax[block] = largest(x, size);
      const float inverse = inverse_of(absmax[block]);
      uint8_t* out = packed + first / 2;
      for (int64_t i = 0; i < whole; i += L) pack(out + i / 2, thresholds.codes(load<vf>(x + i) * inverse));
      if (whole < size) {
        uint8_t some[L / 2];
        pack(some, thresholds.codes(load<vf>(x + whole) * inverse));
        memcpy(out + whole / 2, some, (size - whole + 1) / 2);
      }
    }
  });
}

// codes[i] = how many of the 255 midpoints lie below (absmax[i] - offset) / nested, in blocks of 256; NaN is above all.
void quantize_absmax(uint8_t* codes, float* nested, const float* absmax, int64_t n, const float* offset,
                     const float* midpoints, int threads) {
  parallel(threads, parts_of(n, 256), [&](int64_t block) {
    const int64_t first = block * 256, size = at_most(256, n - first);
    alignas(64) float x[256] = {};
    for (int64_t i = 0; i < size; i++) x[i] = absmax[first + i] - *offset;
    nested[block] = largest(x, 256);
    const float inverse = inverse_of(nested[block]);
    int32_t c[256] = {};
    for (int i = 0; i < 256; i++) x[i] *= inverse;
    for (int step = 128; step; step /= 2)  // a search without branches, 256 at a time
      for (int i = 0; i < 256; i++) c[i] += !(midpoints[c[i] + step - 1] >= x[i]) * step;
    for (int64_t i = 0; i < size; i++) codes[first + i] = c[i];
  });
}

}  // namespace
