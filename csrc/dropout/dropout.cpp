#include "dropout/dropout.h"

#include <algorithm>

#include "core/dispatch.h"
#include "core/half.h"
#include "core/philox.h"

namespace {

constexpr int kLanes = 16;            // counters at once: one AVX-512 register a word
constexpr int kColumns = 4 * kLanes;  // each counter serves four columns
constexpr int64_t kSerial = 1 << 15;  // elements below which threads cost more than they save

// The words of columns [first, first + kColumns) of one row, in column order.
inline __attribute__((always_inline)) void words_of(uint32_t words[kColumns], int64_t first, int64_t row,
                                                    uint64_t seed) {
  uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    c0[lane] = static_cast<uint32_t>(first / 4 + lane);
    c1[lane] = static_cast<uint32_t>(row);
    c2[lane] = 0;
    c3[lane] = kl::kStreamDropout;
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int lane = 0; lane < kLanes; ++lane) kl::philox_round(c0[lane], c1[lane], c2[lane], c3[lane], k0, k1);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    words[4 * lane] = c0[lane];
    words[4 * lane + 1] = c1[lane];
    words[4 * lane + 2] = c2[lane];
    words[4 * lane + 3] = c3[lane];
  }
}

template <typename T>
inline __attribute__((always_inline)) void dropout(const void* source, int64_t source_stride, void* destination,
                                                   int64_t destination_stride, int64_t rows, int64_t columns,
                                                   int64_t first_row, uint64_t seed, uint32_t threshold, double keep,
                                                   bool accumulate) {
  using C = typename kl::compute<T>::type;
  const C divisor = static_cast<C>(keep);
#pragma omp parallel for if (rows * columns > kSerial)
  for (int64_t row = 0; row < rows; ++row) {
    const T* from = static_cast<const T*>(source) + row * source_stride;
    T* to = static_cast<T*>(destination) + row * destination_stride;
    for (int64_t first = 0; first < columns; first += kColumns) {
      uint32_t words[kColumns];
      words_of(words, first, first_row + row, seed);
      const int count = static_cast<int>(std::min<int64_t>(kColumns, columns - first));
      for (int j = 0; j < count; ++j) {
        const C kept = words[j] >= threshold ? static_cast<C>(from[first + j]) : C{0};
        const C value = kept / divisor;
        to[first + j] = static_cast<T>(accumulate ? static_cast<C>(to[first + j]) + value : value);
      }
    }
  }
}

}  // namespace

#define KL_DEFINE_DROPOUT(suffix, type)                                                                              \
  extern "C" KL_TARGET_CLONES void kl_dropout_##suffix(                                                              \
      const void* source, int64_t source_stride, void* destination, int64_t destination_stride, int64_t rows,        \
      int64_t columns, int64_t first_row, uint64_t seed, uint32_t threshold, double keep, bool accumulate) {         \
    dropout<type>(source, source_stride, destination, destination_stride, rows, columns, first_row, seed, threshold, \
                  keep, accumulate);                                                                                 \
  }

KL_DEFINE_DROPOUT(float32, float)
KL_DEFINE_DROPOUT(float64, double)
KL_DEFINE_DROPOUT(bfloat16, kl::bfloat16)
KL_DEFINE_DROPOUT(float16, _Float16)
