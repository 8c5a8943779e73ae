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

struct Dropout {
  int threshold;  // of 16 random bits; an element is kept where they are not below it. Negative: no dropout
  const int64_t* seeds;
  int64_t octets;  // of a row: eight neighbours share one call

  bool on() const { return threshold >= 0; }

  // mask[i] = all ones where column first + i of `row` is kept, else 0; first is a multiple of 8. Writes up to 4 L - 1
  // entries too many.
  void keep(uint16_t* mask, int64_t group, int64_t row, int64_t first, int64_t columns) const {
    const uint64_t seed = (uint64_t)seeds[group], start = (uint64_t)(row * octets + first / 8);
    vq steps;
    for (int i = 0; i < L / 2; i++) steps[i] = i;
    for (int64_t i = 0; i < columns; i += 4 * L) {
      vq low, high;
      philox(steps + (start + i / 8), seed, low, high);
      uint64_t words[L];
      for (int j = 0; j < L / 2; j++) words[2 * j] = low[j], words[2 * j + 1] = high[j];
      for (int j = 0; j < 4 * L; j += 2 * L) {
        typedef uint16_t vw __attribute__((vector_size(4 * L)));
        const vw bits = load<vw>((const uint16_t*)words + j);
        store(mask + i + j, bits >= (uint16_t)threshold);
      }
    }
  }
};

// Of L mask entries, as a mask of float32.
inline vf masked(vf x, const uint16_t* mask) {
  return (vf)((vi)x & __builtin_convertvector(load<vs>(mask), vi));
}

}  // namespace
