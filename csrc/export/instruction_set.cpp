#include "instruction_set.h"

namespace llmdpd {

#define LLMDPD_DECLARE(object)             \
  namespace object {                       \
  extern const TileKernels kernels;        \
  extern const LayerKernels layer_kernels; \
  }

#ifdef LLMDPD_PARTS
LLMDPD_DECLARE(plain)
#ifdef __x86_64__
LLMDPD_DECLARE(avx2)
LLMDPD_DECLARE(avx512)
#endif

const InstructionSet& best_instruction_set() {
  static const InstructionSet plain_set{"plain", &plain::kernels, &plain::layer_kernels};
#ifdef __x86_64__
  static const InstructionSet avx2_set{"avx2", &avx2::kernels, &avx2::layer_kernels};
  static const InstructionSet avx512_set{"avx512", &avx512::kernels, &avx512::layer_kernels};
  const bool fma = __builtin_cpu_supports("fma");
  if (fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return avx512_set;
  }
  if (fma && __builtin_cpu_supports("avx2")) return avx2_set;
#endif
  return plain_set;
}
#else
LLMDPD_DECLARE(LLMDPD_ISA)

const InstructionSet& best_instruction_set() {
#if defined(LLMDPD_ISA_avx512)
  static const InstructionSet only{"avx512", &LLMDPD_ISA::kernels, &LLMDPD_ISA::layer_kernels};
#elif defined(LLMDPD_ISA_avx2)
  static const InstructionSet only{"avx2", &LLMDPD_ISA::kernels, &LLMDPD_ISA::layer_kernels};
#else
  static const InstructionSet only{"plain", &LLMDPD_ISA::kernels, &LLMDPD_ISA::layer_kernels};
#endif
  return only;
}
#endif

#undef LLMDPD_DECLARE

}  // namespace llmdpd
