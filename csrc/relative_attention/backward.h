// Gradients: scores again, then ds = p (dp - delta) with dp = grad_out.(v + value_table) and delta = grad_out.out.
//
// A task is a part of the batch and a key head with its query heads. It adds to the gradients of keys and values in
// memory of its thread and to those of the tables in sums of its own, which `reduce` adds up in their order: results
// do not depend on the number of threads. The scale is left out until a gradient is written.

template <typename T>
struct Backward : Scores<T> {
  using Base = Scores<T>;
  using Base::g, Base::size, Base::q, Base::scores, Base::row, Base::rows, Base::band, Base::low, Base::kLanes;
  using typename Base::Sum, typename Base::V;

  const kl::attention::Backward& to;
  const bool need_scores, need_by_query;
  Sum* keys;                                              // [keys, features]
  Sum* values_t;                                          // [value_features, size.keys]
  Sum *dkeys, *dvalues;                                   // [keys, features], [keys, value_features]
  Sum* beyond_sums[2];                                    // of ds beyond the key table's ends [size.keys]
  Sum* grad;                                              // [kRows, value_features]
  Sum* out;                                               // of one query [value_features]
  Sum* ds;                                                // dp first [kRows, kBlockStride]
  Sum* value_profile;                                     // grad.value_table [kRows, size.distances]
  Sum *ds_sums, *p_sums;                                  // by distance [kRows, size.distances]
  Sum* dq;                                                // [kRows, features]
  Sum *dquery_table, *dkey_table, *dvalue_table, *dbias;  // the task's sums, of the current head
  Sum delta[kRows], peak[kRows], factor[kRows];           // p = exp(score - peak) factor

  Backward(const kl::attention::Backward& call, int part)
      : Base(call, Layout(call).backward_thread(call, part)),
        to(call),
        need_scores(to.dquery != nullptr || to.dkey != nullptr || to.dquery_table != nullptr ||
                    to.dkey_table != nullptr || to.dbias != nullptr),
        need_by_query(to.dquery_table != nullptr || to.dbias != nullptr ||
                      (to.dquery != nullptr && g.query_table.heads > 0)) {
    keys = this->take(size.keys * size.features);
    values_t = this->take(size.value_features * size.keys);
    dkeys = this->take(size.keys * size.features);
    dvalues = this->take(size.keys * size.value_features);
    for (Sum*& line : beyond_sums) line = this->take(size.keys);
    grad = this->take(kRows * size.value_features);
    out = this->take(size.value_features);
    ds = this->take(kRows * kBlockStride);
    value_profile = this->take(kRows * size.distances);
    ds_sums = this->take(kRows * size.distances);
    p_sums = this->take(kRows * size.distances);
    dq = this->take(kRows * size.features);
  }

  static void run(const kl::attention::Backward& call, int part, int parts) {
    Backward self(call, part);
    const int64_t tasks = call.chunks * call.key_heads, group = call.query_heads / call.key_heads;
    for (int64_t task = tasks * part / parts; task < tasks * (part + 1) / parts; ++task) {
      const int64_t chunk = task / call.key_heads, first_head = task % call.key_heads * group;
      std::fill_n(self.sums_of(chunk, first_head), group * self.size.numbers, Sum{0});
      for (int64_t b = call.batch * chunk / call.chunks; b < call.batch * (chunk + 1) / call.chunks; ++b) {
        for (int64_t h = first_head; h < first_head + group; ++h) {
          const bool last = h == first_head + group - 1;
          self.next_batch = last ? b + 1 : b;
          self.next_head = last ? first_head : h + 1;
          self.add_head(chunk, b, h);
        }
        self.write_keys(self.dkeys, self.size.features, to_scale(call), call.dkey, call.features);
        self.write_keys(self.dvalues, self.size.value_features, Sum{1}, call.dvalue, call.value_features);
      }
    }
  }

  static Sum to_scale(const Call& g) { return static_cast<Sum>(g.scale); }

  Sum* sums_of(int64_t chunk, int64_t head) const {
    return static_cast<Sum*>(g.work) + size.sums + (chunk * g.query_heads + head) * size.numbers;
  }

  void add_head(int64_t chunk, int64_t batch, int64_t head) {
    this->set_head(batch, head, [&] {
      this->pack(g.key, g.features, keys, size.features, this->keys_t);
      this->pack(g.value, g.value_features, grad, 0, values_t);
      std::fill_n(dkeys, size.keys * size.features, Sum{0});
      std::fill_n(dvalues, size.keys * size.value_features, Sum{0});
    });
    dquery_table = sums_of(chunk, head);
    dkey_table = dquery_table + size.key_sums;
    dvalue_table = dquery_table + size.value_sums;
    dbias = dquery_table + size.bias_sums;
    for (Sum* line : beyond_sums) std::fill_n(line, size.keys, Sum{0});
    for (int64_t first = 0; first < g.queries; first += kRows) block(first);
    for (int side = 0; side < 2; ++side)
      if (need_scores && this->reaches_beyond(side)) add_beyond_table(side);
  }

  void block(int64_t to_row) {
    this->set_rows(to_row);
    std::fill_n(dq, rows * size.features, Sum{0});
    if (this->first_key < this->last_key) {
      load_gradient();
      const bool of_values = g.value_table.heads > 0;
      if (of_values) {
        this->multiply_table(value_profile, grad, size.value_features, this->value_table(), g.value_features);
        for (int64_t i = 0; i < rows; ++i) this->repeat_ends(this->profile_line(value_profile, i), band);
      }
      if (need_by_query) this->clear_sums(ds_sums);
      if (to.dvalue_table != nullptr) this->clear_sums(p_sums);
      for (int64_t key = this->first_column(); key < this->last_key; key += kKeys)
        add_keys(key, std::min(kKeys, this->last_key - key));
      add_tables();
    }
    write_query();
  }

  void load_gradient() {
    const bool blocks = this->last_key - this->first_column() > kKeys;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t place = (this->batch * g.query_heads + this->head) * g.queries + row + i;
      Sum* line = grad + i * size.value_features;
      this->widen(line, this->at(to.grad_out, this->batch, this->head, row + i), g.value_features);
      peak[i] = static_cast<const Sum*>(to.peak)[place];
      const Sum mass = static_cast<const Sum*>(to.mass)[place];
      factor[i] = mass == 0 ? 0 : 1 / mass;
      if (!blocks) continue;
      this->widen(out, static_cast<const T*>(to.out) + place * g.value_features, g.value_features);
      V sum{};
      for (int64_t f = 0; f < size.value_features; f += kLanes) sum += load(line + f) * load(out + f);
      delta[i] = Base::sum_of(sum);
    }
    std::fill_n(grad + rows * size.value_features, (round_up(rows, 4) - rows) * size.value_features, Sum{0});
  }

  void add_keys(int64_t key, int64_t count) {
    this->multiply_keys(key, count);
    if (need_scores)
      for (int64_t i = 0, of = 0; i < rows; i += kPad, ++of) {
        const int64_t first = this->begin[of];
        product<true, false>(ds + i * kBlockStride + first, kBlockStride, grad + i * size.value_features,
                             size.value_features, values_t + key + first, size.keys, std::min(kPad, rows - i),
                             this->end[of] - first, g.value_features);
      }
    for (int64_t i = 0; i < rows; ++i) {
      this->prefetch(i);
      if (g.queries <= kRows && this->next_batch < g.batch)
        Base::prefetch(this->at(to.grad_out, this->next_batch, this->next_head, i), g.value_features);
      differentiate(i, key, count);
    }
    for (int64_t j = 0; j < count; j += kPad) {
      const int64_t height = std::min(kPad, count - j);
      int64_t from = 0, end = rows;
      while (from < end && !sees(from, key + j, height)) ++from;
      while (from < end && !sees(end - 1, key + j, height)) --end;
      if (to.dvalue != nullptr)
        product<false, true>(dvalues + (key + j) * size.value_features, size.value_features, this->score(from, j),
                             kBlockStride, grad + from * size.value_features, size.value_features, height,
                             size.value_features, end - from);
      if (to.dkey != nullptr && g.content)
        product<false, true>(dkeys + (key + j) * size.features, size.features, ds + from * kBlockStride + j,
                             kBlockStride, q + from * size.features, size.features, height, size.features, end - from);
    }
    if (to.dquery != nullptr && g.content)
      for (int64_t i = 0, of = 0; i < rows; i += kPad, ++of) {
        const int64_t first = this->begin[of];
        product<false, false>(dq + i * size.features, size.features, ds + i * kBlockStride + first, kBlockStride,
                              keys + (key + first) * size.features, size.features, std::min(kPad, rows - i),
                              size.features, std::min(this->end[of], count) - first);
      }
    if (g.key_table.heads > 0 && (to.dkey != nullptr || to.dkey_table != nullptr))
      for (int64_t j = 0; j < count; j += kLanes) add_key_table(key + j, j);
  }

  bool sees(int64_t i, int64_t key, int64_t count) const {
    return this->first[i]<key + count&& this->last[i]> std::max(key, this->first[i]);
  }

  // Of query i: p in place of its scores, ds in place of dp, and both by distance.
  void differentiate(int64_t i, int64_t key, int64_t count) {
    Sum *p_line = this->score(i, 0), *ds_line = ds + i * kBlockStride;
    const int64_t from = std::max<int64_t>(this->first[i] - key, 0), end = std::min(this->last[i] - key, count);
    this->clear_beside(p_line, i, from, end);
    this->clear_beside(ds_line, i, from, end);
    if (from >= end) return;
    const Sum* of_values = g.value_table.heads > 0 ? this->profile_line(value_profile, i) : nullptr;
    Sum* ds_by_distance = need_by_query ? this->profile_line(ds_sums, i) : nullptr;
    Sum* p_by_distance = to.dvalue_table != nullptr ? this->profile_line(p_sums, i) : nullptr;
    V sum{};
    this->each_vector(i, key, from, end, [&](int64_t j, V z) {
      const V p = exponential<Sum>(z - peak[i]) * factor[i];
      store(p_line + j, p);
      if (!need_scores) return;
      V dp = load(ds_line + j);
      if (of_values != nullptr) dp += load(of_values + this->place(i, key + j));
      store(ds_line + j, dp);
      sum += p * dp;
    });
    if (p_by_distance != nullptr) this->add_by_distance(p_by_distance, p_line, i, key, from, end);
    if (!need_scores) return;
    // Where all keys are here the sum itself, so that ds of a single key is 0.
    const bool whole = this->first[i] >= key && this->last[i] <= key + count;
    const Sum mean = whole ? Base::sum_of(sum) : delta[i];
    for (int64_t j = kl::round_down(from, kLanes); j < end; j += kLanes)
      store(ds_line + j, load(p_line + j) * (load(ds_line + j) - mean));
    if (ds_by_distance != nullptr) this->add_by_distance(ds_by_distance, ds_line, i, key, from, end);
  }

  // A strip of keys: the transpose of Scores::add_key_table.
  void add_key_table(int64_t j, int64_t column) {
    const int side = this->side_of(j, this->position, rows);
    if (side >= 0) {
      V sum = load(beyond_sums[side] + j);
      for (int64_t i = 0; i < rows; ++i)
        if (this->uses(i, column)) sum += load(ds + i * kBlockStride + column);
      store(beyond_sums[side] + j, sum);
      return;
    }
    this->set_strip(j);
    const int64_t band = this->strip_band;
    for (int64_t l = 0; l < std::max<int64_t>(kLanes, 4); ++l) this->clear_line(this->strip_line(l), band);
    for (int64_t i = 0; i < rows; i += kLanes) {
      if (!this->uses(i, column)) continue;
      V terms[kLanes];
#pragma GCC unroll 16
      for (int64_t l = 0; l < kLanes; ++l) terms[l] = i + l < rows ? load(ds + (i + l) * kBlockStride + column) : V{};
      transpose<Sum>(terms);
#pragma GCC unroll 16
      for (int64_t l = 0; l < kLanes; ++l) {
        Sum* at = this->strip_line(l) + this->strip_place(j + l, i);
        store(at, load(at) + terms[l]);
      }
    }
    for (int64_t l = 0; l < kLanes; ++l) this->fold_ends(this->strip_line(l), band);
    const int64_t first = (this->farthest - this->strip_top) * size.features;
    if (to.dkey != nullptr)
      product<false, false>(dkeys + j * size.features, size.features, this->strip_line(0), kStripStride,
                            this->key_table().rows + first, size.features, kLanes, size.features, band);
    if (to.dkey_table != nullptr)
      product<false, true>(dkey_table + first, size.features, this->strip_line(0), kStripStride,
                           keys + j * size.features, size.features, band, size.features, kLanes);
  }

  void add_beyond_table(int side) {
    const int64_t first = this->end_row(side) * size.features;
    const Sum* end = this->key_table().rows + first;
    for (int64_t j = 0; j < g.keys; ++j) {
      const Sum sum = beyond_sums[side][j];
      for (int64_t f = 0; f < size.features; f += kLanes) {
        Sum* dkey = dkeys + j * size.features + f;
        store(dkey, load(dkey) + sum * load(end + f));
        if (to.dkey_table == nullptr) continue;
        Sum* dtable = dkey_table + first + f;
        store(dtable, load(dtable) + sum * load(keys + j * size.features + f));
      }
    }
  }

  void add_tables() {
    if (need_by_query) this->fold_sums(ds_sums);
    if (to.dquery != nullptr && g.query_table.heads > 0)
      product<false, false>(dq, size.features, ds_sums + kPad, size.distances,
                            this->query_table().rows + low * size.features, size.features, rows, size.features, band);
    if (to.dquery_table != nullptr)
      product<false, true>(dquery_table + low * size.features, size.features, ds_sums + kPad, size.distances, q,
                           size.features, band, size.features, rows);
    if (to.dbias != nullptr)
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t c = 0; c < band; ++c) dbias[low + c] += this->profile_line(ds_sums, i)[c];
    if (to.dvalue_table == nullptr) return;
    this->fold_sums(p_sums);
    product<false, true>(dvalue_table + low * size.value_features, size.value_features, p_sums + kPad, size.distances,
                         grad, size.value_features, band, size.value_features, rows);
  }

  void write_query() {
    if (to.dquery == nullptr) return;
    T* dquery =
        static_cast<T*>(to.dquery) + ((this->batch * g.query_heads + this->head) * g.queries + row) * g.features;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t f = 0; f < g.features; ++f)
        dquery[i * g.features + f] = static_cast<T>(dq[i * size.features + f] * this->scale);
  }

  void write_keys(const Sum* from, int64_t from_stride, Sum factor, void* result, int64_t count) {
    if (result == nullptr) return;
    T* at = static_cast<T*>(result) + (this->batch * g.key_heads + this->key_head) * g.keys * count;
    for (int64_t j = 0; j < g.keys; ++j)
      for (int64_t f = 0; f < count; ++f) at[j * count + f] = static_cast<T>(from[j * from_stride + f] * factor);
  }

  // Gradients of the tables, float or double [heads, distances, features], from the sums of all tasks.
  static void reduce(const kl::attention::Backward& g, int part, int parts) {
    const Layout size(g);
    const Sum scale = to_scale(g);
    reduce_table(g, size, to_sums(g, 0), g.query_table, g.dquery_table, g.features, false, scale, part, parts);
    reduce_table(g, size, to_sums(g, size.key_sums), g.key_table, g.dkey_table, g.features, true, scale, part, parts);
    reduce_table(g, size, to_sums(g, size.value_sums), g.value_table, g.dvalue_table, g.value_features, false, Sum{1},
                 part, parts);
    reduce_table(g, size, to_sums(g, size.bias_sums), g.bias, g.dbias, 0, false, Sum{1}, part, parts);
  }

  static const Sum* to_sums(const Call& g, int64_t offset) {
    return static_cast<const Sum*>(g.work) + Layout(g).sums + offset;
  }

  static void reduce_table(const kl::attention::Backward& g, const Layout& size, const Sum* sums, const Table& table,
                           void* result, int64_t features, bool downwards, Sum factor, int part, int parts) {
    if (result == nullptr) return;
    const int64_t width = std::max<int64_t>(features, 1), stride = features > 0 ? round_up(features, kPad) : 1;
    const int64_t lines = table.heads * g.distances, group = g.query_heads / table.heads;
    for (int64_t line = lines * part / parts; line < lines * (part + 1) / parts; ++line) {
      const int64_t head = line / g.distances, c = line % g.distances;
      const int64_t r = downwards ? g.distances - 1 - c : c;
      Sum* to = static_cast<Sum*>(result) + line * width;
      std::fill_n(to, width, Sum{0});
      for (int64_t chunk = 0; chunk < g.chunks; ++chunk)
        for (int64_t h = head * group; h < (head + 1) * group; ++h) {
          const Sum* from = sums + (chunk * g.query_heads + h) * size.numbers + r * stride;
          for (int64_t f = 0; f < width; ++f) to[f] += from[f];
        }
      for (int64_t f = 0; f < width; ++f) to[f] *= factor;
    }
  }
};
