// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011): four random words from a counter and a key, without state.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define KL_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define KL_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace kl {

// The last counter word keeps uses of one seed apart; the same numbers as in kernelab/_core/philox.py.
constexpr uint32_t kStreamDropout = 1;

constexpr uint32_t kPhiloxMultipliers[] = {0xD2511F53, 0xCD9E8D57};
constexpr uint32_t kPhiloxWeyl[] = {0x9E3779B9, 0xBB67AE85};

// One round on the counter (c0, c1, c2, c3) with the round's key.
KL_HOST_DEVICE void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0, uint32_t k1) {
  const uint64_t p0 = uint64_t{kPhiloxMultipliers[0]} * c0;
  const uint64_t p1 = uint64_t{kPhiloxMultipliers[1]} * c2;
  c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
  c1 = static_cast<uint32_t>(p1);
  c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
  c3 = static_cast<uint32_t>(p0);
}

// Ten rounds, in place.
KL_HOST_DEVICE void philox(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    philox_round(c0, c1, c2, c3, k0, k1);
    k0 += kPhiloxWeyl[0];
    k1 += kPhiloxWeyl[1];
  }
}

}  // namespace kl
