// Python's view of the CPU kernels: raw pointers in, nothing out. kernelab/_core/native.py checks what goes in.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "dropout/dropout.h"

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

PYBIND11_MODULE(_C_cpu, module) {
  define(module, "dropout_float32", kl_dropout_float32);
  define(module, "dropout_float64", kl_dropout_float64);
  define(module, "dropout_bfloat16", kl_dropout_bfloat16);
  define(module, "dropout_float16", kl_dropout_float16);
}
