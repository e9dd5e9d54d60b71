// Counter-based noise: Philox4x32-10 (Salmon et al. 2011) and Box-Muller. A draw is a pure function of
// (key, row, draw, action dimension), so it does not depend on batch split, thread count or device.
#pragma once

#include <cstdint>

namespace llmdpd {

constexpr std::uint32_t kSamplerStream = 0;

// Ten rounds over `counter`, in place.
void philox4x32(std::uint32_t counter[4], std::uint64_t key);

// out[0:action_dim]: the standard normals of one row and one draw. counter = (row, draw, block of four dims, stream).
void philox_normal(std::uint64_t key, std::uint32_t row, std::uint32_t draw, int action_dim, float* out);

}  // namespace llmdpd
