#include "window_mean/window_sum.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "core/half.h"
#include "core/instruction_set.h"
#include "window_mean/call.h"

// Vectors as template arguments lose attributes that do not matter there, and are passed only inside inlined functions.
#pragma GCC diagnostic ignored "-Wignored-attributes"
#pragma GCC diagnostic ignored "-Wpsabi"

#define KL_BFLOAT16_PAIRS 0

namespace window::baseline {
#define KL_VECTOR_BYTES 16
#include "window_mean/kernels.h"
#undef KL_VECTOR_BYTES
}  // namespace window::baseline

#ifdef KL_X86
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace window::avx2 {
#define KL_VECTOR_BYTES 32
#include "window_mean/kernels.h"
#undef KL_VECTOR_BYTES
}  // namespace window::avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
namespace window::avx512 {
#define KL_VECTOR_BYTES 64
#include "window_mean/kernels.h"
#undef KL_VECTOR_BYTES
}  // namespace window::avx512
#pragma GCC pop_options
#endif

#undef KL_BFLOAT16_PAIRS

namespace {

using Kernel = void (*)(const kl::window::Call&, int part, int parts);

template <typename T>
Kernel kernel() {
  static const Kernel chosen = [] {
    switch (kl::instruction_set()) {
#ifdef KL_X86
      case kl::Set::avx512bf16:
      case kl::Set::avx512:
        return window::avx512::WindowSum<T>::run;
      case kl::Set::avx2:
        return window::avx2::WindowSum<T>::run;
#endif
      default:
        return window::baseline::WindowSum<T>::run;
    }
  }();
  return chosen;
}

void run(Kernel kernel, const kl::window::Call& call, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int part = 0; part < threads; ++part) kernel(call, part, threads);
}

}  // namespace

#define KL_DEFINE_WINDOW_SUM(suffix, type)                                                                     \
  extern "C" void kl_window_sum_##suffix(                                                                      \
      const void* x, int64_t x_batch, int64_t x_head, int64_t x_row, const void* before, int64_t before_batch, \
      int64_t before_head, const void* after, int64_t after_batch, int64_t after_head, const int64_t* reach,   \
      const int32_t* ends, int64_t batch, int64_t heads, int64_t rows, int64_t features, void* work,           \
      int64_t work_rows, int threads, void* y) {                                                               \
    const kl::window::Call call{x,     x_batch,     x_head,     x_row,     before, before_batch, before_head,  \
                                after, after_batch, after_head, reach,     ends,   batch,        heads,        \
                                rows,  features,    work,       work_rows, y};                                 \
    run(kernel<type>(), call, threads);                                                                        \
  }

KL_DEFINE_WINDOW_SUM(float32, float)
KL_DEFINE_WINDOW_SUM(float64, double)
KL_DEFINE_WINDOW_SUM(bfloat16, kl::bfloat16)
KL_DEFINE_WINDOW_SUM(float16, _Float16)
