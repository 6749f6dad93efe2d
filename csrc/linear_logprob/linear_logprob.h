// Log-probability of a target under the softmax of a linear layer, and what its backward needs. No logit outlives its
// tile.
#pragma once

#include <cstdint>

// z = (hidden weight^T + bias) / temperature of every row, lse = log sum exp z.
//
// hidden [rows, features], weight [classes, features]; `*_stride` is in elements from row to row. bias [classes] may be
// null; target [rows] is in 0..classes-1. What is a number a row is float, double for float64. `block` rows, a multiple
// of 16, are in work at once in each of `threads` threads. `work` has room for threads (block (3 features + 512) +
// 2^15) numbers of that type. A row's results depend on no other row, nor on `block` or `threads`.
//
// Forward: logprob = z[target] - lse, and where their pointers are not null entropy, dlogprob = d logprob / d hidden
// and dentropy = d entropy / d hidden; both are [rows, features] and contiguous.
//
// Gradient: dz[v, m] [last_class - first_class, dz_stride] is the derivative of sum(grad_logprob logprob + grad_entropy
// entropy) by the logits before the temperature, of the classes from first_class on. It is of the type of hidden, float
// for float16. grad_entropy and entropy may be null.
#define KL_DECLARE_LOGPROB(suffix)                                                                               \
  extern "C" void kl_linear_logprob_forward_##suffix(                                                            \
      const void* hidden, int64_t hidden_stride, const void* weight, int64_t weight_stride, const void* bias,    \
      const int64_t* target, int64_t rows, int64_t features, int64_t classes, double temperature, int64_t block, \
      void* work, int threads, void* logprob, void* lse, void* entropy, void* dlogprob, void* dentropy);         \
  extern "C" void kl_linear_logprob_gradient_##suffix(                                                           \
      const void* hidden, int64_t hidden_stride, const void* weight, int64_t weight_stride, const void* bias,    \
      const int64_t* target, int64_t rows, int64_t features, int64_t classes, double temperature, int64_t block, \
      void* work, int threads, const void* lse, const void* entropy, const void* grad_logprob,                   \
      const void* grad_entropy, int64_t first_class, int64_t last_class, void* dz, int64_t dz_stride);

KL_DECLARE_LOGPROB(float32)
KL_DECLARE_LOGPROB(float64)
KL_DECLARE_LOGPROB(bfloat16)
KL_DECLARE_LOGPROB(float16)
