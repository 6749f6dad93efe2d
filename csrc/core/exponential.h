// Included once for every instruction set, after core/vector.h.

// exp of what is not positive, 0 below the range, NaN of NaN; its error is about that of one rounding.
template <typename E>
KL_INLINE vec<E> exponential(vec<E> x) {
  using Bits = std::conditional_t<sizeof(E) == 4, uint32_t, uint64_t>;
  constexpr bool kFloat = sizeof(E) == 4;
  constexpr E kLowest = kFloat ? -86 : -708, kLog2E = 1.4426950408889634;
  constexpr E kLn2High = kFloat ? 0.693145751953125 : 0.6931471803691238, kLn2Low = 0.6931471805599453094 - kLn2High;
  constexpr E kRound = kFloat ? 12582912.0 : 6755399441055744.0;  // adding it leaves the integer in the lowest bits
  constexpr int kTerms = kFloat ? 7 : 13, kMantissa = kFloat ? 23 : 52;
  const vec<E> lowest = vec<E>{} + kLowest, clamped = x < lowest ? lowest : x;
  const vec<E> shifted = clamped * kLog2E + kRound, n = shifted - kRound;
  const vec<E> r = clamped - n * kLn2High - n * kLn2Low;
  E factorial = 1;
  for (int k = 2; k <= kTerms; ++k) factorial *= k;
  vec<E> sum = vec<E>{} + 1 / factorial;
#pragma GCC unroll 16
  for (int k = kTerms; k > 0; --k) {
    factorial /= k;
    sum = sum * r + 1 / factorial;
  }
  const vec<E> scaled = (vec<E>)((vec<Bits>)sum + ((vec<Bits>)shifted << kMantissa));
  const vec<E> of_number = x == x ? scaled : x;  // the bits of a NaN would have been added to
  return x < lowest ? vec<E>{} : of_number;
}
