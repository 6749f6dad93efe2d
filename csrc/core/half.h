// bfloat16 storage with float arithmetic. float16 is the compiler's _Float16.
#pragma once

#include <cstdint>
#include <cstring>

namespace kl {

struct bfloat16 {
  uint16_t bits;

  bfloat16() = default;
  // Round to nearest, ties to even; a NaN stays one.
  inline __attribute__((always_inline)) bfloat16(float value) {
    uint32_t u;
    std::memcpy(&u, &value, 4);
    const uint32_t rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
    bits = value != value ? 0x7FC0 : static_cast<uint16_t>(rounded);
  }
  inline __attribute__((always_inline)) operator float() const {
    const uint32_t u = uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &u, 4);
    return value;
  }
};

// The type in which a storage type is computed.
template <typename T>
struct compute {
  using type = float;
};
template <>
struct compute<double> {
  using type = double;
};

}  // namespace kl
