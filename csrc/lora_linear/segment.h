// One call's arguments, as the instruction sets' kernels see them.
#pragma once

#include <cstdint>

namespace kl {

template <typename Pointer>
struct Matrix {
  Pointer data;
  int64_t stride;  // elements from row to row
};
using Input = Matrix<const void*>;
using Output = Matrix<void*>;

struct Segment {
  const void *a, *b;
  int64_t rows, in, out, rank;
  double scale;
  int64_t first_row;
  uint64_t seed;
  uint32_t threshold;
  double keep;
  void* work;
};

struct Forward : Segment {
  Input x, base;
  Output y, s;
};

struct Backward : Segment {
  Input dy, x, s;
  Output dx;
  void *da, *db;
};

constexpr int kPad = 16;  // the packed sizes are multiples of this, the lanes of the widest register
inline int64_t padded(int64_t size) { return (size + kPad - 1) / kPad * kPad; }

// What one instruction set offers for one dtype. Work is cut into `parts`; a part is done by one thread.
struct Kernels {
  void (*forward_pack)(const Forward&, int part, int parts);
  void (*forward)(const Forward&, int part, int parts);
  void (*backward_pack)(const Backward&, int part, int parts);
  void (*backward)(const Backward&, int part, int parts);
  void (*backward_reduce)(const Backward&, int part, int parts);
};

}  // namespace kl
