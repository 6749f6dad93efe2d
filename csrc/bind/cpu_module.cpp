#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C_cpu, m) { m.doc() = "kernelab's CPU kernels"; }
