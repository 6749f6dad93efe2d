#include "lora_linear/lora_linear.h"

#include <algorithm>
#include <type_traits>

#include "core/half.h"
#include "core/instruction_set.h"
#include "core/philox.h"
#include "lora_linear/segment.h"

// Vectors as template arguments lose attributes that do not matter there, and are passed only inside inlined functions.
#pragma GCC diagnostic ignored "-Wignored-attributes"
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12: in its own intrinsics

#define KL_BFLOAT16_PAIRS 0

namespace baseline {
#define KL_VECTOR_BYTES 16
#include "lora_linear/kernels.h"
#undef KL_VECTOR_BYTES
}  // namespace baseline

#ifdef KL_X86
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace avx2 {
#define KL_VECTOR_BYTES 32
#include "lora_linear/kernels.h"
#undef KL_VECTOR_BYTES
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
namespace avx512 {
#define KL_VECTOR_BYTES 64
#include "lora_linear/kernels.h"
#undef KL_VECTOR_BYTES
}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16,prefer-vector-width=512")
namespace avx512bf16 {
#undef KL_BFLOAT16_PAIRS
#define KL_BFLOAT16_PAIRS 1
#define KL_VECTOR_BYTES 64
#include "lora_linear/kernels.h"
#undef KL_VECTOR_BYTES
}  // namespace avx512bf16
#pragma GCC pop_options
#endif

#undef KL_BFLOAT16_PAIRS

namespace {

template <typename T>
const kl::Kernels& kernels() {
  static const kl::Kernels chosen = [] {
    switch (kl::instruction_set()) {
#ifdef KL_X86
      case kl::Set::avx512bf16:
        return avx512bf16::kernels_of<T>();
      case kl::Set::avx512:
        return avx512::kernels_of<T>();
      case kl::Set::avx2:
        return avx2::kernels_of<T>();
#endif
      default:
        return baseline::kernels_of<T>();
    }
  }();
  return chosen;
}

void run(const kl::Kernels& kernels, const kl::Forward& g, int threads) {
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (int part = 0; part < threads; ++part) kernels.forward_pack(g, part, threads);
#pragma omp for
    for (int part = 0; part < threads; ++part) kernels.forward(g, part, threads);
  }
}

void run(const kl::Kernels& kernels, const kl::Backward& g, int threads) {
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (int part = 0; part < threads; ++part) kernels.backward_pack(g, part, threads);
#pragma omp for
    for (int part = 0; part < threads; ++part) kernels.backward(g, part, threads);
#pragma omp for
    for (int part = 0; part < threads; ++part) kernels.backward_reduce(g, part, threads);
  }
}

}  // namespace

#define KL_DEFINE_LORA(suffix, type)                                                                                   \
  extern "C" void kl_lora_forward_##suffix(                                                                            \
      const void* x, int64_t x_stride, const void* base, int64_t base_stride, void* y, int64_t y_stride, void* s,      \
      int64_t s_stride, const void* a, const void* b, int64_t rows, int64_t in, int64_t out, int64_t rank,             \
      double scale, int64_t first_row, uint64_t seed, uint32_t threshold, double keep, void* work, int threads) {      \
    const kl::Segment segment{a, b, rows, in, out, rank, scale, first_row, seed, threshold, keep, work};               \
    run(kernels<type>(), kl::Forward{segment, {x, x_stride}, {base, base_stride}, {y, y_stride}, {s, s_stride}},       \
        threads);                                                                                                      \
  }                                                                                                                    \
  extern "C" void kl_lora_backward_##suffix(const void* dy, int64_t dy_stride, const void* x, int64_t x_stride,        \
                                            const void* s, int64_t s_stride, void* dx, int64_t dx_stride, void* da,    \
                                            void* db, const void* a, const void* b, int64_t rows, int64_t in,          \
                                            int64_t out, int64_t rank, double scale, int64_t first_row, uint64_t seed, \
                                            uint32_t threshold, double keep, void* work, int threads) {                \
    const kl::Segment segment{a, b, rows, in, out, rank, scale, first_row, seed, threshold, keep, work};               \
    run(kernels<type>(),                                                                                               \
        kl::Backward{segment, {dy, dy_stride}, {x, x_stride}, {s, s_stride}, {dx, dx_stride}, da, db}, threads);       \
  }

KL_DEFINE_LORA(float32, float)
KL_DEFINE_LORA(float64, double)
KL_DEFINE_LORA(bfloat16, kl::bfloat16)
KL_DEFINE_LORA(float16, _Float16)
