// The dropout mask of reference/dropout.py: a pure function of (seed, row, column).
#pragma once
#include "vectors.h"

namespace {

// 64-bit products of the low halves.
inline vq multiply(vq a, uint32_t b) {
#if defined(ISA_AVX512)
  return (vq)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(ISA_AVX2)
  return (vq)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__x86_64__)
  return (vq)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xffffffff) * b;
#endif
}

// Philox-4x32 of L / 2 counters (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), 7 rounds, one to
// 64 bits. Upper halves of c0 to c3 hold whatever is left there: products and the last step do not read them.
inline void philox(vq counter, uint64_t seed, vq& low, vq& high) {
  vq c0 = counter, c1 = counter >> 32, c2 = {}, c3 = {};
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 7; round++) {
    const vq a = multiply(c0, 0xD2511F53), b = multiply(c2, 0xCD9E8D57);
    c0 = (b >> 32) ^ c1 ^ (uint64_t)k0;
    c2 = (a >> 32) ^ c3 ^ (uint64_t)k1;
    c1 = b, c3 = a;
    k0 += 0x9E3779B9, k1 += 0xBB67AE85;
  }
  low = (c0 & 0xffffffff) | c1 << 32;
  high = (c2 & 0xffffffff) | c3 << 32;
}

// What is kept of a tile's row: with mask registers a bit to an element, in words of L; without, 16 equal bits to one.
#if defined(ISA_AVX512)
constexpr int64_t PER_WORD = L;
#else
constexpr int64_t PER_WORD = 1;
#endif
constexpr int64_t MASK_STEP = 4 * L;  // elements to which masks are made at once, and written
constexpr int64_t mask_words(int64_t columns) { return (columns + MASK_STEP - 1) / MASK_STEP * MASK_STEP / PER_WORD; }

// L elements, those not kept as zeros; the first is the k-th of its row, k a multiple of L.
inline vf masked(vf x, const uint16_t* mask, int64_t k) {
#if defined(ISA_AVX512)
  return (vf)_mm512_maskz_mov_ps(mask[k / L], (__m512)x);
#else
  return (vf)((vi)x & __builtin_convertvector(load<vs>(mask + k), vi));
#endif
}

struct Dropout {
  int threshold;  // of 16 random bits; an element is kept where they are not below it. Negative: no dropout
  const int64_t* seeds;
  int64_t octets;  // of a row: eight neighbours share one call

  bool on() const { return threshold >= 0; }

  // The mask of columns [first, first + columns) of `row`; first is a multiple of 8. Writes mask_words(columns).
  void keep(uint16_t* mask, int64_t group, int64_t row, int64_t first, int64_t columns) const {
    const uint64_t seed = (uint64_t)seeds[group], start = (uint64_t)(row * octets + first / 8);
    vq steps;
    for (int i = 0; i < L / 2; i++) steps[i] = i;
    for (int64_t i = 0; i < columns; i += MASK_STEP) {
      vq low, high;
      philox(steps + (start + i / 8), seed, low, high);
#if defined(ISA_AVX512)
      const __m512i early = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), bound = _mm512_set1_epi16((short)threshold);
      const __m512i late = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
      const __m512i both[2] = {_mm512_permutex2var_epi64((__m512i)low, early, (__m512i)high),
                               _mm512_permutex2var_epi64((__m512i)low, late, (__m512i)high)};
      for (int h = 0; h < 2; h++) store(mask + i / L + 2 * h, (uint32_t)_mm512_cmpge_epu16_mask(both[h], bound));
#else
      uint64_t words[L];
      for (int j = 0; j < L / 2; j++) words[2 * j] = low[j], words[2 * j + 1] = high[j];
      for (int j = 0; j < 4 * L; j += 2 * L) {
        typedef uint16_t vw __attribute__((vector_size(4 * L)));
        const vw bits = load<vw>((const uint16_t*)words + j);
        store(mask + i + j, bits >= (uint16_t)threshold);
      }
#endif
    }
  }
};

}  // namespace
