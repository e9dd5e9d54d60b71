#include "philox.h"

#include <algorithm>
#include <cmath>

namespace llmdpd {

void philox4x32(std::uint32_t counter[4], std::uint64_t key) {
  std::uint32_t key0 = static_cast<std::uint32_t>(key);
  std::uint32_t key1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = std::uint64_t{0xD2511F53} * counter[0];
    const std::uint64_t product1 = std::uint64_t{0xCD9E8D57} * counter[2];
    counter[0] = static_cast<std::uint32_t>(product1 >> 32) ^ counter[1] ^ key0;
    counter[1] = static_cast<std::uint32_t>(product1);
    counter[2] = static_cast<std::uint32_t>(product0 >> 32) ^ counter[3] ^ key1;
    counter[3] = static_cast<std::uint32_t>(product0);
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
}

void philox_normal(std::uint64_t key, std::uint32_t row, std::uint32_t draw, int action_dim, float* out) {
  constexpr double kTwoPi = 6.283185307179586;
  constexpr double kUnit = 1.0 / (1 << 24);
  for (int first = 0; first < action_dim; first += 4) {
    std::uint32_t bits[4] = {row, draw, static_cast<std::uint32_t>(first / 4), kSamplerStream};
    philox4x32(bits, key);
    float normals[4];
    for (int pair = 0; pair < 2; ++pair) {
      // In double: in float, rounding 2*pi*v alone costs more than the 2e-6 that backends may differ by.
      const double u = ((bits[2 * pair] >> 8) + 1) * kUnit;
      const double angle = kTwoPi * ((bits[2 * pair + 1] >> 8) * kUnit);
      const double radius = std::sqrt(-2.0 * std::log(u));
      normals[2 * pair] = static_cast<float>(radius * std::cos(angle));
      normals[2 * pair + 1] = static_cast<float>(radius * std::sin(angle));
    }
    std::copy(normals, normals + std::min(4, action_dim - first), out + first);
  }
}

}  // namespace llmdpd
