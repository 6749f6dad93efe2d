// Weighted sums over a window of fixed width around every row, in time that does not depend on the width.
#pragma once

#include <cstdint>

// y[b, h, i] = after[b, h, i] sum_{j = i - back[h]}^{i + ahead[h]} before[b, h, j] x[b, h, j], over the rows j that
// exist and belong to the document of i.
//
// x [batch, heads, rows, features], `x_*` its strides in elements, features contiguous; y the same, contiguous. before
// and after are float, double for float64, contiguous in the rows; null is 1, and a row whose `before` is 0 is not
// read. reach [2, heads]: back, then ahead, none negative or above rows. ends [rows]: the row after the last of each
// row's document; null: all rows are one document. `work` has room for threads 64 work_rows numbers of that type, where
// work_rows is at least back + ahead + 1 of every head whose back + 1 is less than rows.
//
// No sum is a difference of sums: what has left a window, however large, leaves nothing behind.
#define KL_DECLARE_WINDOW_SUM(suffix)                                                                          \
  extern "C" void kl_window_sum_##suffix(                                                                      \
      const void* x, int64_t x_batch, int64_t x_head, int64_t x_row, const void* before, int64_t before_batch, \
      int64_t before_head, const void* after, int64_t after_batch, int64_t after_head, const int64_t* reach,   \
      const int32_t* ends, int64_t batch, int64_t heads, int64_t rows, int64_t features, void* work,           \
      int64_t work_rows, int threads, void* y);

KL_DECLARE_WINDOW_SUM(float32)
KL_DECLARE_WINDOW_SUM(float64)
KL_DECLARE_WINDOW_SUM(bfloat16)
KL_DECLARE_WINDOW_SUM(float16)
