// Included once for every instruction set, in its namespace and under its target pragma; KL_VECTOR_BYTES is its
// register.
//
// All six products are C[i, j] += sum_p A[i, p] B[p, j] on blocks that stay in the first-level cache. B's rows are read
// as vectors and A's units are broadcast.

#include "core/vector.h"

constexpr int kRows = 32;              // of x and dy in work at once; a multiple of kPad
constexpr int kPanelBytes = 512;       // of a row of x and dy in work at once
constexpr int kRankStride = 256 + 16;  // the largest rank, and no power of two: rows would share cache sets

// One tile of C in registers. It is summed from zero and then added, so that long sums round as short ones.
template <typename M, int kHeight, int kWidth, bool kFresh, int kRowStep, int kDepthStep>
KL_INLINE void tile(typename M::Sum* c, int64_t c_stride, const typename M::Unit* a, const typename M::Unit* b,
                    int64_t b_stride, int64_t depth) {
  using V = vec<typename M::Sum>;
  using U = vec<typename M::Unit>;
  typedef typename M::Unit Unit __attribute__((may_alias));
  const Unit* units = a;  // which may lie there as elements
  constexpr int kLanes = KL_VECTOR_BYTES / sizeof(typename M::Sum);
  V sum[kHeight][kWidth] = {};
  for (int64_t p = 0; p < depth; ++p) {
    U row[kWidth];
#pragma GCC unroll 4
    for (int w = 0; w < kWidth; ++w) row[w] = *reinterpret_cast<const U*>(b + p * b_stride + w * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kHeight; ++i)
#pragma GCC unroll 4
      for (int w = 0; w < kWidth; ++w)
        sum[i][w] = M::multiply_add(sum[i][w], units[i * kRowStep + p * kDepthStep], row[w]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kHeight; ++i)
#pragma GCC unroll 4
    for (int w = 0; w < kWidth; ++w) {
      V* target = reinterpret_cast<V*>(c + i * c_stride + w * kLanes);
      *target = kFresh ? sum[i][w] : *target + sum[i][w];
    }
}

// C [rows, columns] += A B, or = where kFresh; rows and columns are multiples of kPad.
template <typename M, bool kFresh, int kRowStep, int kDepthStep>
KL_INLINE void product(typename M::Sum* c, int64_t c_stride, const typename M::Unit* a, const typename M::Unit* b,
                       int64_t b_stride, int64_t rows, int64_t columns, int64_t depth) {
  constexpr int kLanes = KL_VECTOR_BYTES / sizeof(typename M::Sum);
  constexpr int kHeight = KL_VECTOR_BYTES == 64 ? 8 : 4;  // 24 of 32 registers, 12 of 16
  for (int64_t j = 0; j < columns;) {
    const int64_t width = std::min<int64_t>(3, (columns - j) / kLanes);
    const int64_t height = width == 1 ? 2 * kHeight : kHeight;
    for (int64_t i = 0; i < rows; i += height) {
      auto* c_tile = c + i * c_stride + j;
      if (width == 3)
        tile<M, kHeight, 3, kFresh, kRowStep, kDepthStep>(c_tile, c_stride, a + i * kRowStep, b + j, b_stride, depth);
      else if (width == 2)
        tile<M, kHeight, 2, kFresh, kRowStep, kDepthStep>(c_tile, c_stride, a + i * kRowStep, b + j, b_stride, depth);
      else
        tile<M, 2 * kHeight, 1, kFresh, kRowStep, kDepthStep>(c_tile, c_stride, a + i * kRowStep, b + j, b_stride,
                                                              depth);
    }
    j += width * kLanes;
  }
}

// Products of the even 32-bit lanes with a constant, as 64-bit lanes.
KL_INLINE vec<uint64_t> multiply_even(vec<uint64_t> a, uint32_t b) {
#if defined(__x86_64__) && KL_VECTOR_BYTES == 64
  return (vec<uint64_t>)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi32(static_cast<int>(b)));
#elif defined(__x86_64__) && KL_VECTOR_BYTES == 32
  return (vec<uint64_t>)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi32(static_cast<int>(b)));
#elif defined(__x86_64__)
  return (vec<uint64_t>)_mm_mul_epu32((__m128i)a, _mm_set1_epi32(static_cast<int>(b)));
#else
  return (a & 0xFFFFFFFF) * uint64_t{b};
#endif
}

struct Product {
  vec<uint32_t> low, high;
};

KL_INLINE Product multiply(vec<uint32_t> a, uint32_t b) {
  constexpr uint64_t kLow = 0xFFFFFFFF;
  const vec<uint64_t> even = multiply_even((vec<uint64_t>)a, b), odd = multiply_even((vec<uint64_t>)a >> 32, b);
  return {(vec<uint32_t>)((even & kLow) | (odd << 32)), (vec<uint32_t>)((even >> 32) | (odd & ~kLow))};
}

// The factors of D, 0 or 1 / keep, of columns [column, column + kColumns) of one row. kColumns: a multiple of 64.
template <int kColumns, typename C>
KL_INLINE void factors(C* factor, int64_t row, int64_t column, const kl::Segment& g) {
  constexpr int kLanes = KL_VECTOR_BYTES / 4;
  const C kept = static_cast<C>(1 / g.keep);
  vec<uint32_t> lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int first = 0; first < kColumns; first += 4 * kLanes) {
    vec<uint32_t> c0 = lane + static_cast<uint32_t>((column + first) / 4),
                  c1 = vec<uint32_t>{} + static_cast<uint32_t>(row);
    vec<uint32_t> c2{}, c3 = vec<uint32_t>{} + kl::kStreamDropout;
    uint32_t k0 = static_cast<uint32_t>(g.seed), k1 = static_cast<uint32_t>(g.seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const Product p0 = multiply(c0, kl::kPhiloxMultipliers[0]), p1 = multiply(c2, kl::kPhiloxMultipliers[1]);
      c0 = p1.high ^ c1 ^ k0;
      c2 = p0.high ^ c3 ^ k1;
      c1 = p1.low;
      c3 = p0.low;
      k0 += kl::kPhiloxWeyl[0];
      k1 += kl::kPhiloxWeyl[1];
    }
    const vec<uint32_t> even0 = interleave<0>(c0, c2), odd0 = interleave<0>(c1, c3);
    const vec<uint32_t> even1 = interleave<1>(c0, c2), odd1 = interleave<1>(c1, c3);
    alignas(64) uint32_t words[4 * kLanes];
    store(words, interleave<0>(even0, odd0));
    store(words + kLanes, interleave<1>(even0, odd0));
    store(words + 2 * kLanes, interleave<0>(even1, odd1));
    store(words + 3 * kLanes, interleave<1>(even1, odd1));
    for (int j = 0; j < 4 * kLanes; ++j) factor[first + j] = words[j] >= g.threshold ? kept : C{0};
  }
}

template <typename T, typename M>
struct Adapter {
  using Element = typename M::Element;
  using Sum = typename M::Sum;
  using Unit = typename M::Unit;
  static constexpr int kDepth = M::kDepth;
  static constexpr int kColumns = kPanelBytes / sizeof(Element);

  struct Scratch {
    alignas(64) Element panel[kRows][kColumns];
    alignas(64) Element paired[kDepth == 1 ? 1 : kRows][kColumns];
    alignas(64) Sum product[kRows][kColumns];
    alignas(64) Sum factor[kRows][kColumns];
    alignas(64) Sum sums[kRows][kRankStride];
    alignas(64) Element narrow[kRows][kRankStride];
    alignas(64) Element narrow_paired[kDepth == 1 ? 1 : kRows][kRankStride];
  };

  static Unit* units(void* elements) { return static_cast<Unit*>(elements); }

  // Where the packed factors and the sums of each part lie in `work`.
  struct Layout {
    Unit *a, *b;
    int64_t in, out, rank;
    Sum *da, *db;  // of the part

    Layout(const kl::Segment& g, int part = 0)
        : in(kl::padded(g.in)), out(kl::padded(g.out)), rank(kl::padded(g.rank)) {
      Sum* work = static_cast<Sum*>(g.work);
      a = reinterpret_cast<Unit*>(work);
      b = reinterpret_cast<Unit*>(work + in * rank);
      da = work + (in + out) * rank * (1 + part);
      db = da + in * rank;
    }
  };

  // to[p, j] = the unit of from(p kDepth..., j), zero outside; this part's share of the units.
  static KL_INLINE void pack(Unit* to, int64_t to_stride, const void* from_data, int64_t depth_step,
                             int64_t column_step, int64_t depth, int64_t columns, int part, int parts) {
    const T* from = static_cast<const T*>(from_data);
    const int64_t units = kl::padded(depth) / kDepth;
    // Strips of kPad columns, whose cache lines outlast a walk along either dimension.
    for (int64_t first = 0; first < to_stride; first += kl::kPad)
      for (int64_t p = units * part / parts; p < units * (part + 1) / parts; ++p)
        for (int d = 0; d < kDepth; ++d) {
          const int64_t source = p * kDepth + d;
          Element* strip = reinterpret_cast<Element*>(to + p * to_stride + first);
          const T* column = from + source * depth_step + first * column_step;
          const int64_t count = source < depth ? std::clamp<int64_t>(columns - first, 0, kl::kPad) : 0;
          for (int64_t j = 0; j < count; ++j)
            strip[j * kDepth + d] = static_cast<Element>(static_cast<Sum>(column[j * column_step]));
          for (int64_t j = count; j < kl::kPad; ++j) strip[j * kDepth + d] = Element(Sum{0});
        }
  }

  // memcpy, which the compiler would turn into a string instruction: slow for so few bytes.
  static KL_INLINE void copy(T* to, const T* from, int64_t count) {
    constexpr int kWidth = KL_VECTOR_BYTES / sizeof(T);
    using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, T>;
    int64_t j = 0;
    for (; j + kWidth <= count; j += kWidth)
      *reinterpret_cast<vec<Bits>*>(to + j) = *reinterpret_cast<const vec<Bits>*>(from + j);
    for (; j < count; ++j) to[j] = from[j];
  }

  // Fetches a row of the next panel, since the hardware does not foresee the jump from row to row.
  static KL_INLINE void prefetch_next(const T* row, int64_t stride, int64_t column, int64_t size) {
    const T* next = row + (column + kColumns < size ? kColumns : kRows * stride - column);
    for (int j = 0; j < kColumns; j += 64 / sizeof(T)) __builtin_prefetch(next + j);
  }

  // A panel of a matrix, times the factors where given, with zeros up to multiples of kPad.
  static KL_INLINE void load(Element* panel, int64_t panel_stride, const kl::Input& from, int64_t size, int64_t row,
                             int64_t column, int64_t rows, int64_t columns, const Sum* factor) {
    const int64_t width = kl::padded(columns);
    for (int64_t i = 0; i < rows; ++i) {
      const T* source = static_cast<const T*>(from.data) + (row + i) * from.stride + column;
      Element* to = panel + i * panel_stride;
      prefetch_next(source, from.stride, column, size);
      if (factor != nullptr)
        for (int64_t j = 0; j < columns; ++j)
          to[j] = static_cast<Element>(static_cast<Sum>(source[j]) * factor[i * kColumns + j]);
      else if constexpr (std::is_same_v<T, Element>)
        copy(to, source, columns);
      else
        for (int64_t j = 0; j < columns; ++j) to[j] = static_cast<Element>(static_cast<Sum>(source[j]));
      for (int64_t j = columns; j < width; ++j) to[j] = Element(Sum{0});
    }
    for (int64_t i = rows; i < kl::padded(rows); ++i)
      for (int64_t j = 0; j < width; ++j) panel[i * panel_stride + j] = Element(Sum{0});
  }

  // Units along the rows instead of along the columns.
  static KL_INLINE const Unit* paired(Element* panel, Element* buffer, int64_t stride, int64_t rows, int64_t columns) {
    if constexpr (kDepth == 1) return units(panel);
    constexpr int kLanes = KL_VECTOR_BYTES / 2;
    for (int64_t i = 0; i < kl::padded(rows); i += 2)
      for (int64_t j = 0; j < kl::padded(columns); j += kLanes) {
        const auto first = *reinterpret_cast<vec<uint16_t>*>(panel + i * stride + j);
        const auto second = *reinterpret_cast<vec<uint16_t>*>(panel + (i + 1) * stride + j);
        auto* to = reinterpret_cast<vec<uint16_t>*>(buffer + i * stride + 2 * j);
        to[0] = interleave<0>(first, second);
        to[1] = interleave<1>(first, second);
      }
    return units(buffer);
  }

  // to = from + scale * product (* factor)
  static KL_INLINE void store(const kl::Output& to, const kl::Input& from, int64_t size, int64_t row, int64_t column,
                              int64_t rows, int64_t columns, const Sum* product, Sum scale, const Sum* factor) {
    for (int64_t i = 0; i < rows; ++i) {
      const T* source = static_cast<const T*>(from.data) + (row + i) * from.stride + column;
      T* target = static_cast<T*>(to.data) + (row + i) * to.stride + column;
      prefetch_next(source, from.stride, column, size);
      const Sum* p = product + i * kColumns;
      if (factor != nullptr)
#pragma GCC ivdep
        for (int64_t j = 0; j < columns; ++j)
          target[j] = static_cast<T>(static_cast<Sum>(source[j]) + scale * p[j] * factor[i * kColumns + j]);
      else
#pragma GCC ivdep
        for (int64_t j = 0; j < columns; ++j) target[j] = static_cast<T>(static_cast<Sum>(source[j]) + scale * p[j]);
    }
  }

  static const Sum* make_factors(Scratch& scratch, const kl::Segment& g, int64_t row, int64_t column, int64_t rows) {
    if (g.keep == 1) return nullptr;
    for (int64_t i = 0; i < rows; ++i) factors<kColumns>(scratch.factor[i], g.first_row + row + i, column, g);
    return scratch.factor[0];
  }

  static void narrow(Scratch& scratch, int64_t rows, int64_t rank, Sum scale) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < rank; ++j) scratch.narrow[i][j] = static_cast<Element>(scale * scratch.sums[i][j]);
  }

  static void clear(Scratch& scratch, int64_t rows, int64_t rank) {
    for (int64_t i = 0; i < rows; ++i) std::fill_n(scratch.sums[i], rank, Sum{0});
  }

  static int64_t first_row(const kl::Segment& g, int part, int parts) {
    const int64_t blocks = (g.rows + kRows - 1) / kRows;
    return std::min(g.rows, blocks * part / parts * kRows);
  }

  static void forward_pack(const kl::Forward& g, int part, int parts) {
    const Layout work(g);
    pack(work.a, work.rank, g.a, 1, g.in, g.in, g.rank, part, parts);
    pack(work.b, work.out, g.b, 1, g.rank, g.rank, g.out, part, parts);
  }

  static void forward(const kl::Forward& g, int part, int parts) {
    const Layout work(g);
    Scratch scratch;
    const int64_t last = first_row(g, part + 1, parts);
    for (int64_t row = first_row(g, part, parts); row < last; row += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, last - row), height = kl::padded(rows);
      clear(scratch, height, work.rank);
      for (int64_t column = 0; column < g.in; column += kColumns) {
        const int64_t columns = std::min<int64_t>(kColumns, g.in - column);
        const Sum* factor = make_factors(scratch, g, row, column, rows);
        load(scratch.panel[0], kColumns, g.x, g.in, row, column, rows, columns, factor);
        product<M, false, kColumns / kDepth, 1>(scratch.sums[0], kRankStride, units(scratch.panel),
                                                work.a + column / kDepth * work.rank, work.rank, height, work.rank,
                                                (columns + kDepth - 1) / kDepth);
      }
      narrow(scratch, height, work.rank, 1);
      if (g.s.data != nullptr)
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < g.rank; ++j)
            static_cast<T*>(g.s.data)[(row + i) * g.s.stride + j] = static_cast<T>(scratch.sums[i][j]);
      for (int64_t column = 0; column < g.out; column += kColumns) {
        const int64_t columns = std::min<int64_t>(kColumns, g.out - column);
        product<M, true, kRankStride / kDepth, 1>(scratch.product[0], kColumns, units(scratch.narrow), work.b + column,
                                                  work.out, height, kl::padded(columns),
                                                  (g.rank + kDepth - 1) / kDepth);
        store(g.y, g.base, g.out, row, column, rows, columns, scratch.product[0], static_cast<Sum>(g.scale), nullptr);
      }
    }
  }

  static void backward_pack(const kl::Backward& g, int part, int parts) {
    const Layout work(g);
    pack(work.a, work.in, g.a, g.in, 1, g.rank, g.in, part, parts);
    pack(work.b, work.rank, g.b, g.rank, 1, g.out, g.rank, part, parts);
  }

  static void backward(const kl::Backward& g, int part, int parts) {
    const Layout work(g, part);
    Scratch scratch;
    if (g.da != nullptr) std::fill_n(work.da, work.in * work.rank, Sum{0});
    if (g.db != nullptr) std::fill_n(work.db, work.out * work.rank, Sum{0});
    const bool need_ds = g.da != nullptr || g.dx.data != nullptr;
    const int64_t last = first_row(g, part + 1, parts);
    for (int64_t row = first_row(g, part, parts); row < last; row += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, last - row), height = kl::padded(rows);
      clear(scratch, height, work.rank);
      const Unit* s = nullptr;
      if (g.db != nullptr) {
        load(scratch.narrow[0], kRankStride, g.s, g.rank, row, 0, rows, g.rank, nullptr);
        s = paired(scratch.narrow[0], scratch.narrow_paired[0], kRankStride, rows, g.rank);
      }
      for (int64_t column = 0; column < g.out; column += kColumns) {
        const int64_t columns = std::min<int64_t>(kColumns, g.out - column);
        load(scratch.panel[0], kColumns, g.dy, g.out, row, column, rows, columns, nullptr);
        if (need_ds)
          product<M, false, kColumns / kDepth, 1>(scratch.sums[0], kRankStride, units(scratch.panel),
                                                  work.b + column / kDepth * work.rank, work.rank, height, work.rank,
                                                  (columns + kDepth - 1) / kDepth);
        if (g.db != nullptr)
          product<M, false, 1, kRankStride>(work.db + column, work.out, s,
                                            paired(scratch.panel[0], scratch.paired[0], kColumns, rows, columns),
                                            kColumns, work.rank, kl::padded(columns), height / kDepth);
      }
      if (!need_ds) continue;
      narrow(scratch, height, work.rank, static_cast<Sum>(g.scale));
      const Unit* ds = paired(scratch.narrow[0], scratch.narrow_paired[0], kRankStride, rows, g.rank);
      for (int64_t column = 0; column < g.in; column += kColumns) {
        const int64_t columns = std::min<int64_t>(kColumns, g.in - column);
        const Sum* factor = make_factors(scratch, g, row, column, rows);
        if (g.da != nullptr) {
          load(scratch.panel[0], kColumns, g.x, g.in, row, column, rows, columns, factor);
          product<M, false, 1, kRankStride>(work.da + column, work.in, ds,
                                            paired(scratch.panel[0], scratch.paired[0], kColumns, rows, columns),
                                            kColumns, work.rank, kl::padded(columns), height / kDepth);
        }
        if (g.dx.data != nullptr) {
          product<M, true, kRankStride / kDepth, 1>(scratch.product[0], kColumns, units(scratch.narrow),
                                                    work.a + column, work.in, height, kl::padded(columns),
                                                    (g.rank + kDepth - 1) / kDepth);
          store(g.dx, {g.dx.data, g.dx.stride}, g.in, row, column, rows, columns, scratch.product[0], Sum{1}, factor);
        }
      }
    }
  }

  // da += the sum over the parts, in their order, and db with its factor and transposed; this part's share of both.
  static void backward_reduce(const kl::Backward& g, int part, int parts) {
    const Layout work(g);
    const int64_t next = (work.in + work.out) * work.rank;
    if (g.da != nullptr)
      for (int64_t r = g.rank * part / parts; r < g.rank * (part + 1) / parts; ++r)
        for (int64_t j = 0; j < g.in; ++j) {
          Sum sum = static_cast<Sum*>(g.da)[r * g.in + j];
          for (int q = 0; q < parts; ++q) sum += work.da[q * next + r * work.in + j];
          static_cast<Sum*>(g.da)[r * g.in + j] = sum;
        }
    if (g.db != nullptr)
      for (int64_t j = g.out * part / parts; j < g.out * (part + 1) / parts; ++j)
        for (int64_t r = 0; r < g.rank; ++r) {
          Sum sum{0};
          for (int q = 0; q < parts; ++q) sum += work.db[q * next + r * work.out + j];
          static_cast<Sum*>(g.db)[j * g.rank + r] += static_cast<Sum>(g.scale) * sum;
        }
  }

  static constexpr kl::Kernels kernels{forward_pack, forward, backward_pack, backward, backward_reduce};
};

template <typename T>
kl::Kernels kernels_of() {
#if KL_BFLOAT16_PAIRS
  if constexpr (std::is_same_v<T, kl::bfloat16>) return Adapter<T, Pairs>::kernels;
#endif
  return Adapter<T, Plain<typename kl::compute<T>::type>>::kernels;
}
