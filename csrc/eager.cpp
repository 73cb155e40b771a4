// Eager entries: the shortest way from a Python call to a kernel. Each takes a call it fully
// understands and returns None for any other (wrong arguments, subclasses, transforms, modes);
// Python then validates, explains and chooses. Nothing here raises or warns by itself.
#include "eager.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/PyInterpreter.h>

#include <cmath>

#include "autograd.h"
#include "cpu/norm_cpu.h"
#include "dropout.h"

namespace fastnorm {

namespace py = pybind11;

namespace {

// Whether `set` has a functionality that `usual` lacks. (Subtraction leaves the backend bits.)
bool exceeds(c10::DispatchKeySet set, c10::DispatchKeySet usual) {
  return ((set - usual).raw_repr() & ~c10::full_backend_mask) != 0;
}

// Set while fastnorm.explain follows a call through Python.
thread_local bool explaining = false;

// The class of the mode that torch.set_default_device and `with torch.device(...)` push.
PyTypeObject* device_context = nullptr;

bool only_default_devices() {
  using Modes = at::impl::PythonTorchFunctionTLS;
  for (int64_t i = 0; i < Modes::stack_len(); ++i) {
    if (Py_TYPE(Modes::get_stack_at(i)->ptr(getPyInterpreter())) != device_context) return false;
  }
  return true;
}

}  // namespace

bool undisturbed() {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet usual =
      c10::DispatchKeySet({DispatchKey::BackendSelect, DispatchKey::ADInplaceOrView}) |
      c10::autocast_dispatch_keyset;
  const auto tls = c10::impl::tls_local_dispatch_key_set();
  return !explaining && !exceeds(tls.included_, usual) &&
         (!at::impl::torch_function_mode_enabled() || only_default_devices());
}

// The CUDA kernels live in a library of their own, which may come later or never.
bool cuda_is_loaded() {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fastnorm::norm_fwd", "");
  return op.hasKernelForDispatchKey(c10::DispatchKey::CUDA);
}

bool plain_tensor(PyObject* object, at::Tensor& out, bool ids) {
  using c10::DispatchKey;
  if (object == Py_None) return true;
  if (!THPVariable_CheckExact(object)) return false;
  const at::Tensor& t = THPVariable_Unpack(object);
  constexpr c10::DispatchKeySet usual =
      c10::DispatchKeySet({DispatchKey::CPU, DispatchKey::CUDA, DispatchKey::AutogradCPU,
                           DispatchKey::AutogradCUDA, DispatchKey::ADInplaceOrView}) |
      c10::autocast_dispatch_keyset;
  if (exceeds(t.key_set(), usual)) return false;
  const auto dtype = t.scalar_type();
  const bool of_kernels = ids ? dtype == at::kLong
                              : dtype == at::kFloat || dtype == at::kBFloat16 ||
                                    dtype == at::kHalf || dtype == at::kDouble;
  if (!of_kernels) return false;
  if (t._fw_grad(0).defined()) return false;
  if (!t.is_cpu() && !(t.is_cuda() && cuda_is_loaded())) return false;
  out = t;
  return true;
}

namespace {

// The trailing dimensions a layer or RMS norm spans, read from a tuple of int. Returns the number
// of elements, or -1.
int64_t normalized_numel(PyObject* shape, const at::Tensor& x, const at::Tensor& weight,
                         const at::Tensor& bias) {
  if (!PyTuple_Check(shape)) return -1;
  const int64_t dims = PyTuple_GET_SIZE(shape), offset = x.dim() - dims;
  if (dims == 0 || offset < 0) return -1;
  if ((weight.defined() && weight.dim() != dims) || (bias.defined() && bias.dim() != dims))
    return -1;
  int64_t n = 1;
  for (int64_t i = 0; i < dims; ++i) {
    PyObject* item = PyTuple_GET_ITEM(shape, i);
    if (!PyLong_CheckExact(item)) return -1;
    int overflow = 0;
    const int64_t size = PyLong_AsLongLongAndOverflow(item, &overflow);
    if (overflow != 0 || size != x.size(offset + i) ||
        (weight.defined() && weight.size(i) != size) || (bias.defined() && bias.size(i) != size)) {
      return -1;
    }
    n *= size;
  }
  return n;
}

// None is RMS norm's default: the spacing of the type that the statistics are in.
double read_eps(PyObject* eps, const at::Tensor& x) {
  if (PyFloat_CheckExact(eps)) return PyFloat_AS_DOUBLE(eps);
  if (eps != Py_None) return -1.0;
  return x.scalar_type() == at::kDouble ? std::numeric_limits<double>::epsilon()
                                        : std::numeric_limits<float>::epsilon();
}

NormCall row_call(const at::Tensor& x, int64_t n, int64_t statistic, double eps) {
  NormCall call;
  call.view = {n == 0 ? 0 : x.numel() / n, 1, 1, n, 1, 1};
  call.statistic = statistic;
  call.eps = eps;
  return call;
}

// layer_norm and rms_norm over trailing dimensions, without dropout.
py::object row_norm(const py::handle& input, const py::handle& normalized_shape,
                    const py::handle& weight, const py::handle& bias, const py::handle& eps_arg,
                    int64_t statistic, double weight_offset, int64_t activation,
                    const py::handle& residual) {
  at::Tensor x, w, b, r;
  if (!undisturbed() || activation < 0 || !plain_tensor(input.ptr(), x) || !x.defined() ||
      !plain_tensor(weight.ptr(), w) || !plain_tensor(bias.ptr(), b) ||
      !plain_tensor(residual.ptr(), r)) {
    return py::none();
  }
  const int64_t n = normalized_numel(normalized_shape.ptr(), x, w, b);
  const double eps = read_eps(eps_arg.ptr(), x);
  if (n <= 0 || !(eps >= 0 && std::isfinite(eps)) || !parameter_fits(w, x, n) ||
      !parameter_fits(b, x, n) || (r.defined() && !same_shape(r, x))) {
    return py::none();
  }
  NormCall call = row_call(x, n, statistic, eps);
  call.weight_offset = weight_offset;
  call.activation = activation;
  at::Tensor y;
  {
    py::gil_scoped_release release;
    y = norm(dense(x), dense_or_none(w), dense_or_none(b), dense_or_none(r), {}, {}, {}, call).y;
  }
  return wrap(y);
}

py::object add_row_norm(const py::handle& input, const py::handle& residual,
                        const py::handle& normalized_shape, const py::handle& weight,
                        const py::handle& bias, const py::handle& eps_arg, int64_t statistic,
                        double weight_offset) {
  at::Tensor x, w, b, r;
  if (!undisturbed() || !plain_tensor(input.ptr(), x) || !x.defined() ||
      !plain_tensor(weight.ptr(), w) || !plain_tensor(bias.ptr(), b) ||
      !plain_tensor(residual.ptr(), r) || !r.defined() || !same_shape(r, x)) {
    return py::none();
  }
  const int64_t n = normalized_numel(normalized_shape.ptr(), x, w, b);
  const double eps = read_eps(eps_arg.ptr(), x);
  if (n <= 0 || !(eps >= 0 && std::isfinite(eps)) || !parameter_fits(w, x, n) ||
      !parameter_fits(b, x, n))
    return py::none();
  NormCall call = row_call(x, n, statistic, eps);
  call.weight_offset = weight_offset;
  at::Tensor y, sum;
  {
    py::gil_scoped_release release;
    std::tie(y, sum) = add_norm(dense(x), dense(r), dense_or_none(w), dense_or_none(b), {}, call);
  }
  return py::make_tuple(wrap(y), wrap(sum));
}

// The general call, for what Python has already validated and laid out: dense inputs, a view.
std::tuple<at::Tensor, OptionalTensor, OptionalTensor> any_norm(
    const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& residual, const OptionalTensor& mean, const OptionalTensor& var,
    const OptionalTensor& seed, std::array<int64_t, 6> view, int64_t statistic, double eps,
    double weight_offset, int64_t activation, double dropout_p) {
  py::gil_scoped_release release;
  const NormCall call{view, statistic, eps, weight_offset, activation, dropout_p};
  NormOutput out = norm(x, weight, bias, residual, mean, var, seed, call);
  return {out.y, out.mean, out.var};
}

std::tuple<at::Tensor, at::Tensor> any_add_norm(
    const at::Tensor& x, const at::Tensor& residual, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& seed, std::array<int64_t, 6> view,
    int64_t statistic, double eps, double weight_offset, double dropout_p) {
  py::gil_scoped_release release;
  return add_norm(x, residual, weight, bias, seed,
                  {view, statistic, eps, weight_offset, 0, dropout_p});
}

std::string form(std::array<int64_t, 6> v, int element_size) {
  const View view = to_view(v);
  return view.reduce_outer == 1 && view.tail == 1 && !cpu::is_plane(view)
             ? cpu::row_norm_form(view, element_size)
             : cpu::column_norm_form(view, element_size);
}

const char* simd_level() {
#if defined(CPU_CAPABILITY_AVX512)
  return "AVX512";
#elif defined(CPU_CAPABILITY_AVX2)
  return "AVX2";
#else
  return "DEFAULT";
#endif
}

}  // namespace

void register_norms(py::module_& m) {
  using torch::wrap_pybind_function;
  const py::object context = py::module_::import("torch.utils._device").attr("DeviceContext");
  device_context = reinterpret_cast<PyTypeObject*>(py::object(context).release().ptr());
  m.def("row_norm", wrap_pybind_function(row_norm));
  m.def("add_row_norm", wrap_pybind_function(add_row_norm));
  m.def("norm", wrap_pybind_function(any_norm));
  m.def("add_norm", wrap_pybind_function(any_add_norm));
  m.def("set_explaining", [](bool on) { explaining = on; }, "Entries on this thread take no call.");
  m.def("form", form, "The form of the CPU kernel that a view takes.");
  m.def("simd_level", simd_level, "The instruction set this library was compiled for.");
}

}  // namespace fastnorm
