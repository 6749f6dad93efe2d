// Attention whose scores and values depend on the distance of key and query through tables, and its gradients.
#pragma once

#include <cstdint>

// query [batch, query_heads, queries, features], key [batch, key_heads, keys, features], value [batch, key_heads, keys,
// value_features], with strides in elements; the last dimension is contiguous. What is wide is float, double for
// double: query_table and key_table [heads, distances, features], value_table [heads, distances, value_features] and
// bias [heads, distances], contiguous; heads are 1, as many as the query's, or 0 where there is no such table.
// mask [batch, keys] and documents [2, queries], the first key a query may see and the one after the last, may be null.
//
// Key j and query i are j - i - offset apart; distance d takes row clamp(d - nearest, 0, distances - 1) of the tables.
// score = scale (q.k content + q.query_table + k.key_table) + bias, out = sum p (v + value_table) with
// p = exp(score - peak) / mass; where there is no key to see, out, peak and mass are 0.
//
// With pad(n) = n up to a multiple of 16, f = pad(features), v = pad(value_features), r = pad(distances) + 32,
// k = pad(keys) + 16, work has room for this many wide numbers:
//   r (2 f (query_heads_of_table + key_heads_of_table) + 2 v value_heads_of_table)
//   + threads (k (f + v + 9) + 64 (f + v + 272 + 2 r) + 2048) forward,
//   + threads (k (3 f + 2 v + 11) + 64 (2 f + 2 v + 544 + 4 r) + 2048)
//   + chunks query_heads r (f + f + v + 1, each where there is such a table) backward.
//
// Backward: out, peak and mass are forward's; gradients may be null, those of tables are wide, all are contiguous. The
// batch is cut into `chunks`, at most `batch`; results depend on their number, never on `threads`.
#define KL_ATTENTION_INPUTS                                                                                          \
  const void *query, int64_t query_batch, int64_t query_head, int64_t query_row, const void *key, int64_t key_batch, \
      int64_t key_head, int64_t key_row, const void *value, int64_t value_batch, int64_t value_head,                 \
      int64_t value_row, const void *query_table, int64_t query_table_heads, const void *key_table,                  \
      int64_t key_table_heads, const void *value_table, int64_t value_table_heads, const void *bias,                 \
      int64_t bias_heads, const uint8_t *mask, const int32_t *documents, int64_t batch, int64_t query_heads,         \
      int64_t key_heads, int64_t queries, int64_t keys, int64_t features, int64_t value_features, int64_t nearest,   \
      int64_t distances, bool causal, bool content, int64_t offset, double scale, void *work, int threads
#define KL_ATTENTION_GRADIENTS                                                                                      \
  const void *grad_out, int64_t grad_batch, int64_t grad_head, int64_t grad_row, const void *out, const void *peak, \
      const void *mass, void *dquery, void *dkey, void *dvalue, void *dquery_table, void *dkey_table,               \
      void *dvalue_table, void *dbias, int64_t chunks

#define KL_DECLARE_ATTENTION(suffix)                                                                              \
  extern "C" void kl_relative_attention_forward_##suffix(KL_ATTENTION_INPUTS, void* out, void* peak, void* mass); \
  extern "C" void kl_relative_attention_backward_##suffix(KL_ATTENTION_INPUTS, KL_ATTENTION_GRADIENTS);

KL_DECLARE_ATTENTION(float32)
KL_DECLARE_ATTENTION(float64)
KL_DECLARE_ATTENTION(bfloat16)
KL_DECLARE_ATTENTION(float16)
