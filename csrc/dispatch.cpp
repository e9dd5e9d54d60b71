#include "dispatch.h"

#include <atomic>
#include <stdexcept>

namespace llmdpd {

namespace plain {
extern const TileKernels kernels;
}
#ifdef LLMDPD_X86
namespace avx2 {
extern const TileKernels kernels;
}
namespace avx512 {
extern const TileKernels kernels;
}
#endif

namespace {

struct Isa {
  const char* name;
  const TileKernels* kernels;
  bool (*runs)();
};

// Slowest first. The CPU features are those that CMakeLists.txt compiles each object for.
const Isa kIsas[] = {
    {"plain", &plain::kernels, [] { return true; }},
#ifdef LLMDPD_X86
    {"avx2", &avx2::kernels, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
    {"avx512", &avx512::kernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("fma");
     }},
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

const TileKernels& active_kernels() { return *current().kernels; }

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
