// One call's arguments, as the instruction sets' kernels see them, and how its work memory is laid out.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/integer.h"

namespace kl::attention {

constexpr int64_t kRows = 64;                   // queries in work at once
constexpr int64_t kKeys = 256;                  // keys in work at once
constexpr int64_t kPad = 16;                    // lanes of the widest vector
constexpr int64_t kBlockStride = kKeys + kPad;  // no power of two: rows would share cache sets
constexpr int64_t kStripStride = kRows + 4 * kPad;

struct Heads {
  const void* data;
  int64_t batch, head, row;  // strides in elements
};

// [heads, distances, features], float or double. One head serves all, none: there is no table.
struct Table {
  const void* data;
  int64_t heads;
};

struct Call {
  Heads query, key, value;
  Table query_table, key_table, value_table, bias;
  const uint8_t* mask;
  const int32_t* documents;
  int64_t batch, query_heads, key_heads, queries, keys, features, value_features;
  int64_t nearest, distances;  // the distance of the tables' first row, and the number of rows
  bool causal, content;
  int64_t offset;
  double scale;
  void* work;
};

struct Forward : Call {
  void *out, *peak, *mass;
};

struct Backward : Call {
  Heads grad_out;
  const void *out, *peak, *mass;
  void *dquery, *dkey, *dvalue, *dquery_table, *dkey_table, *dvalue_table, *dbias;
  int64_t chunks;
};

// Numbers in `work`: the packed tables, partial sums of their gradients, then each thread's own memory.
struct Layout {
  int64_t features, value_features, keys, distances;  // as padded
  int64_t key_table, value_table, sums;               // where they begin; the query table begins at 0
  int64_t key_sums, value_sums, bias_sums, numbers;   // within the sums of one head, and their count

  explicit Layout(const Call& g)
      : features(round_up(g.features, kPad)),
        value_features(round_up(g.value_features, kPad)),
        keys(round_up(g.keys, kPad) + kPad),
        distances(round_up(g.distances, kPad) + 2 * kPad) {
    key_table = 2 * g.query_table.heads * distances * features;
    value_table = key_table + 2 * g.key_table.heads * distances * features;
    sums = value_table + 2 * g.value_table.heads * distances * value_features;
    key_sums = g.query_table.heads > 0 ? distances * features : 0;
    value_sums = key_sums + (g.key_table.heads > 0 ? distances * features : 0);
    bias_sums = value_sums + (g.value_table.heads > 0 ? distances * value_features : 0);
    numbers = bias_sums + (g.bias.heads > 0 ? distances : 0);
  }

  int64_t forward_thread(int part) const {
    const int64_t of_keys = keys * (features + value_features + 9);
    const int64_t of_rows = kRows * (features + value_features + kBlockStride + 2 * distances);
    return sums + part * (of_keys + of_rows + kPad * kStripStride);
  }

  int64_t backward_thread(const Backward& g, int part) const {
    const int64_t of_keys = keys * (3 * features + 2 * value_features + 11);
    const int64_t of_rows = kRows * (2 * features + 2 * value_features + 2 * kBlockStride + 4 * distances);
    return sums + g.chunks * g.query_heads * numbers + part * (of_keys + of_rows + kPad * kStripStride);
  }
};

// What one instruction set offers for one dtype. Work is cut into `parts`; a part is done by one thread.
struct Kernels {
  void (*pack)(const Call&, int part, int parts);
  void (*forward)(const Forward&, int part, int parts);
  void (*backward)(const Backward&, int part, int parts);
  void (*reduce)(const Backward&, int part, int parts);
};

}  // namespace kl::attention
