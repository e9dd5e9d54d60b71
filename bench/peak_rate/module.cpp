#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "peak_rate.h"

namespace py = pybind11;

namespace llmdpd {

namespace plain {
extern const PeakLoop peak_loop;
}
#ifdef LLMDPD_X86
namespace avx2 {
extern const PeakLoop peak_loop;
}
namespace avx512 {
extern const PeakLoop peak_loop;
}
namespace avx512bf16 {
extern const PeakLoop peak_loop;
}
#endif

namespace {

using Clock = std::chrono::steady_clock;

struct Candidate {
  const char* isa;
  const char* precision;
  const PeakLoop* loop;
  bool (*runs)();
};

// Slowest first for each precision. The CPU features are those that CMakeLists.txt compiles each object for.
const Candidate kCandidates[] = {
    {"plain", "fp32", &plain::peak_loop, [] { return true; }},
#ifdef LLMDPD_X86
    {"avx2", "fp32", &avx2::peak_loop, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
    {"avx512", "fp32", &avx512::peak_loop, [] { return bool(__builtin_cpu_supports("avx512f")); }},
    {"avx512_bf16", "bf16", &avx512bf16::peak_loop,
     [] { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bf16"); }},
#endif
};

const Candidate* find(const std::string& precision, const std::string& isa) {
  const Candidate* found = nullptr;
  for (const Candidate& candidate : kCandidates) {
    const bool wanted = precision == candidate.precision && (isa.empty() || isa == candidate.isa);
    if (wanted && candidate.runs()) found = &candidate;
  }
  return found;
}

// A thread's operations a second, from the common start until `seconds` are over.
double rate_of_one(const PeakLoop& loop, double seconds) {
  constexpr std::int64_t kRounds = 20000;  // well under a millisecond between two looks at the clock
  static std::atomic<float> sink{0.0f};
  const Clock::time_point start = Clock::now();
  double elapsed = 0.0;
  std::int64_t rounds = 0;
  while (elapsed < seconds) {
    sink.store(loop.run(kRounds), std::memory_order_relaxed);
    rounds += kRounds;
    elapsed = std::chrono::duration<double>(Clock::now() - start).count();
  }
  return loop.operations_a_round * static_cast<double>(rounds) / elapsed;
}

double rate_of_all(const PeakLoop& loop, int threads, double seconds) {
  std::vector<double> rates(static_cast<std::size_t>(threads), 0.0);
  std::atomic<int> waiting{threads};
  const auto work = [&](int index) {
    waiting.fetch_sub(1);
    while (waiting.load() > 0) std::this_thread::yield();
    rates[static_cast<std::size_t>(index)] = rate_of_one(loop, seconds);
  };
  std::vector<std::thread> others;
  try {
    for (int index = 1; index < threads; ++index) others.emplace_back(work, index);
  } catch (...) {
    waiting.store(0);  // else those that did start would wait for ever
    for (std::thread& other : others) other.join();
    throw;
  }
  work(0);
  for (std::thread& other : others) other.join();
  double total = 0.0;
  for (const double rate : rates) total += rate;
  return total;
}

std::optional<double> peak_rate(const std::string& precision, int threads, double seconds, const std::string& isa) {
  if (precision != "fp32" && precision != "bf16") throw std::invalid_argument("precision is fp32 or bf16");
  if (threads < 1 || threads > 4096) throw std::invalid_argument("threads are 1 to 4096");
  if (!(seconds > 0.0) || seconds > 60.0) throw std::invalid_argument("seconds lie above 0, up to 60");
  const Candidate* candidate = find(precision, isa);
  if (!candidate) return std::nullopt;
  py::gil_scoped_release unlocked;
  return rate_of_all(*candidate->loop, threads, seconds);
}

}  // namespace
}  // namespace llmdpd

PYBIND11_MODULE(_peak_rate, module) {
  module.doc() = "The most operations a second that this CPU can do.";
  module.def("peak_rate", &llmdpd::peak_rate, py::arg("precision"), py::arg("threads") = 1, py::arg("seconds") = 0.2,
             py::arg("isa") = "",
             "Operations a second of register-only multiply-adds (bf16: dot products), on `threads` threads at once; "
             "of the widest instruction set, or of `isa`. None where this CPU has no such instruction.");
}
