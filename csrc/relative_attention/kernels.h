// Included once for every instruction set, in its namespace and under its target pragma; KL_VECTOR_BYTES is its
// register. All is computed in float, double for double: what is narrower is widened where it is packed.

// clang-format off: the first is what the others need
#include "core/vector.h"
#include "core/exponential.h"
#include "core/gemm.h"
// clang-format on

using kl::attention::Call, kl::attention::Heads, kl::attention::Layout, kl::attention::Table;
using kl::attention::kBlockStride, kl::attention::kKeys, kl::attention::kPad, kl::attention::kRows,
    kl::attention::kStripStride;

// clang-format off: the first is what the others need
#include "relative_attention/scores.h"
#include "relative_attention/backward.h"
#include "relative_attention/forward.h"
// clang-format on

template <typename T>
kl::attention::Kernels kernels_of() {
  return {Scores<T>::pack_tables, Forward<T>::run, Backward<T>::run, Backward<T>::reduce};
}
