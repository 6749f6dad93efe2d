#include "linear_logprob/linear_logprob.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "core/half.h"
#include "core/instruction_set.h"
#include "core/integer.h"
#include "linear_logprob/head.h"

// Vectors as template arguments lose attributes that do not matter there, and are passed only inside inlined functions.
#pragma GCC diagnostic ignored "-Wignored-attributes"
#pragma GCC diagnostic ignored "-Wpsabi"

#define KL_BFLOAT16_PAIRS 0

namespace logprob::baseline {
#define KL_VECTOR_BYTES 16
#include "linear_logprob/kernels.h"
#undef KL_VECTOR_BYTES
}  // namespace logprob::baseline

#ifdef KL_X86
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace logprob::avx2 {
#define KL_VECTOR_BYTES 32
#include "linear_logprob/kernels.h"
#undef KL_VECTOR_BYTES
}  // namespace logprob::avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
namespace logprob::avx512 {
#define KL_VECTOR_BYTES 64
#include "linear_logprob/kernels.h"
#undef KL_VECTOR_BYTES
}  // namespace logprob::avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16,prefer-vector-width=512")
namespace logprob::avx512bf16 {
#undef KL_BFLOAT16_PAIRS
#define KL_BFLOAT16_PAIRS 1
#define KL_VECTOR_BYTES 64
#include "linear_logprob/kernels.h"
#undef KL_VECTOR_BYTES
}  // namespace logprob::avx512bf16
#pragma GCC pop_options
#endif

#undef KL_BFLOAT16_PAIRS

namespace {

template <typename T>
const kl::logprob::Kernels& kernels() {
  static const kl::logprob::Kernels chosen = [] {
    switch (kl::instruction_set()) {
#ifdef KL_X86
      case kl::Set::avx512bf16:
        return logprob::avx512bf16::kernels_of<T>();
      case kl::Set::avx512:
        return logprob::avx512::kernels_of<T>();
      case kl::Set::avx2:
        return logprob::avx2::kernels_of<T>();
#endif
      default:
        return logprob::baseline::kernels_of<T>();
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

#define KL_DEFINE_LOGPROB(suffix, type)                                                                                \
  extern "C" void kl_linear_logprob_forward_##suffix(                                                                  \
      const void* hidden, int64_t hidden_stride, const void* weight, int64_t weight_stride, const void* bias,          \
      const int64_t* target, int64_t rows, int64_t features, int64_t classes, double temperature, int64_t block,       \
      void* work, int threads, void* logprob, void* lse, void* entropy, void* dlogprob, void* dentropy) {              \
    const kl::logprob::Head head{hidden, hidden_stride, weight,  weight_stride, bias,  target,                         \
                                 rows,   features,      classes, temperature,   block, work};                          \
    run(kernels<type>().forward, kl::logprob::Forward{head, logprob, lse, entropy, dlogprob, dentropy}, threads);      \
  }                                                                                                                    \
  extern "C" void kl_linear_logprob_gradient_##suffix(                                                                 \
      const void* hidden, int64_t hidden_stride, const void* weight, int64_t weight_stride, const void* bias,          \
      const int64_t* target, int64_t rows, int64_t features, int64_t classes, double temperature, int64_t block,       \
      void* work, int threads, const void* lse, const void* entropy, const void* grad_logprob,                         \
      const void* grad_entropy, int64_t first_class, int64_t last_class, void* dz, int64_t dz_stride) {                \
    const kl::logprob::Head head{hidden, hidden_stride, weight,  weight_stride, bias,  target,                         \
                                 rows,   features,      classes, temperature,   block, work};                          \
    run(kernels<type>().gradient,                                                                                      \
        kl::logprob::Gradient{head, lse, entropy, grad_logprob, grad_entropy, first_class, last_class, dz, dz_stride}, \
        threads);                                                                                                      \
  }

KL_DEFINE_LOGPROB(float32, float)
KL_DEFINE_LOGPROB(float64, double)
KL_DEFINE_LOGPROB(bfloat16, kl::bfloat16)
KL_DEFINE_LOGPROB(float16, _Float16)
