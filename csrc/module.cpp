// The importable stmae._C. Loading it registers the CPU kernels; the Python side defines their schemas.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <exception>

#include "base/isa.h"

namespace {

template <typename Action>
PyObject* guarded(Action action) {
  try {
    return action();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyObject* cpu_capability(PyObject*, PyObject*) {
  return guarded([] { return PyUnicode_FromString(stmae::isa_name(stmae::isa())); });
}

PyObject* best_cpu_capability(PyObject*, PyObject*) {
  return guarded([] { return PyUnicode_FromString(stmae::isa_name(stmae::best_isa())); });
}

PyObject* set_cpu_capability(PyObject*, PyObject* argument) {
  return guarded([argument]() -> PyObject* {
    PyObject* bytes = PyUnicode_AsUTF8String(argument);
    if (!bytes) return nullptr;
    const std::string name = PyBytes_AsString(bytes);
    Py_DECREF(bytes);
    stmae::set_isa(name);
    Py_RETURN_NONE;
  });
}

PyMethodDef methods[] = {
    {"cpu_capability", cpu_capability, METH_NOARGS, "Instruction set that the CPU kernels use."},
    {"best_cpu_capability", best_cpu_capability, METH_NOARGS, "Best instruction set that this processor offers."},
    {"set_cpu_capability", set_cpu_capability, METH_O, "Use 'portable', 'avx2', 'avx512', 'avx512_bf16' or 'neon' from now on."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "stmae._C", "CPU kernels of stmae.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
