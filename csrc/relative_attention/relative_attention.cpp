#include "relative_attention/relative_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "core/half.h"
#include "core/instruction_set.h"
#include "relative_attention/call.h"

// Vectors as template arguments lose attributes that do not matter there, and are passed only inside inlined functions.
#pragma GCC diagnostic ignored "-Wignored-attributes"
#pragma GCC diagnostic ignored "-Wpsabi"

#define KL_BFLOAT16_PAIRS 0

namespace attention::baseline {
#define KL_VECTOR_BYTES 16
#include "relative_attention/kernels.h"
#undef KL_VECTOR_BYTES
}  // namespace attention::baseline

#ifdef KL_X86
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace attention::avx2 {
#define KL_VECTOR_BYTES 32
#include "relative_attention/kernels.h"
#undef KL_VECTOR_BYTES
}  // namespace attention::avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
namespace attention::avx512 {
#define KL_VECTOR_BYTES 64
#include "relative_attention/kernels.h"
#undef KL_VECTOR_BYTES
}  // namespace attention::avx512
#pragma GCC pop_options
#endif

#undef KL_BFLOAT16_PAIRS

namespace {

template <typename T>
const kl::attention::Kernels& kernels() {
  static const kl::attention::Kernels chosen = [] {
    switch (kl::instruction_set()) {
#ifdef KL_X86
      case kl::Set::avx512bf16:
      case kl::Set::avx512:
        return attention::avx512::kernels_of<T>();
      case kl::Set::avx2:
        return attention::avx2::kernels_of<T>();
#endif
      default:
        return attention::baseline::kernels_of<T>();
    }
  }();
  return chosen;
}

template <typename Call>
void run(void (*kernel)(const Call&, int, int), const Call& call, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int part = 0; part < threads; ++part) kernel(call, part, threads);
}

}  // namespace

#define KL_ATTENTION_CALL                       \
  {{query, query_batch, query_head, query_row}, \
   {key, key_batch, key_head, key_row},         \
   {value, value_batch, value_head, value_row}, \
   {query_table, query_table_heads},            \
   {key_table, key_table_heads},                \
   {value_table, value_table_heads},            \
   {bias, bias_heads},                          \
   mask,                                        \
   documents,                                   \
   batch,                                       \
   query_heads,                                 \
   key_heads,                                   \
   queries,                                     \
   keys,                                        \
   features,                                    \
   value_features,                              \
   nearest,                                     \
   distances,                                   \
   causal,                                      \
   content,                                     \
   offset,                                      \
   scale,                                       \
   work}

#define KL_DEFINE_ATTENTION(suffix, type)                                                                          \
  extern "C" void kl_relative_attention_forward_##suffix(KL_ATTENTION_INPUTS, void* out, void* peak, void* mass) { \
    const kl::attention::Forward call{KL_ATTENTION_CALL, out, peak, mass};                                         \
    run<kl::attention::Call>(kernels<type>().pack, call, threads);                                                 \
    run(kernels<type>().forward, call, threads);                                                                   \
  }                                                                                                                \
  extern "C" void kl_relative_attention_backward_##suffix(KL_ATTENTION_INPUTS, KL_ATTENTION_GRADIENTS) {           \
    const kl::attention::Backward call{KL_ATTENTION_CALL,                                                          \
                                       {grad_out, grad_batch, grad_head, grad_row},                                \
                                       out,                                                                        \
                                       peak,                                                                       \
                                       mass,                                                                       \
                                       dquery,                                                                     \
                                       dkey,                                                                       \
                                       dvalue,                                                                     \
                                       dquery_table,                                                               \
                                       dkey_table,                                                                 \
                                       dvalue_table,                                                               \
                                       dbias,                                                                      \
                                       chunks};                                                                    \
    run<kl::attention::Call>(kernels<type>().pack, call, threads);                                                 \
    run(kernels<type>().backward, call, threads);                                                                  \
    run(kernels<type>().reduce, call, threads);                                                                    \
  }

KL_DEFINE_ATTENTION(float32, float)
KL_DEFINE_ATTENTION(float64, double)
KL_DEFINE_ATTENTION(bfloat16, kl::bfloat16)
KL_DEFINE_ATTENTION(float16, _Float16)
