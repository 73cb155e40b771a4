// What the eager entries of the norms and of dropout share: which calls they take.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "torch_utils.h"

namespace fastnorm {

// Nothing intercepts operators on this thread: no tracing, no functorch transform, no
// __torch_dispatch__ mode, and no __torch_function__ mode but a default device. That one has no say
// here: the entries make every tensor on the device of an input.
bool undisturbed();

// `object` is None, or an ordinary tensor of the CPU or of CUDA, with no subclass behaviour, no
// forward-mode tangent and a dtype of the kernels (or, for `ids`, int64). Sets `out` (undefined for
// None).
bool plain_tensor(PyObject* object, at::Tensor& out, bool ids = false);

// A parameter of `channels` values: of the input's dtype, or any of the three that are not double.
inline bool parameter_fits(const at::Tensor& p, const at::Tensor& x, int64_t channels) {
  return !p.defined() || (p.numel() == channels && p.device() == x.device() &&
                          (p.scalar_type() == at::kDouble) == (x.scalar_type() == at::kDouble));
}

inline at::Tensor dense(const at::Tensor& t) { return t.is_contiguous() ? t : t.contiguous(); }

inline OptionalTensor dense_or_none(const at::Tensor& t) {
  return t.defined() ? OptionalTensor(dense(t)) : std::nullopt;
}

inline bool same_shape(const at::Tensor& t, const at::Tensor& x) {
  return t.sizes() == x.sizes() && t.scalar_type() == x.scalar_type() && t.device() == x.device();
}

inline pybind11::object wrap(const at::Tensor& t) {
  return pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(t));
}

// Batch, group and instance norm: eager_channels.cpp.
void register_channel_norms(pybind11::module_& m);

void register_cross_entropy(pybind11::module_& m);

}  // namespace fastnorm
