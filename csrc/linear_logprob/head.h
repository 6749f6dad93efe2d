// One call's arguments, as the instruction sets' kernels see them.
#pragma once

#include <cstdint>

namespace kl::logprob {

struct Head {
  const void* hidden;
  int64_t hidden_stride;
  const void* weight;
  int64_t weight_stride;
  const void* bias;
  const int64_t* target;
  int64_t rows, features, classes;
  double temperature;
  int64_t block;
  void* work;
};

struct Forward : Head {
  void *logprob, *lse, *entropy, *dlogprob, *dentropy;
};

struct Gradient : Head {
  const void *lse, *entropy, *grad_logprob, *grad_entropy;
  int64_t first_class, last_class;
  void* dz;
  int64_t dz_stride;
};

// What one instruction set offers for one dtype. Work is cut into `parts`; a part is done by one thread.
struct Kernels {
  void (*forward)(const Forward&, int part, int parts);
  void (*gradient)(const Gradient&, int part, int parts);
};

}  // namespace kl::logprob
