// Counter-based random numbers, the same as engine/model/philox.py: Philox4x32-10 of Salmon, Moraes,
// Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
#pragma once

#include <cstdint>

namespace baton {

// The numbers of one row, each a function of (seed, stream, position) and its place.
class Philox {
 public:
  Philox(uint64_t seed, uint32_t stream, uint32_t position)
      : seed_(seed), stream_(stream), position_(position) {}

  // Words 4 * lane to 4 * (lane + lanes) - 1.
  void fill(uint32_t lane, uint32_t lanes, uint32_t* to) const {
    for (uint32_t end = lane + lanes; lane < end; lane++, to += 4) fill_lane(lane, to);
  }

 private:
  void fill_lane(uint32_t lane, uint32_t* to) const {
    uint32_t c0 = lane, c1 = stream_, c2 = position_, c3 = 0;
    uint32_t k0 = static_cast<uint32_t>(seed_), k1 = static_cast<uint32_t>(seed_ >> 32);
    for (int round = 0; round < 10; round++) {
      uint64_t first = uint64_t{c0} * 0xD2511F53u, second = uint64_t{c2} * 0xCD9E8D57u;
      c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
      c1 = static_cast<uint32_t>(second);
      c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
      c3 = static_cast<uint32_t>(first);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    to[0] = c0, to[1] = c1, to[2] = c2, to[3] = c3;
  }

  uint64_t seed_;
  uint32_t stream_, position_;
};

}  // namespace baton
