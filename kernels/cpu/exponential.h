// e^x, e^x - 1 and tanh of float32 to about a unit in the last place, over all floats: infinities, subnormals, NaN.
#pragma once
#include "vectors.h"

namespace {

inline vf bounded(vf x, float least, float most) {  // NaN stays
#if defined(ISA_AVX512)
  return (vf)_mm512_max_ps(_mm512_set1_ps(least), _mm512_min_ps(_mm512_set1_ps(most), (__m512)x));
#elif defined(ISA_AVX2)
  return (vf)_mm256_max_ps(_mm256_set1_ps(least), _mm256_min_ps(_mm256_set1_ps(most), (__m256)x));
#else
  x = x > splat(most) ? splat(most) : x;
  return x < splat(least) ? splat(least) : x;
#endif
}

inline vf power_of_two(vi n) { return (vf)((n + 127) << 23); }  // -126 <= n <= 127

template <int N> inline vf polynomial(const float (&coefficients)[N], vf x) {  // the highest first
  vf p = splat(coefficients[0]);
  for (int i = 1; i < N; i++) p = fma(p, x, splat(coefficients[i]));
  return p;
}

constexpr float REST[] = {0.00139505602f, 0.00836892892f, 0.041666206f, 0.166665182f, 0.5f};  // of (e^r - 1 - r) / r²

// x = n ln 2 + r with |r| <= ln 2 / 2, for |x| < 2**21; returns e^r - 1.
inline vf reduced(vf x, vi& n) {
  const vf shift = splat(0x1.8p23f);  // a sum with it ends in the integer, rounded to nearest
  const vf sum = fma(x, splat(0x1.715476p+0f), shift), whole = sum - shift;
  n = (vi)sum - (vi)shift;
  vf r = fma(whole, splat(-0x1.63p-1f), x);  // nine bits of ln 2: the product is exact, and so is the difference
  r = fma(whole, splat(0x1.bd0106p-13f), r);
  return fma(r * r, polynomial(REST, r), r);
}

inline vf exp(vf x) {
  vi n;
  const vf e = reduced(bounded(x, -104, 89), n) + 1.0f;
#if defined(ISA_AVX512)
  return (vf)_mm512_scalef_ps((__m512)e, _mm512_cvtepi32_ps((__m512i)n));
#else
  const vi half = n >> 1;
  return e * power_of_two(half) * power_of_two(n - half);  // the last product alone may leave the normal range
#endif
}

inline vf tanh(vf x) {
  vi n;
  const vi sign = (vi)x & (vi)splat(-0.0f);
  const vf e = reduced(2.0f * bounded((vf)((vi)x ^ sign), 0, 10), n), power = power_of_two(n);
  const vf m = fma(power, e, power - 1.0f);  // e^2|x| - 1
  return (vf)((vi)(m / (m + 2.0f)) | sign);
}

}  // namespace
