#include "dispatch.h"

#include <atomic>
#include <stdexcept>

#include "cpu_features.h"

namespace llmdpd {

// Each object is compiled into a namespace of its own: instruction set and precision.
#define LLMDPD_DECLARE(object) \
  namespace object {           \
  extern const TileKernels kernels; \
  }
LLMDPD_DECLARE(plain_fp32)
LLMDPD_DECLARE(plain_bf16)
#ifdef LLMDPD_X86
LLMDPD_DECLARE(avx2_fp32)
LLMDPD_DECLARE(avx2_bf16)
LLMDPD_DECLARE(avx512_fp32)
LLMDPD_DECLARE(avx512_bf16)
LLMDPD_DECLARE(avx512bf16_bf16)
#endif
#undef LLMDPD_DECLARE
#define LLMDPD_DECLARE_LAYERS(object) \
  namespace object {                  \
  extern const LayerKernels layer_kernels; \
  }
LLMDPD_DECLARE_LAYERS(plain_fp32)
#ifdef LLMDPD_X86
LLMDPD_DECLARE_LAYERS(avx2_fp32)
LLMDPD_DECLARE_LAYERS(avx512_fp32)
#endif
#undef LLMDPD_DECLARE_LAYERS

namespace {

struct Isa {
  const char* name;
  const TileKernels *fp32, *bf16;
  const LayerKernels* layers;
  bool (*runs)();
};

// Slowest first. The CPU features are those that CMakeLists.txt compiles each object for.
const Isa kIsas[] = {
    {"plain", &plain_fp32::kernels, &plain_bf16::kernels, &plain_fp32::layer_kernels, [] { return true; }},
#ifdef LLMDPD_X86
    {"avx2", &avx2_fp32::kernels, &avx2_bf16::kernels, &avx2_fp32::layer_kernels,
     [] { return cpu_features().avx2; }},
    {"avx512", &avx512_fp32::kernels, &avx512_bf16::kernels, &avx512_fp32::layer_kernels,
     [] { return cpu_features().avx512; }},
    {"avx512_bf16", &avx512_fp32::kernels, &avx512bf16_bf16::kernels, &avx512_fp32::layer_kernels,
     [] { return cpu_features().avx512_bf16; }},
#endif
};

const Isa* best() {
  const Isa* found = nullptr;
  for (const Isa& isa : kIsas) {
    if (isa.runs()) found = &isa;
  }
  return found;
}

std::atomic<const Isa*> active{nullptr};

const Isa& current() {
  const Isa* isa = active.load();
  if (!isa) {
    isa = best();
    active.store(isa);
  }
  return *isa;
}

}  // namespace

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas) names.push_back(isa.name);
  return names;
}

std::vector<std::string> runnable_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas) {
    if (isa.runs()) names.push_back(isa.name);
  }
  return names;
}

std::string active_isa() { return current().name; }

const TileKernels& active_kernels(bool bf16) { return bf16 ? *current().bf16 : *current().fp32; }

const LayerKernels& active_layers() { return *current().layers; }

void set_isa(const std::string& name) {
  if (name.empty()) {
    active.store(best());
    return;
  }
  for (const Isa& isa : kIsas) {
    if (name == isa.name && isa.runs()) {
      active.store(&isa);
      return;
    }
  }
  std::string known;
  for (const std::string& runnable : runnable_isas()) known += (known.empty() ? "" : ", ") + runnable;
  throw std::invalid_argument("instruction set '" + name + "' can't run here; these can: " + known);
}

}  // namespace llmdpd
