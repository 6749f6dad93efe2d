// Included once for every instruction set, after core/vector.h.
//
// C[i, j] += sum_p A[i, p] B[p, j]: B's rows are read as vectors, A's units are broadcast.

using kl::round_up;

// C [kHeight, kVectors kLanes] += A B, or = where kFresh. Unit (i, p) of A stands at i * a_step + p, or at i + p *
// a_step where its rows are adjacent; a_step is in bytes, the other strides in elements and units. It is summed from
// zero and then added, so that long sums round as short ones.
template <typename M, int kHeight, int kVectors, bool kFresh, bool kAdjacent>
KL_INLINE void tile(typename M::Sum* c, int64_t c_stride, const char* a, int64_t a_step, const typename M::Unit* b,
                    int64_t b_stride, int64_t depth) {
  using Unit = typename M::Unit;
  constexpr int kLanes = KL_VECTOR_BYTES / sizeof(typename M::Sum);
  constexpr int64_t kUnit = sizeof(Unit);
  vec<typename M::Sum> sum[kHeight][kVectors] = {};
  for (int64_t p = 0; p < depth; ++p) {
    vec<Unit> row[kVectors];
#pragma GCC unroll 4
    for (int w = 0; w < kVectors; ++w) row[w] = load(b + p * b_stride + w * kLanes);
    const char* column = a + p * (kAdjacent ? a_step : kUnit);
#pragma GCC unroll 16
    for (int i = 0; i < kHeight; ++i) {
      Unit unit;
      std::memcpy(&unit, column + i * (kAdjacent ? kUnit : a_step), sizeof(Unit));
#pragma GCC unroll 4
      for (int w = 0; w < kVectors; ++w) sum[i][w] = M::multiply_add(sum[i][w], unit, row[w]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kHeight; ++i)
#pragma GCC unroll 4
    for (int w = 0; w < kVectors; ++w) {
      auto* to = c + i * c_stride + w * kLanes;
      store(to, kFresh ? sum[i][w] : load(to) + sum[i][w]);
    }
}

// C [rows, columns] += A B, or = where kFresh; columns are a multiple of the lanes, rows are rounded up to one of 4.
template <bool kFresh, bool kAdjacent, typename Sum>
void product(Sum* c, int64_t c_stride, const Sum* a, int64_t a_stride, const Sum* b, int64_t b_stride, int64_t rows,
             int64_t columns, int64_t depth) {
  constexpr int kLanes = KL_VECTOR_BYTES / sizeof(Sum), kHeight = KL_VECTOR_BYTES == 64 ? 8 : 4;
  const int64_t a_step = a_stride * sizeof(Sum);
  const auto strip = [&](auto vectors, int64_t j) {
    constexpr int kVectors = decltype(vectors)::value;
    const auto block = [&](auto height, int64_t i) {
      const char* from = reinterpret_cast<const char*>(a + (kAdjacent ? i : i * a_stride));
      tile<Plain<Sum>, decltype(height)::value, kVectors, kFresh, kAdjacent>(c + i * c_stride + j, c_stride, from,
                                                                             a_step, b + j, b_stride, depth);
    };
    int64_t i = 0;
    for (; i + 4 < rows; i += kHeight) block(std::integral_constant<int, kHeight>{}, i);
    if (i < rows) block(std::integral_constant<int, 4>{}, i);
  };
  for (int64_t j = 0, left; (left = (columns - j) / kLanes) > 0;) {
    // Two strips of two vectors take less time than one of three and one of a single vector.
    const int64_t vectors = left == 4 ? 2 : std::min<int64_t>(3, left);
    if (vectors == 3)
      strip(std::integral_constant<int, 3>{}, j);
    else if (vectors == 2)
      strip(std::integral_constant<int, 2>{}, j);
    else
      strip(std::integral_constant<int, 1>{}, j);
    j += vectors * kLanes;
  }
}
