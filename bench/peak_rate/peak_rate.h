// How many floating-point operations a core of this machine can do in a second, measured: multiply-adds whose operands
// never leave the registers. It is the limit that the benchmarks draw.
#pragma once

#include <cstdint>

namespace llmdpd {

// What an instruction set's object offers. `run` does `rounds` rounds of independent multiply-adds and returns a number
// that depends on all of them; a multiply-add counts as two operations.
struct PeakLoop {
  double operations_a_round;
  float (*run)(std::int64_t rounds);
};

}  // namespace llmdpd
