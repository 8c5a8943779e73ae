#define ISA portable
#define ISA_PORTABLE
#include "library.inc"

#ifndef SOURCES
#define SOURCES ""
#endif
extern "C" __attribute__((visibility("default"))) const char* peft_ops_sources() { return SOURCES; }

// Whether this machine runs an instruction set.
extern "C" __attribute__((visibility("default"))) int peft_ops_runs(const char* isa) {
  if (!strcmp(isa, "portable")) return 1;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!strcmp(isa, "avx2")) return avx2;
  if (!strcmp(isa, "avx512")) return avx512;
  if (!strcmp(isa, "avx512bf16")) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return 0;
}
