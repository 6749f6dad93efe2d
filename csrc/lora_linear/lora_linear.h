// The adapter's part of lora_linear over one segment of rows: one pass over memory a direction, dropout on the fly.
#pragma once

#include <cstdint>

// Forward: y = base + scale S B^T with S = D(x) A^T; `y` may be `base`. S is stored where `s` is not null.
// Backward: dS = scale dy B;  dx += D(dS A);  da += dS^T D(x);  db += scale dy^T S, each where its pointer is not null;
// `x` is read for da and `s` for db.
//
// x, dx [rows, in]; y, base, dy [rows, out]; s [rows, rank]; a [rank, in] and b [out, rank] contiguous. `*_stride` is
// in elements from row to row. da [rank, in] and db [out, rank] are contiguous, of float (double for float64). D keeps
// an element whose word is at least `threshold` and divides it by `keep` (1: no dropout); the word of (row, column) is
// number column % 4 of Philox with counter (column / 4, row, 0, 1); row 0 is row `first_row` of the whole. `work` has
// room for (threads + 1) R (I + O) numbers of the type of da, where R, I, O are rank, in, out rounded up to multiples
// of 16. The result depends on `threads` in the rounding of da and db alone.
#define KL_DECLARE_LORA(suffix)                                                                                        \
  extern "C" void kl_lora_forward_##suffix(                                                                            \
      const void* x, int64_t x_stride, const void* base, int64_t base_stride, void* y, int64_t y_stride, void* s,      \
      int64_t s_stride, const void* a, const void* b, int64_t rows, int64_t in, int64_t out, int64_t rank,             \
      double scale, int64_t first_row, uint64_t seed, uint32_t threshold, double keep, void* work, int threads);       \
  extern "C" void kl_lora_backward_##suffix(const void* dy, int64_t dy_stride, const void* x, int64_t x_stride,        \
                                            const void* s, int64_t s_stride, void* dx, int64_t dx_stride, void* da,    \
                                            void* db, const void* a, const void* b, int64_t rows, int64_t in,          \
                                            int64_t out, int64_t rank, double scale, int64_t first_row, uint64_t seed, \
                                            uint32_t threshold, double keep, void* work, int threads);

KL_DECLARE_LORA(float32)
KL_DECLARE_LORA(float64)
KL_DECLARE_LORA(bfloat16)
KL_DECLARE_LORA(float16)
