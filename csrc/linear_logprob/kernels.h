// Included once for every instruction set, in its namespace and under its target pragma; KL_VECTOR_BYTES is its
// register.
//
// Logits stand transposed, [classes, rows]: A is the weight as it lies in memory, only `hidden` is packed, and the sums
// over classes run along the vectors' lanes, a row each.

// clang-format off: the first is what the others need
#include "core/vector.h"
#include "core/exponential.h"
#include "core/gemm.h"
// clang-format on

constexpr int64_t kClasses = 128;  // of a tile
constexpr int64_t kInner = 128;    // units of a row of the weight in work at once

// Logits of a block of rows and a tile of classes, in memory of this part's own.
template <typename T, typename M>
struct Logits {
  using Element = typename M::Element;
  using Sum = typename M::Sum;
  using Unit = typename M::Unit;
  using V = vec<Sum>;
  static constexpr int kDepth = M::kDepth;
  static constexpr int kLanes = KL_VECTOR_BYTES / sizeof(Sum);
  static constexpr int kStrip = 3 * kLanes;                      // with kHeight: 24 of 32 registers, 12 of 16
  static constexpr int kHeight = KL_VECTOR_BYTES == 64 ? 8 : 4;  // divides kClasses and 16
  static constexpr Sum kNever = -1e5;                            // exp is 0 from here on

  const kl::logprob::Head& g;
  const int64_t units;  // of a row
  const Sum scale;
  Sum* memory;                // what is not taken yet
  Sum* logits;                // before the temperature [kClasses, block]
  Unit* packed;               // hidden, in strips [units, strip_width]
  Unit* chunk;                // of the weight [kClasses, kInner]
  int64_t row, rows, padded;  // of the block

  Logits(const kl::logprob::Head& head, int part)
      : g(head), units(round_up(head.features, kDepth) / kDepth), scale(static_cast<Sum>(1 / head.temperature)) {
    memory = static_cast<Sum*>(g.work) + part * (g.block * (3 * g.features + 512) + (1 << 15));
    logits = take<Sum>(kClasses * g.block);
    packed = take<Unit>(units * g.block);
    chunk = take<Unit>(kClasses * kInner);
  }

  template <typename E>
  E* take(int64_t count) {
    return reinterpret_cast<E*>(std::exchange(memory, memory + count * static_cast<int64_t>(sizeof(E) / sizeof(Sum))));
  }

  // Calls `block()` for every block of the part.
  template <typename Block>
  void each_block(int part, int parts, Block block) {
    const int64_t blocks = round_up(g.rows, g.block) / g.block;
    for (int64_t b = blocks * part / parts; b < blocks * (part + 1) / parts; ++b) {
      row = b * g.block;
      rows = std::min(g.block, g.rows - row);
      padded = round_up(rows, 16);
      pack_hidden();
      block();
    }
  }

  static KL_INLINE Element element(T value) {
    if constexpr (std::is_same_v<T, Element>) return value;
    return static_cast<Element>(static_cast<Sum>(value));
  }

  const T* weight_row(int64_t v) const { return static_cast<const T*>(g.weight) + v * g.weight_stride; }

  // Of the next strip. Two of two vectors take less time than one of three and one of a single vector.
  static int64_t strip_width(int64_t left) { return left == 4 * kLanes ? 2 * kLanes : std::min<int64_t>(kStrip, left); }

  void pack_hidden() {
    for (int64_t first = 0, width; first < padded; first += width) {
      width = strip_width(padded - first);
      for (int64_t j = 0; j < width; ++j) {
        const T* from = static_cast<const T*>(g.hidden) + (row + first + j) * g.hidden_stride;
        const int64_t present = first + j < rows ? g.features : 0;
        for (int64_t p = 0; p < units; ++p) {
          Element elements[kDepth];
          for (int d = 0; d < kDepth; ++d) {
            const int64_t k = p * kDepth + d;
            elements[d] = k < present ? element(from[k]) : Element(Sum{0});
          }
          packed[first * units + p * width + j] = M::unit(elements);
        }
      }
    }
  }

  // logits = weight hidden^T of the tile
  void multiply_hidden(int64_t first_class, int64_t classes) {
    const int64_t height = round_up(classes, kHeight);
    for (int64_t first = 0; first < units; first += kInner) {
      const int64_t depth = std::min(kInner, units - first);
      const char* a = reinterpret_cast<const char*>(weight_row(first_class) + first * kDepth);
      int64_t step = g.weight_stride * sizeof(T);
      if (!std::is_same_v<T, Element> || height > classes || (first + depth) * kDepth > g.features) {
        convert_chunk(first_class, classes, height, first, depth);
        a = reinterpret_cast<const char*>(chunk);
        step = kInner * sizeof(Unit);
      }
      for (int64_t j = 0, width; j < padded; j += width) {
        width = strip_width(padded - j);
        const Unit* b = packed + j * units + first * width;
        const auto of_width = width == 3 * kLanes ? column<3> : width == 2 * kLanes ? column<2> : column<1>;
        of_width(logits + j, g.block, a, step, b, depth, height, first == 0, j == 0);
      }
    }
  }

  template <int kVectors>
  static void column(Sum* c, int64_t c_stride, const char* a, int64_t a_step, const Unit* b, int64_t depth,
                     int64_t height, bool fresh, bool first_strip) {
    for (int64_t i = 0; i < height; i += kHeight) {
      if (first_strip) prefetch(a + (i + kHeight) * a_step, a_step, depth * sizeof(Unit));
      if (fresh)
        tile<M, kHeight, kVectors, true, false>(c + i * c_stride, c_stride, a + i * a_step, a_step, b,
                                                kVectors * kLanes, depth);
      else
        tile<M, kHeight, kVectors, false, false>(c + i * c_stride, c_stride, a + i * a_step, a_step, b,
                                                 kVectors * kLanes, depth);
    }
  }

  // Fetches the next tile's rows of the weight, since the hardware does not foresee the jump from row to row.
  static void prefetch(const char* row, int64_t step, int64_t bytes) {
    for (int i = 0; i < kHeight; ++i)
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + i * step + at);
  }

  void convert_chunk(int64_t first_class, int64_t classes, int64_t height, int64_t first, int64_t depth) {
    for (int64_t v = 0; v < height; ++v) {
      Element* to = reinterpret_cast<Element*>(chunk + v * kInner);
      const int64_t present = v < classes ? std::min(depth * kDepth, g.features - first * kDepth) : 0;
      const T* from = weight_row(first_class + v) + first * kDepth;
      for (int64_t k = 0; k < present; ++k) to[k] = element(from[k]);
      for (int64_t k = present; k < depth * kDepth; ++k) to[k] = Element(Sum{0});
    }
  }

  // The logits of a class in kLanes rows, temperature and bias included.
  KL_INLINE V logit(int64_t v, int64_t lane, int64_t first_class) const {
    const V z = load(logits + v * g.block + lane) * scale;
    return g.bias == nullptr ? z : z + static_cast<Sum>(static_cast<const T*>(g.bias)[first_class + v]) * scale;
  }
};

// The sums leave out the target, whose share comes last: nothing cancels where it is likely.
template <typename T, typename M>
struct Forward : Logits<T, M> {
  using Base = Logits<T, M>;
  using Base::g, Base::logits, Base::row, Base::rows, Base::padded, Base::weight_row, Base::kDepth, Base::kLanes,
      Base::kStrip, Base::kHeight;
  using typename Base::Element, typename Base::Sum, typename Base::Unit, typename Base::V;

  const kl::logprob::Forward& to;
  const bool keep, with_entropy;
  const int64_t features;         // as padded for the sums of weights
  Sum *peak, *picked;             // the largest logit and the target's [block]
  double *mass, *moment;          // sums of exp(z - peak) and of its product with z - peak [block]
  Unit *shares, *moments;         // the terms of these sums in the tile [kClasses / kDepth, block]
  Sum *weights, *weight_moments;  // sums of the weights with these terms [block, features]
  Unit* strip;                    // of the weight [kClasses / kDepth, kStrip]

  Forward(const kl::logprob::Forward& call, int part)
      : Base(call, part),
        to(call),
        keep(call.dlogprob != nullptr),
        with_entropy(call.entropy != nullptr),
        features(round_up(call.features, kStrip)) {
    mass = this->template take<double>(g.block);
    moment = this->template take<double>(g.block);
    peak = this->template take<Sum>(g.block);
    picked = this->template take<Sum>(g.block);
    shares = this->template take<Unit>(kClasses / kDepth * g.block);
    moments = this->template take<Unit>(kClasses / kDepth * g.block);
    weights = this->template take<Sum>(g.block * features);
    weight_moments = this->template take<Sum>(g.block * features);
    strip = this->template take<Unit>(kClasses / kDepth * kStrip);
  }

  static void run(const kl::logprob::Forward& call, int part, int parts) {
    Forward self(call, part);
    self.each_block(part, parts, [&] { self.block(); });
  }

  void block() {
    std::fill_n(peak, padded, std::numeric_limits<Sum>::lowest() / 2);  // of which a logit can still be subtracted
    std::fill_n(picked, padded, Sum{0});
    std::fill_n(mass, padded, 0.0);
    std::fill_n(moment, padded, 0.0);
    if (keep) std::fill_n(weights, padded * features, Sum{0});
    if (keep && with_entropy) std::fill_n(weight_moments, padded * features, Sum{0});
    for (int64_t first_class = 0; first_class < g.classes; first_class += kClasses) {
      const int64_t classes = std::min(kClasses, g.classes - first_class);
      this->multiply_hidden(first_class, classes);
      for (int64_t lane = 0; lane < padded; lane += kLanes) add_tile(lane, first_class, classes);
      if (keep) multiply_weight(first_class, classes);
    }
    for (int64_t i = 0; i < rows; ++i) finish(i);
  }

  // The tile's terms of the sums, of kLanes rows.
  void add_tile(int64_t lane, int64_t first_class, int64_t classes) {
    constexpr Sum kNone = -std::numeric_limits<Sum>::infinity();
    V top = load(peak + lane);
    for (int64_t v = 0; v < classes; ++v) {
      const V z = this->logit(v, lane, first_class);
      store(logits + v * g.block + lane, z);
      top = z > top ? z : top;
    }
    for (int64_t v = classes; v < round_up(classes, kDepth); ++v) store(logits + v * g.block + lane, V{} + kNone);
    for (int64_t j = lane; j < std::min(lane + kLanes, rows); ++j) {
      const int64_t v = g.target[row + j] - first_class;
      if (v >= 0 && v < classes) picked[j] = std::exchange(logits[v * g.block + j], kNone);
    }
    for (int64_t j = 0; j < kLanes; ++j)
      if (top[j] != peak[lane + j]) raise_peak(lane + j, top[j]);
    V sum{}, sum_of_products{};
    for (int64_t v = 0; v < classes; v += kDepth) {
      V share[kDepth], product[kDepth] = {};
      for (int d = 0; d < kDepth; ++d) {
        const V distance = load(logits + (v + d) * g.block + lane) - top;
        share[d] = exponential<Sum>(distance);
        sum += share[d];
        if (!with_entropy) continue;
        product[d] = (distance < Base::kNever ? V{} + Base::kNever : distance) * share[d];
        sum_of_products += product[d];
      }
      if (!keep) continue;
      store(shares + v / kDepth * g.block + lane, M::units(share));
      if (with_entropy) store(moments + v / kDepth * g.block + lane, M::units(product));
    }
    for (int64_t j = 0; j < kLanes; ++j) {
      mass[lane + j] += sum[j];
      moment[lane + j] += sum_of_products[j];
    }
  }

  void raise_peak(int64_t j, Sum top) {
    const double step = static_cast<double>(peak[j]) - top, factor = std::exp(step);
    peak[j] = top;
    moment[j] = factor * (moment[j] + mass[j] * step);
    mass[j] *= factor;
    if (!keep) return;
    Sum *sum = weights + j * features, *sum_of_products = weight_moments + j * features;
    if (with_entropy)
      for (int64_t k = 0; k < features; ++k)
        sum_of_products[k] = static_cast<Sum>(factor) * (sum_of_products[k] + static_cast<Sum>(step) * sum[k]);
    for (int64_t k = 0; k < features; ++k) sum[k] *= static_cast<Sum>(factor);
  }

  // weights += shares^T weight, and weight_moments with the moments
  void multiply_weight(int64_t first_class, int64_t classes) {
    const int64_t depth = round_up(classes, kDepth) / kDepth;
    for (int64_t k = 0; k < features; k += kStrip) {
      pack_strip(first_class, classes, k);
      for (int64_t i = 0; i < padded; i += kHeight) {
        add_product(weights + i * features + k, shares + i, depth);
        if (with_entropy) add_product(weight_moments + i * features + k, moments + i, depth);
      }
    }
  }

  KL_INLINE void add_product(Sum* sums, const Unit* terms, int64_t depth) {
    tile<M, kHeight, 3, false, true>(sums, features, reinterpret_cast<const char*>(terms), g.block * sizeof(Unit),
                                     strip, kStrip, depth);
  }

  void pack_strip(int64_t first_class, int64_t classes, int64_t first) {
    const int64_t count = std::min<int64_t>(kStrip, g.features - first);
    for (int64_t v = 0; v < classes; v += kDepth) {
      Unit* to_units = strip + v / kDepth * kStrip;
      const T* from = weight_row(first_class + v) + first;
      if (v + kDepth <= classes)
        for (int64_t k = 0; k < count; ++k) {
          Element elements[kDepth];
          for (int d = 0; d < kDepth; ++d) elements[d] = this->element(from[d * g.weight_stride + k]);
          to_units[k] = M::unit(elements);
        }
      else
        for (int64_t k = 0; k < count; ++k) {
          const Element elements[2] = {this->element(from[k]), Element(Sum{0})};
          to_units[k] = M::unit(elements);
        }
      std::fill_n(to_units + count, kStrip - count, Unit{0});
    }
  }

  void finish(int64_t i) {
    const double distance = static_cast<double>(picked[i]) - peak[i], share = std::exp(distance);
    const double total = mass[i] + share, log_total = distance == 0 ? std::log1p(mass[i]) : std::log(total);
    const double product = share == 0 ? 0 : share * distance, mean = (moment[i] + product) / total;  // E[z - peak]
    static_cast<Sum*>(to.logprob)[row + i] = static_cast<Sum>(distance - log_total);
    static_cast<Sum*>(to.lse)[row + i] = static_cast<Sum>(peak[i] + log_total);
    if (with_entropy) static_cast<Sum*>(to.entropy)[row + i] = static_cast<Sum>(log_total - mean);
    if (!keep) return;
    const T* own = weight_row(g.target[row + i]);
    const double factor = 1 / (total * g.temperature);
    const Sum *sum = weights + i * features, *sum_of_products = weight_moments + i * features;
    combine(to.dlogprob, i, own, mass[i] * factor, sum, -factor, sum, 0);
    if (with_entropy)
      combine(to.dentropy, i, own, (mean * share - product) * factor, sum, mean * factor, sum_of_products, -factor);
  }

  // Row i of `result` = a x + b y + c z.
  void combine(void* result, int64_t i, const T* x, double a, const Sum* y, double b, const Sum* z, double c) {
    T* at = static_cast<T*>(result) + (row + i) * g.features;
    const Sum of_x = static_cast<Sum>(a), of_y = static_cast<Sum>(b), of_z = static_cast<Sum>(c);
    for (int64_t k = 0; k < g.features; ++k)
      at[k] = static_cast<T>(of_x * static_cast<Sum>(x[k]) + of_y * y[k] + of_z * z[k]);
  }
};

template <typename T, typename M>
struct Gradient : Logits<T, M> {
  using Base = Logits<T, M>;
  using Base::g, Base::row, Base::rows, Base::padded, Base::kLanes;
  using typename Base::Sum, typename Base::V;
  using Out = std::conditional_t<std::is_same_v<T, _Float16>, float, T>;

  const kl::logprob::Gradient& to;

  static void run(const kl::logprob::Gradient& call, int part, int parts) {
    Gradient self{{call, part}, call};
    self.each_block(part, parts, [&] {
      for (int64_t first_class = call.first_class; first_class < call.last_class; first_class += kClasses) {
        const int64_t classes = std::min(kClasses, call.last_class - first_class);
        self.multiply_hidden(first_class, classes);
        for (int64_t lane = 0; lane < self.padded; lane += kLanes) self.write(lane, first_class, classes);
      }
    });
  }

  // g ([v = t] - p_v) - g_H p_v (log p_v + H), over the temperature, of kLanes rows.
  void write(int64_t lane, int64_t first_class, int64_t classes) {
    const int64_t count = std::min<int64_t>(kLanes, rows - lane);
    const V lse = rows_of(to.lse, lane), by_logprob = rows_of(to.grad_logprob, lane);
    const V entropy = rows_of(to.entropy, lane), by_entropy = rows_of(to.grad_entropy, lane);
    Out* dz = static_cast<Out*>(to.dz) + (first_class - to.first_class) * to.dz_stride + row + lane;
    for (int64_t v = 0; v < classes; ++v) {
      const V log_p = this->logit(v, lane, first_class) - lse, p = exponential<Sum>(log_p);
      const V finite = log_p < Base::kNever ? V{} + Base::kNever : log_p;
      alignas(64) Sum values[kLanes];
      store(values, -this->scale * p * (by_logprob + by_entropy * (finite + entropy)));
      for (int64_t j = 0; j < count; ++j) dz[v * to.dz_stride + j] = static_cast<Out>(values[j]);
    }
    for (int64_t j = 0; j < count; ++j) {
      const int64_t v = g.target[row + lane + j] - first_class;
      if (v < 0 || v >= classes) continue;
      const double log_p = static_cast<double>(this->logit(v, lane, first_class)[j]) - lse[j], p = std::exp(log_p);
      const double of_entropy = p == 0 ? 0 : by_entropy[j] * p * (log_p + entropy[j]);
      dz[v * to.dz_stride + j] = static_cast<Out>(-this->scale * (by_logprob[j] * std::expm1(log_p) + of_entropy));
    }
  }

  V rows_of(const void* values, int64_t lane) const {
    V result{};
    if (values != nullptr)
      for (int64_t j = 0; j < std::min<int64_t>(kLanes, rows - lane); ++j)
        result[j] = static_cast<const Sum*>(values)[row + lane + j];
    return result;
  }
};

template <typename T>
kl::logprob::Kernels kernels_of() {
#if KL_BFLOAT16_PAIRS
  if constexpr (std::is_same_v<T, kl::bfloat16>) return {Forward<T, Pairs>::run, Gradient<T, Pairs>::run};
#endif
  using Sums = Plain<typename kl::compute<T>::type>;
  return {Forward<T, Sums>::run, Gradient<T, Sums>::run};
}
