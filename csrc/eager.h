// What the eager entries of the norms and of dropout share: which calls they take.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>

#include "torch_utils.h"

namespace fastnorm {

// Nothing intercepts operators on this thread: no tracing, no functorch transform, no
// __torch_dispatch__ or __torch_function__ mode.
bool undisturbed();

// `object` is None, or an ordinary tensor of the CPU or of CUDA, with no subclass behaviour, no
// forward-mode tangent and a dtype of the kernels. Sets `out` (undefined for None).
bool plain_tensor(PyObject* object, at::Tensor& out);

}  // namespace fastnorm
