// Sums of a softmax relative to the largest score so far.

template <typename T>
struct Forward : Scores<T> {
  using Base = Scores<T>;
  using Base::g, Base::size, Base::scores, Base::row, Base::rows, Base::band, Base::low, Base::kLanes;
  using typename Base::Sum, typename Base::V;

  const kl::attention::Forward& to;
  Sum* values;       // [keys, value_features]
  Sum* sums;         // of exp(score - peak) values [kRows, value_features]
  Sum* by_distance;  // of exp(score - peak) [kRows, size.distances]
  Sum peak[kRows], mass[kRows];

  Forward(const kl::attention::Forward& call, int part) : Base(call, Layout(call).forward_thread(part)), to(call) {
    values = this->take(size.keys * size.value_features);
    sums = this->take(kRows * size.value_features);
    by_distance = this->take(kRows * size.distances);
  }

  static void run(const kl::attention::Forward& call, int part, int parts) {
    Forward self(call, part);
    const int64_t blocks = round_up(call.queries, kRows) / kRows, tasks = call.batch * call.query_heads * blocks;
    for (int64_t task = tasks * part / parts; task < tasks * (part + 1) / parts; ++task) {
      const int64_t head = task / blocks;
      self.set_head(head / call.query_heads, head % call.query_heads, [&] {
        self.pack(call.key, call.features, self.q, 0, self.keys_t);
        self.pack(call.value, call.value_features, self.values, self.size.value_features, nullptr);
      });
      self.next_batch = (head + 1) / call.query_heads;
      self.next_head = (head + 1) % call.query_heads;
      self.block(task % blocks * kRows);
    }
  }

  void block(int64_t to_row) {
    this->set_rows(to_row);
    std::fill_n(peak, rows, std::numeric_limits<Sum>::lowest());  // not -infinity, which less itself is NaN
    std::fill_n(mass, rows, Sum{0});
    std::fill_n(sums, rows * size.value_features, Sum{0});
    const bool has_keys = this->first_key < this->last_key, of_table = has_keys && g.value_table.heads > 0;
    if (of_table) this->clear_sums(by_distance);
    for (int64_t key = this->first_column(); key < this->last_key; key += kKeys)
      add_keys(key, std::min(kKeys, this->last_key - key));
    if (of_table) {
      this->fold_sums(by_distance);
      product<false, false>(sums, size.value_features, by_distance + kPad, size.distances,
                            this->value_table().rows + low * size.value_features, size.value_features, rows,
                            size.value_features, band);
    }
    for (int64_t i = 0; i < rows; ++i) finish(i);
  }

  void add_keys(int64_t key, int64_t count) {
    this->multiply_keys(key, count);
    for (int64_t i = 0; i < rows; ++i) {
      this->prefetch(i);
      add_row(i, key, count);
    }
    for (int64_t i = 0, of = 0; i < rows; i += kPad, ++of) {
      const int64_t first = this->begin[of], last = std::min(this->end[of], count);
      product<false, false>(sums + i * size.value_features, size.value_features, this->score(i, first), kBlockStride,
                            values + (key + first) * size.value_features, size.value_features, std::min(kPad, rows - i),
                            size.value_features, last - first);
    }
  }

  void add_row(int64_t i, int64_t key, int64_t count) {
    Sum* line = this->score(i, 0);
    const int64_t from = std::max<int64_t>(this->first[i] - key, 0), end = std::min(this->last[i] - key, count);
    this->clear_beside(line, i, from, end);
    if (from >= end) return;
    V top = V{} + peak[i];
    this->each_vector(i, key, from, end, [&](int64_t j, V z) {
      store(line + j, z);
      top = z > top ? z : top;
    });
    raise_peak(i, Base::largest_of(top));
    V sum{};
    for (int64_t j = kl::round_down(from, kLanes); j < end; j += kLanes) {
      const V share = exponential<Sum>(load(line + j) - peak[i]);
      store(line + j, share);
      sum += share;
    }
    mass[i] += Base::sum_of(sum);
    if (g.value_table.heads > 0) this->add_by_distance(this->profile_line(by_distance, i), line, i, key, from, end);
  }

  void raise_peak(int64_t i, Sum top) {
    const Sum before = std::exchange(peak[i], top);
    if (before == top || mass[i] == 0) return;
    const Sum factor = std::exp(before - top);
    mass[i] *= factor;
    scale_line(sums + i * size.value_features, size.value_features, factor);
    if (g.value_table.heads > 0) scale_line(this->profile_line(by_distance, i) - kLanes, band + 2 * kLanes, factor);
  }

  static void scale_line(Sum* line, int64_t count, Sum factor) {
    for (int64_t c = 0; c < count; ++c) line[c] *= factor;
  }

  void finish(int64_t i) {
    const int64_t place = (this->batch * g.query_heads + this->head) * g.queries + row + i;
    T* out = static_cast<T*>(to.out) + place * g.value_features;
    const bool none = mass[i] == 0;  // no key
    const Sum factor = none ? 0 : 1 / mass[i];
    for (int64_t f = 0; f < g.value_features; ++f) out[f] = static_cast<T>(sums[i * size.value_features + f] * factor);
    static_cast<Sum*>(to.peak)[place] = none ? 0 : peak[i];
    static_cast<Sum*>(to.mass)[place] = mass[i];
  }
};
