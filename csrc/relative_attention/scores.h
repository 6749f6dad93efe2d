// Scores of a block of queries against a block of keys, and what both passes do around them.
//
// A row of a profile q.table is surrounded by repetitions of its ends, so that the terms of any vector of keys are one
// load: at the keys' distances, or among the repetitions where the vector is beyond the table. The terms k.table of a
// strip of keys are a product with the distances that occur to them, whose rows are shifted against each other and
// transposed; such a line of a key runs down the distances, and is surrounded like that of a query.

template <typename T>
struct Scores {
  using Sum = typename kl::compute<T>::type;
  using V = vec<Sum>;
  using Index = std::conditional_t<sizeof(Sum) == 4, int32_t, int64_t>;
  static constexpr int64_t kLanes = KL_VECTOR_BYTES / sizeof(Sum);
  static constexpr Sum kInfinity = std::numeric_limits<Sum>::infinity();

  const Call& g;
  const Layout size;
  const Sum scale;
  const int64_t farthest;  // distance of the tables' last row
  Sum* memory;             // what is not taken yet
  Sum* keys_t;             // [features, size.keys]
  Sum* limit;              // infinity, or -infinity for a masked key [size.keys]
  Sum* beyond[2];          // k.table at the table's ends, four times [4, size.keys]
  Sum* q;                  // [kRows, features]
  Sum* scores;             // without scale and profile [kRows, kBlockStride]
  Sum* profile;            // scale q.query_table + bias [kRows, size.distances]
  Sum* strip;              // [kPad, kStripStride]
  int64_t batch = -1, key_head = -1, head = -1;
  int64_t next_batch, next_head;
  int64_t row, rows, position;        // of the block of queries; the position of its first
  int64_t first_key, last_key;        // what the block sees
  int64_t low, band;                  // the first row of the tables that occurs to it, and their number
  int64_t strip_top, strip_band;      // the largest distance that occurs to a strip of keys, and their number
  int64_t first[kRows], last[kRows];  // what each query sees
  int64_t begin[kRows / kPad], end[kRows / kPad];  // columns of the block of keys that kPad queries use

  Scores(const Call& call, int64_t offset)
      : g(call), size(call), scale(static_cast<Sum>(call.scale)), farthest(call.nearest + call.distances - 1) {
    memory = static_cast<Sum*>(g.work) + offset;
    keys_t = take(size.features * size.keys);
    limit = take(size.keys);
    for (Sum*& end : beyond) end = take(4 * size.keys);
    q = take(kRows * size.features);
    scores = take(kRows * kBlockStride);
    profile = take(kRows * size.distances);
    strip = take(kPad * kStripStride);
  }

  Sum* take(int64_t count) { return std::exchange(memory, memory + count); }

  static const T* at(const Heads& heads, int64_t batch, int64_t head, int64_t row) {
    return static_cast<const T*>(heads.data) + batch * heads.batch + head * heads.head + row * heads.row;
  }

  // What pack_tables made of the current head's table; the key table's rows run down the distances.
  struct Packed {
    Sum *rows, *columns;  // [size.distances, features], [features, size.distances]
  };
  Packed packed(const Table& table, int64_t offset, int64_t features) const {
    const int64_t numbers = features * size.distances;
    Sum* rows = static_cast<Sum*>(g.work) + offset + (table.heads == 1 ? 0 : head) * 2 * numbers;
    return {rows, rows + numbers};
  }
  Packed query_table() const { return packed(g.query_table, 0, size.features); }
  Packed key_table() const { return packed(g.key_table, size.key_table, size.features); }
  Packed value_table() const { return packed(g.value_table, size.value_table, size.value_features); }

  static void pack_tables(const Call& g, int part, int parts) {
    const Layout size(g);
    Sum* work = static_cast<Sum*>(g.work);
    pack_table(work, g.query_table, g, g.features, false, part, parts);
    pack_table(work + size.key_table, g.key_table, g, g.features, true, part, parts);
    pack_table(work + size.value_table, g.value_table, g, g.value_features, false, part, parts);
  }

  static void pack_table(Sum* to, const Table& table, const Call& g, int64_t count, bool downwards, int part,
                         int parts) {
    const int64_t features = round_up(count, kPad), stride = Layout(g).distances;
    for (int64_t h = table.heads * part / parts; h < table.heads * (part + 1) / parts; ++h) {
      Sum *rows = to + h * 2 * stride * features, *columns = rows + stride * features;
      for (int64_t r = 0; r < stride; ++r) {
        const int64_t c = downwards ? g.distances - 1 - r : r, present = r < g.distances ? count : 0;
        std::copy_n(static_cast<const Sum*>(table.data) + (h * g.distances + c) * count, present, rows + r * features);
        std::fill_n(rows + r * features + present, features - present, Sum{0});
      }
      for (int64_t r = 0; r < stride; r += kLanes) transpose_rows(columns + r, stride, rows + r * features, features);
    }
  }

  // to [columns, to_stride] = the transpose of from [kLanes, columns]
  static KL_INLINE void transpose_rows(Sum* to, int64_t to_stride, const Sum* from, int64_t columns) {
    for (int64_t f = 0; f < columns; f += kLanes) {
      V block[kLanes];
#pragma GCC unroll 16
      for (int64_t j = 0; j < kLanes; ++j) block[j] = load(from + j * columns + f);
      transpose<Sum>(block);
#pragma GCC unroll 16
      for (int64_t j = 0; j < kLanes; ++j) store(to + (f + j) * to_stride, block[j]);
    }
  }

  // Row `row` of the arrays of the next head: while one of few queries is computed, the next comes from memory.
  void prefetch(int64_t row) const {
    if (g.queries > kRows || next_batch == g.batch) return;
    if (row < g.queries) prefetch(at(g.query, next_batch, next_head, row), g.features);
    const int64_t next_key_head = next_head / (g.query_heads / g.key_heads);
    if (row >= g.keys || (next_key_head == key_head && next_batch == batch)) return;
    prefetch(at(g.key, next_batch, next_key_head, row), g.features);
    prefetch(at(g.value, next_batch, next_key_head, row), g.value_features);
  }
  static KL_INLINE void prefetch(const T* from, int64_t count) {
    for (int64_t f = 0; f < count; f += 64 / sizeof(T)) __builtin_prefetch(from + f);
  }

  // to [padded with zeros] = from [count]
  static KL_INLINE void widen(Sum* to, const T* from, int64_t count) {
    int64_t j = 0;
    if constexpr (std::is_same_v<T, Sum>)
      for (; j + kLanes <= count; j += kLanes) store(to + j, load(from + j));
    for (; j < count; ++j) to[j] = static_cast<Sum>(from[j]);
    for (; j % kPad != 0; ++j) to[j] = 0;
  }

  // The current key head's rows and, where not null, their transpose. A rows_step of 0 keeps no rows.
  void pack(const Heads& heads, int64_t count, Sum* rows_to, int64_t rows_step, Sum* columns_to) const {
    const int64_t padded = round_up(count, kPad);
    for (int64_t j = 0; j < round_up(g.keys, kPad); j += kLanes) {
      Sum* to = rows_to + j * rows_step;
      for (int64_t i = 0; i < kLanes; ++i)
        if (j + i < g.keys)
          widen(to + i * padded, at(heads, batch, key_head, j + i), count);
        else
          std::fill_n(to + i * padded, padded, Sum{0});
      if (columns_to != nullptr) transpose_rows(columns_to + j, size.keys, to, padded);
    }
  }

  // Calls `pack_heads` where the key head is another one.
  template <typename Pack>
  void set_head(int64_t to_batch, int64_t to_head, Pack pack_heads) {
    const int64_t to_key_head = to_head / (g.query_heads / g.key_heads);
    const bool same_keys = batch == to_batch && key_head == to_key_head;
    if (same_keys && head == to_head) return;
    if (g.mask != nullptr && batch != to_batch)
      for (int64_t j = 0; j < g.keys; ++j) limit[j] = g.mask[to_batch * g.keys + j] ? kInfinity : -kInfinity;
    batch = to_batch;
    key_head = to_key_head;
    head = to_head;
    if (!same_keys) pack_heads();
    for (int side = 0; side < 2; ++side)
      if (reaches_beyond(side))
        product<true, false>(beyond[side], size.keys, key_table().rows + end_row(side) * size.features, 0, keys_t,
                             size.keys, 4, round_up(g.keys, kLanes), g.features);
  }

  // The row of the packed key table for its nearest (side 0) or its farthest (1) distance.
  int64_t end_row(int side) const { return side == 0 ? g.distances - 1 : 0; }

  // Which end of the key table is that of all distances of a strip of keys and the block of queries; -1: neither.
  int side_of(int64_t key, int64_t position, int64_t rows) const {
    if (key + kLanes - 1 - position <= g.nearest) return 0;
    return key - (position + rows - 1) >= farthest ? 1 : -1;
  }

  bool reaches_beyond(int side) const {
    if (g.key_table.heads == 0) return false;
    if (side == 0) return side_of(0, kl::round_down(g.queries - 1, kRows) + g.offset, 0) == 0;
    return side_of(kl::round_down(g.keys - 1, kLanes), g.offset, std::min(kRows, g.queries)) == 1;
  }

  void set_rows(int64_t to_row) {
    row = to_row;
    rows = std::min(kRows, g.queries - row);
    position = row + g.offset;
    first_key = g.keys;
    last_key = 0;
    for (int64_t i = 0; i < rows; ++i) {
      first[i] = g.documents == nullptr ? 0 : g.documents[row + i];
      last[i] = g.documents == nullptr ? g.keys : g.documents[g.queries + row + i];
      if (g.causal) last[i] = std::min(last[i], position + i + 1);
      if (first[i] >= last[i]) continue;
      first_key = std::min(first_key, first[i]);
      last_key = std::max(last_key, last[i]);
    }
    for (int64_t i = 0; i < rows; ++i) widen(q + i * size.features, at(g.query, batch, head, row + i), g.features);
    std::fill_n(q + rows * size.features, (round_up(rows, 4) - rows) * size.features, Sum{0});
    if (first_key >= last_key || g.distances == 0) return;
    low = std::clamp(first_key - (position + rows - 1), g.nearest, farthest) - g.nearest;
    band = std::clamp(last_key - 1 - position, g.nearest, farthest) - g.nearest - low + 1;
    if (has_profile()) set_profile();
  }

  int64_t first_column() const { return kl::round_down(first_key, kPad); }

  bool has_profile() const { return g.query_table.heads > 0 || g.bias.heads > 0; }

  void set_profile() {
    if (g.query_table.heads > 0) multiply_table(profile, q, size.features, query_table(), g.features);
    const Sum* bias = static_cast<const Sum*>(g.bias.data) + (g.bias.heads == 1 ? 0 : head) * g.distances + low;
    for (int64_t i = 0; i < rows; ++i) {
      Sum* line = profile_line(profile, i);
      if (g.query_table.heads == 0)
        std::copy_n(bias, band, line);
      else if (g.bias.heads == 0)
        for (int64_t c = 0; c < band; ++c) line[c] *= scale;
      else
        for (int64_t c = 0; c < band; ++c) line[c] = line[c] * scale + bias[c];
      repeat_ends(line, band);
    }
  }

  Sum* profile_line(Sum* lines, int64_t i) const { return lines + i * size.distances + kPad; }

  // lines = x [rows, stride] table^T at the distances that occur
  void multiply_table(Sum* lines, const Sum* x, int64_t stride, Packed table, int64_t depth) const {
    product<true, false>(lines + kPad, size.distances, x, stride, table.columns + low, size.distances, rows,
                         round_up(band, kLanes), depth);
  }

  static KL_INLINE void repeat_ends(Sum* line, int64_t band) {
    store(line + band, V{} + line[band - 1]);
    store(line - kLanes, V{} + line[0]);
  }

  // Where a vector of keys stands in the line of query i.
  KL_INLINE int64_t place(int64_t i, int64_t key) const {
    return std::clamp<int64_t>(key - (position + i) - g.nearest - low, -kLanes, band);
  }

  // scores = q.k + k.key_table of `count` keys from a multiple of kPad on
  void multiply_keys(int64_t key, int64_t count) {
    for (int64_t i = 0, of = 0; i < rows; i += kPad, ++of) {
      const int64_t height = std::min(kPad, rows - i);
      int64_t from = count, to = 0;
      for (int64_t r = i; r < i + height; ++r) {
        if (first[r] >= last[r]) continue;
        from = std::min(from, first[r] - key);
        to = std::max(to, last[r] - key);
      }
      begin[of] = kl::round_down(std::max<int64_t>(from, 0), kPad);
      end[of] = round_up(std::min(to, count), kPad);
      if (begin[of] >= end[of]) begin[of] = end[of] = 0;
      Sum* c = scores + i * kBlockStride + begin[of];
      product<true, false>(c, kBlockStride, q + i * size.features, size.features, keys_t + key + begin[of], size.keys,
                           height, end[of] - begin[of], g.content ? g.features : 0);
    }
    if (g.key_table.heads > 0)
      for (int64_t j = 0; j < count; j += kLanes) add_key_table(key, j);
  }

  bool uses(int64_t i, int64_t column) const { return column >= begin[i / kPad] && column < end[i / kPad]; }

  void add_key_table(int64_t key, int64_t column) {
    const int64_t j = key + column;
    const int side = side_of(j, position, rows);
    if (side >= 0) {
      const V terms = load(beyond[side] + j);
      for (int64_t i = 0; i < rows; ++i)
        if (uses(i, column)) store(score(i, column), load(score(i, column)) + terms);
      return;
    }
    set_strip(j);
    product<true, true>(strip + kPad, kStripStride, keys_t + j, size.keys, key_table().columns + farthest - strip_top,
                        size.distances, kLanes, round_up(strip_band, kLanes), g.features);
    for (int64_t l = 0; l < kLanes; ++l) repeat_ends(strip_line(l), strip_band);
    for (int64_t i = 0; i < rows; i += kLanes) {
      if (!uses(i, column)) continue;
      V terms[kLanes];
#pragma GCC unroll 16
      for (int64_t l = 0; l < kLanes; ++l) terms[l] = load(strip_line(l) + strip_place(j + l, i));
      transpose<Sum>(terms);
#pragma GCC unroll 16
      for (int64_t l = 0; l < kLanes; ++l) store(score(i + l, column), load(score(i + l, column)) + terms[l]);
    }
  }

  // The distances that occur to a strip of keys and the block of queries.
  void set_strip(int64_t key) {
    strip_top = std::clamp(key + kLanes - 1 - position, g.nearest, farthest);
    strip_band = strip_top - std::clamp(key - (position + rows - 1), g.nearest, farthest) + 1;
  }
  Sum* strip_line(int64_t l) const { return strip + l * kStripStride + kPad; }
  // Where a vector of queries stands in the line of a key.
  KL_INLINE int64_t strip_place(int64_t key, int64_t i) const {
    return std::clamp<int64_t>(strip_top - (key - (position + i)), -kLanes, strip_band);
  }

  Sum* score(int64_t i, int64_t column) const { return scores + i * kBlockStride + column; }

  // Calls of_vector(column, the scores' final values) for the vectors of keys that query i sees, in columns
  // [from, to); a score outside is -infinity.
  template <typename OfVector>
  KL_INLINE void each_vector(int64_t i, int64_t key, int64_t from, int64_t to, OfVector of_vector) const {
    vec<Index> lane;
#pragma GCC unroll 16
    for (int64_t l = 0; l < kLanes; ++l) lane[l] = l;
    const Sum* line = has_profile() ? profile_line(profile, i) : nullptr;
    for (int64_t j = kl::round_down(from, kLanes); j < to; j += kLanes) {
      V z = load(score(i, j)) * scale;
      if (line != nullptr) z += load(line + place(i, key + j));
      const V none = V{} - kInfinity;
      if (g.mask != nullptr) z = z < load(limit + key + j) ? z : load(limit + key + j);
      if (j < from || j + kLanes > to) {
        const vec<Index> at = lane + static_cast<Index>(j);
        z = at >= static_cast<Index>(from) ? z : none;
        z = at < static_cast<Index>(to) ? z : none;
      }
      of_vector(j, z);
    }
  }

  // Zeros in the columns that query i does not see, of those its neighbours use.
  void clear_beside(Sum* line, int64_t i, int64_t from, int64_t to) const {
    const int64_t first_column = begin[i / kPad], last_column = end[i / kPad];
    if (from >= to) from = to = last_column;
    const int64_t left = kl::round_down(from, kLanes), right = round_up(to, kLanes);
    for (int64_t j = first_column; j < left; j += kLanes) store(line + j, V{});
    for (int64_t j = right; j < last_column; j += kLanes) store(line + j, V{});
  }

  // Sums by distance, in lines like those of a profile.
  void clear_sums(Sum* lines) const {
    for (int64_t i = 0; i < rows; ++i) clear_line(profile_line(lines, i), band);
  }
  // Products round rows up to 4: beyond the band there are as many zeros.
  static KL_INLINE void clear_line(Sum* line, int64_t band) {
    std::fill_n(line - kLanes, kLanes + band + std::max<int64_t>(kLanes, 4), Sum{0});
  }
  KL_INLINE void add_by_distance(Sum* to, const Sum* line, int64_t i, int64_t key, int64_t from, int64_t end) const {
    V below{}, above{};
    for (int64_t j = kl::round_down(from, kLanes); j < end; j += kLanes) {
      const int64_t at = place(i, key + j);
      if (at == -kLanes)
        below += load(line + j);
      else if (at == band)
        above += load(line + j);
      else
        store(to + at, load(to + at) + load(line + j));
    }
    store(to - kLanes, load(to - kLanes) + below);
    store(to + band, load(to + band) + above);
  }
  // What stands beyond the ends is theirs.
  void fold_sums(Sum* lines) const {
    for (int64_t i = 0; i < rows; ++i) fold_ends(profile_line(lines, i), band);
  }
  static KL_INLINE void fold_ends(Sum* line, int64_t band) {
    line[0] += sum_of(load(line - kLanes));
    line[band - 1] += sum_of(load(line + band));
    store(line + band, V{});
  }

  static KL_INLINE Sum sum_of(V v) {
    Sum values[kLanes], sum = 0;
    store(values, v);
    for (int64_t l = 0; l < kLanes; ++l) sum += values[l];
    return sum;
  }
  static KL_INLINE Sum largest_of(V v) {
    Sum values[kLanes];
    store(values, v);
    return *std::max_element(values, values + kLanes);
  }
};
