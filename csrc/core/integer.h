// Arithmetic of sizes.
#pragma once

#include <cstdint>

namespace kl {

constexpr int64_t round_up(int64_t size, int64_t to) { return (size + to - 1) / to * to; }
constexpr int64_t round_down(int64_t size, int64_t to) { return size / to * to; }

}  // namespace kl
