// Dropout of a matrix whose mask is a function of (seed, row, column): recomputed wherever it is needed, never stored.
#pragma once

#include <cstdint>

// destination = D(source), or += where `accumulate`: D zeroes the elements whose word is below `threshold` and divides
// the others by `keep`. The word of (row, column) is number column % 4 of Philox with counter (column / 4, row, 0, 1).
// Both matrices are [rows, columns] with `*_stride` elements from row to row; row 0 is row `first_row` of the whole.
#define KL_DECLARE_DROPOUT(suffix)                                                                                  \
  extern "C" void kl_dropout_##suffix(const void* source, int64_t source_stride, void* destination,                 \
                                      int64_t destination_stride, int64_t rows, int64_t columns, int64_t first_row, \
                                      uint64_t seed, uint32_t threshold, double keep, bool accumulate);

KL_DECLARE_DROPOUT(float32)
KL_DECLARE_DROPOUT(float64)
KL_DECLARE_DROPOUT(bfloat16)
KL_DECLARE_DROPOUT(float16)
