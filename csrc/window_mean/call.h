// One call's arguments, as the instruction sets' kernels see them.
#pragma once

#include <cstdint>

namespace kl::window {

struct Call {
  const void* x;
  int64_t x_batch, x_head, x_row;
  const void* before;
  int64_t before_batch, before_head;
  const void* after;
  int64_t after_batch, after_head;
  const int64_t* reach;
  const int32_t* ends;
  int64_t batch, heads, rows, features;
  void* work;
  int64_t work_rows;
  void* y;
};

}  // namespace kl::window
