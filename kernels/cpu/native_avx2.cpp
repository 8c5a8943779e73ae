#define ISA avx2
#define ISA_AVX2
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "library.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
