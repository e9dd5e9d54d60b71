// What of an x86 CPU the instruction sets of this module need, asked of the CPU itself.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>

namespace llmdpd {

struct CpuFeatures {
  bool avx2 = false, avx512 = false, avx512_bf16 = false;
};

// The compiler's own __builtin_cpu_supports reads what a run-time library has found out, which Clang does not link on
// Windows. Sets count only where the system saves their registers too: bits of XCR0 (Intel's manual, volume 1, 13.2).
inline CpuFeatures cpu_features() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  CpuFeatures found;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return found;
  const bool fma = c >> 12 & 1, xsave = c >> 27 & 1;
  if (!xsave || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
  unsigned saved = 0, high = 0;
  asm("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  const bool wide = (saved & 0x6) == 0x6, wider = (saved & 0xe6) == 0xe6;
  const unsigned f_dq_bw_vl = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
  found.avx2 = fma && wide && (b >> 5 & 1);
  found.avx512 = fma && wider && (b & f_dq_bw_vl) == f_dq_bw_vl;
  found.avx512_bf16 = found.avx512 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
  return found;
}

}  // namespace llmdpd
#endif
