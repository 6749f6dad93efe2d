// Vectors as wide as a register, and what multiplies them. Included once for every instruction set, in its namespace
// and under its target pragma; KL_VECTOR_BYTES is its register.

#define KL_INLINE inline __attribute__((always_inline))

template <typename E>
struct vector {
  typedef E type __attribute__((vector_size(KL_VECTOR_BYTES), aligned(sizeof(E)), may_alias));
};
template <typename E>
using vec = typename vector<E>::type;

template <typename E>
KL_INLINE vec<E> load(const E* from) {
  return *reinterpret_cast<const vec<E>*>(from);
}
template <typename E>
KL_INLINE void store(E* to, vec<E> value) {
  *reinterpret_cast<vec<E>*>(to) = value;
}

// a[0] b[0] a[1] b[1] ... of the lower (kHalf 0) or the upper half of the lanes.
template <int kHalf, typename V>
KL_INLINE V interleave(V a, V b) {
  constexpr int kLanes = sizeof(V) / sizeof(a[0]);
  using Lane = std::conditional_t<sizeof(a[0]) == 2, int16_t, std::conditional_t<sizeof(a[0]) == 4, int32_t, int64_t>>;
  vec<Lane> index;
#pragma GCC unroll 32
  for (int j = 0; j < kLanes; ++j) index[j] = kHalf * kLanes / 2 + j / 2 + j % 2 * kLanes;
  return __builtin_shuffle(a, b, index);
}

// Rows become columns: each time a row of the first half is interleaved with one of the second, an index's lowest bit
// of the row changes places with its highest of the column.
template <typename E>
KL_INLINE void transpose(vec<E>* rows) {
  constexpr int kLanes = KL_VECTOR_BYTES / sizeof(E);
#pragma GCC unroll 4
  for (int width = kLanes; width > 1; width /= 2) {
    vec<E> mixed[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      mixed[2 * i] = interleave<0>(rows[i], rows[i + kLanes / 2]);
      mixed[2 * i + 1] = interleave<1>(rows[i], rows[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = mixed[i];
  }
}

// A "unit" holds the consecutive factors of one multiply-add: one number, or two bfloat16 for the instruction that
// multiplies pairs.
template <typename Number>
struct Plain {
  using Element = Number;
  using Sum = Number;
  using Unit = Number;
  static constexpr int kDepth = 1;
  static KL_INLINE vec<Sum> multiply_add(vec<Sum> sum, Unit a, vec<Unit> b) { return sum + a * b; }
  static KL_INLINE Unit unit(const Element* elements) { return elements[0]; }
  static KL_INLINE vec<Unit> units(const vec<Sum>* values) { return values[0]; }
};

#if KL_BFLOAT16_PAIRS
struct Pairs {
  using Element = kl::bfloat16;
  using Sum = float;
  using Unit = uint32_t;
  static constexpr int kDepth = 2;
  static KL_INLINE vec<Sum> multiply_add(vec<Sum> sum, Unit a, vec<Unit> b) {
    return (vec<Sum>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b);
  }
  static KL_INLINE Unit unit(const Element* elements) { return elements[0].bits | uint32_t{elements[1].bits} << 16; }
  static KL_INLINE vec<Unit> units(const vec<Sum>* values) {
    const vec<Unit> low = (vec<Unit>)values[0], high = (vec<Unit>)values[1];
    return (low + 0x7FFF + ((low >> 16) & 1)) >> 16 | ((high + 0x7FFF + ((high >> 16) & 1)) & 0xFFFF0000);
  }
};
#endif
