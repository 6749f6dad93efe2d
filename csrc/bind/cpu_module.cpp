// Python's view of the CPU kernels: raw pointers in, nothing out. kernelab/_core/native.py checks what goes in.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "linear_logprob/linear_logprob.h"
#include "lora_linear/lora_linear.h"
#include "relative_attention/relative_attention.h"
#include "window_mean/window_sum.h"

namespace {

// A pointer argument arrives as the integer of Tensor.data_ptr().
template <typename T>
struct from_python {
  using type = T;
};
template <typename T>
struct from_python<T*> {
  using type = std::uintptr_t;
};

template <typename... Args>
void define(pybind11::module_& module, const char* name, void (*function)(Args...)) {
  module.def(
      name,
      [function](typename from_python<Args>::type... args) {
        // A C cast turns the integer into the pointer and is the identity for every other argument.
        function((Args)args...);
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace

#define KL_DEFINE(dtype)                                                                         \
  define(module, "linear_logprob_forward_" #dtype, kl_linear_logprob_forward_##dtype);           \
  define(module, "linear_logprob_gradient_" #dtype, kl_linear_logprob_gradient_##dtype);         \
  define(module, "lora_forward_" #dtype, kl_lora_forward_##dtype);                               \
  define(module, "lora_backward_" #dtype, kl_lora_backward_##dtype);                             \
  define(module, "relative_attention_forward_" #dtype, kl_relative_attention_forward_##dtype);   \
  define(module, "relative_attention_backward_" #dtype, kl_relative_attention_backward_##dtype); \
  define(module, "window_sum_" #dtype, kl_window_sum_##dtype);

PYBIND11_MODULE(_C_cpu, module) {
  KL_DEFINE(float32)
  KL_DEFINE(float64)
  KL_DEFINE(bfloat16)
  KL_DEFINE(float16)
}
