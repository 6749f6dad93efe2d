// Included once for every instruction set, in its namespace and under its target pragma; KL_VECTOR_BYTES is its
// register.
//
// The rows are cut into blocks as long as a window. A window that ends in a block begins in the one before, or is the
// block: its sum is that of the previous block's last rows, which one backward pass stores, and that of this block's
// first rows, which runs along (van Herk 1992, Gil and Werman 1993, for maxima).

#include "core/vector.h"

template <typename T>
struct WindowSum {
  using Sum = typename kl::compute<T>::type;
  using V = vec<Sum>;
  static constexpr int kLanes = KL_VECTOR_BYTES / sizeof(Sum);
  static constexpr bool kBfloat16 = std::is_same_v<T, kl::bfloat16>;
  using Element = std::conditional_t<kBfloat16, uint16_t, T>;
  typedef Element Stored __attribute__((vector_size(kLanes * sizeof(T)), aligned(sizeof(T)), may_alias));

  // One document of one head, some of its features.
  struct Rows {
    const T* x;
    int64_t x_row;
    const Sum *before, *after;
    T* y;
    int64_t y_row;
    int64_t count, back, ahead;
    Sum* suffix;
  };

  static void run(const kl::window::Call& g, int part, int parts) {
    Sum* work = static_cast<Sum*>(g.work) + part * 64 * g.work_rows;
    const int64_t pairs = g.batch * g.heads;
    for (int64_t pair = pairs * part / parts; pair < pairs * (part + 1) / parts; ++pair) {
      const int64_t b = pair / g.heads, h = pair % g.heads;
      const T* x = static_cast<const T*>(g.x) + b * g.x_batch + h * g.x_head;
      const Sum* before = row_factors(g.before, b * g.before_batch + h * g.before_head);
      const Sum* after = row_factors(g.after, b * g.after_batch + h * g.after_head);
      T* y = static_cast<T*>(g.y) + pair * g.rows * g.features;
      for (int64_t first = 0, end; first < g.rows; first = end) {
        end = g.ends == nullptr ? g.rows : std::clamp<int64_t>(g.ends[first], first + 1, g.rows);
        Rows rows{x + first * g.x_row,
                  g.x_row,
                  before == nullptr ? nullptr : before + first,
                  after == nullptr ? nullptr : after + first,
                  y + first * g.features,
                  g.features,
                  end - first,
                  std::min(g.reach[h], end - first),
                  std::min(g.reach[g.heads + h], end - first),
                  work};
        each_strip(rows, g.features);
      }
    }
  }

  static const Sum* row_factors(const void* factors, int64_t offset) {
    return factors == nullptr ? nullptr : static_cast<const Sum*>(factors) + offset;
  }

  static void each_strip(Rows rows, int64_t features) {
    for (int64_t left = features, width; left > 0; left -= width) {
      width = left >= 4 * kLanes ? 4 * kLanes : std::min<int64_t>(left, kLanes);
      if (width == 4 * kLanes)
        strip<4, true>(rows, width);
      else if (width == kLanes)
        strip<1, true>(rows, width);
      else
        strip<1, false>(rows, width);
      rows.x += width;
      rows.y += width;
    }
  }

  template <int kVectors, bool kWhole>
  static void strip(const Rows& rows, int64_t width) {
    constexpr int kWidth = kVectors * kLanes;
    const int64_t block = rows.back + rows.ahead + 1, last = rows.count + rows.ahead;
    for (int64_t first = 0; first < last; first += block) {
      const int64_t end = std::min(first + block, last);
      V sum[kVectors] = {};
      for (int64_t j = first; j < end; ++j) {
        add<kVectors, kWhole>(sum, rows, j, width);
        const int64_t i = j - rows.ahead;
        if (i < 0) continue;
        V total[kVectors];
        const Sum* rest = rows.suffix + (j + 1 - first) * kWidth;
        const bool reaches_back = first > 0 && j + 1 < first + block;
#pragma GCC unroll 4
        for (int w = 0; w < kVectors; ++w) total[w] = reaches_back ? sum[w] + load(rest + w * kLanes) : sum[w];
        write<kVectors, kWhole>(rows, i, total, width);
      }
      if (end == last) break;
      V tail[kVectors] = {};
      for (int64_t j = end - 1; j > first; --j) {
        add<kVectors, kWhole>(tail, rows, j, width);
#pragma GCC unroll 4
        for (int w = 0; w < kVectors; ++w) store(rows.suffix + (j - first) * kWidth + w * kLanes, tail[w]);
      }
    }
  }

  template <int kVectors, bool kWhole>
  static KL_INLINE void add(V* sum, const Rows& rows, int64_t j, int64_t width) {
    const Sum factor = j >= rows.count ? 0 : rows.before == nullptr ? 1 : rows.before[j];
    if (factor == 0) return;
    const T* x = rows.x + j * rows.x_row;
#pragma GCC unroll 4
    for (int w = 0; w < kVectors; ++w) sum[w] += factor * widen(x + w * kLanes, kWhole ? kLanes : width);
  }

  template <int kVectors, bool kWhole>
  static KL_INLINE void write(const Rows& rows, int64_t i, const V* sum, int64_t width) {
    const Sum factor = rows.after == nullptr ? 1 : rows.after[i];
    T* y = rows.y + i * rows.y_row;
#pragma GCC unroll 4
    for (int w = 0; w < kVectors; ++w)
      narrow(y + w * kLanes, factor == 0 ? V{} : factor * sum[w], kWhole ? kLanes : width);
  }

  static KL_INLINE V widen(const T* from, int64_t count) {
    Stored values{};
    std::memcpy(&values, from, count * sizeof(T));
    if constexpr (kBfloat16)
      return (V)(__builtin_convertvector(values, vec<uint32_t>) << 16);
    else
      return __builtin_convertvector(values, V);
  }

  static KL_INLINE void narrow(T* to, V values, int64_t count) {
    Stored stored;
    if constexpr (kBfloat16) {
      const vec<uint32_t> bits = (vec<uint32_t>)values, rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
      const vec<uint32_t> kNan = vec<uint32_t>{} + 0x7FC0;
      stored = __builtin_convertvector(values == values ? rounded : kNan, Stored);
    } else {
      stored = __builtin_convertvector(values, Stored);
    }
    std::memcpy(to, &stored, count * sizeof(T));
  }
};
