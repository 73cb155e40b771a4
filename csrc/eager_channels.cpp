// Eager entries of batch, group and instance norm (see eager.cpp), and the running statistics.
#include <ATen/EmptyTensor.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/variable.h>

#include <cmath>

#include "autograd.h"
#include "eager.h"

namespace fastnorm {

namespace py = pybind11;

namespace {

// How the kernels see an input with its channels at dimension 1.
struct Channels {
  int64_t batch = 0, count = 0, spatial = 0;
  bool last = false;  // the channels are innermost in memory
};

// False for what is not dense in one of the two layouts, has a size of 0 or fewer than two
// dimensions.
bool read_channels(const at::Tensor& x, Channels& c) {
  if (x.dim() < 2 || x.numel() == 0) return false;
  c.batch = x.size(0);
  c.count = x.size(1);
  c.spatial = x.numel() / (c.batch * c.count);
  if (x.is_contiguous()) return true;
  int64_t stride = c.count;
  for (int64_t d = x.dim() - 1; d != 1; d = d == 2 ? 0 : d - 1) {
    if (x.size(d) > 1 && x.stride(d) != stride) return false;
    stride *= x.size(d);
    if (d == 0) break;
  }
  c.last = x.dim() > 2 && (c.count == 1 || x.stride(1) == 1);
  return c.last;
}

std::array<int64_t, 6> batch_view(const Channels& c, int64_t chunk) {
  const int64_t chunks = (c.batch + chunk - 1) / chunk, tail = c.batch - (chunks - 1) * chunk;
  if (c.last || c.spatial == 1) {
    return {chunks, chunk * c.spatial, c.count, 1, 1, tail * c.spatial};
  }
  return {chunks, chunk, c.count, c.spatial, c.spatial, tail};
}

std::array<int64_t, 6> group_view(const Channels& c, int64_t groups) {
  const int64_t width = c.count / groups;
  if (c.last) return {c.batch, c.spatial, groups, width, 1, c.spatial};
  return {c.batch, 1, groups, width * c.spatial, c.spatial, 1};
}

// The running statistics of a module. `tracked` counts the batches that entered them, `skipped`
// those that were kept out because they were not finite; each may be undefined.
struct Running {
  at::Tensor mean, var, tracked, skipped;
};

bool is_counter(const at::Tensor& t) {
  return !t.defined() || (t.numel() == 1 && t.scalar_type() == at::kLong && t.is_cpu());
}

// Whether `update` may write to these directly.
bool is_updatable(const Running& r, int64_t kept) {
  return r.mean.is_cpu() && r.var.is_cpu() && r.mean.numel() == kept && r.var.numel() == kept &&
         r.mean.scalar_type() == r.var.scalar_type() && r.mean.is_contiguous() &&
         r.var.is_contiguous() && r.mean.is_inference() == r.var.is_inference() &&
         is_counter(r.tracked) && is_counter(r.skipped);
}

void count_up(const at::Tensor& counter, int64_t by) {
  if (!counter.defined() || by == 0) return;
  *counter.mutable_data_ptr<int64_t>() += by;
  if (!counter.is_inference()) torch::autograd::impl::bump_version(counter);
}

template <typename A>
bool all_finite(const A* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (!std::isfinite(p[i])) return false;
  }
  return true;
}

// One block of statistics after another: running = (1 - m) * running + m * new, with the unbiased
// variance; m is the momentum, or 1 / batches seen where that is NaN. In double, so that the
// result does not depend on how a compiler contracts it (fastnorm/_running.py has the same).
// With `average`, the blocks enter as one, by their mean.
template <typename R, typename A>
void update_blocks(const Running& r, const A* mean, const A* var, int64_t blocks, int64_t kept,
                   double momentum, int64_t count, int64_t last_count, bool average) {
  R* running_mean = r.mean.mutable_data_ptr<R>();
  R* running_var = r.var.mutable_data_ptr<R>();
  const int64_t steps = average ? 1 : blocks, width = average ? blocks : 1;
  int64_t seen = r.tracked.defined() ? *r.tracked.const_data_ptr<int64_t>() : 0;
  int64_t entered = 0, skipped = 0;
  for (int64_t o = 0; o < steps; ++o) {
    const A *m = mean + o * kept, *v = var + o * kept;
    const int64_t n = o + 1 == steps ? last_count : count;
    if (n < 2) continue;
    if (r.skipped.defined() && !(all_finite(m, width * kept) && all_finite(v, width * kept))) {
      ++skipped;
      continue;
    }
    ++entered;
    const double factor = std::isnan(momentum) ? 1.0 / static_cast<double>(++seen) : momentum;
    const double unbiased = static_cast<double>(n) / static_cast<double>(n - 1);
    for (int64_t k = 0; k < kept; ++k) {
      double new_mean = 0.0, new_var = 0.0;
      for (int64_t b = 0; b < width; ++b) {
        new_mean += static_cast<double>(m[b * kept + k]);
        new_var += static_cast<double>(v[b * kept + k]);
      }
      new_mean /= static_cast<double>(width);
      new_var = new_var / static_cast<double>(width) * unbiased;
      running_mean[k] =
          static_cast<R>(static_cast<double>(running_mean[k]) * (1 - factor) + new_mean * factor);
      running_var[k] =
          static_cast<R>(static_cast<double>(running_var[k]) * (1 - factor) + new_var * factor);
    }
  }
  if (!average) count_up(r.tracked, entered);
  count_up(r.skipped, skipped);
  if (entered > 0 && !r.mean.is_inference()) {
    torch::autograd::impl::bump_version(r.mean);
    torch::autograd::impl::bump_version(r.var);
  }
}

void update(const Running& r, const at::Tensor& mean, const at::Tensor& var, double momentum,
            int64_t count, int64_t last_count, bool average) {
  const int64_t kept = r.mean.numel(), blocks = mean.numel() / kept;
  // torch's rule: an average over all batches needs their number.
  if (std::isnan(momentum) && !r.tracked.defined()) momentum = 0.0;
  visit_dtype(r.mean.scalar_type(), [&](auto running) {
    using R = decltype(running);
    if (mean.scalar_type() == at::kDouble) {
      update_blocks<R>(r, mean.const_data_ptr<double>(), var.const_data_ptr<double>(), blocks, kept,
                       momentum, count, last_count, average);
    } else {
      update_blocks<R>(r, mean.const_data_ptr<float>(), var.const_data_ptr<float>(), blocks, kept,
                       momentum, count, last_count, average);
    }
  });
}

// A forward that runs inside a backward is activation checkpointing's recomputation: its batch is
// in the statistics already.
bool recomputing() { return torch::autograd::get_current_graph_task_id() != -1; }

bool read_counter(const py::handle& object, at::Tensor& out) {
  if (object.is_none()) return true;
  if (!THPVariable_CheckExact(object.ptr())) return false;
  out = THPVariable_Unpack(object.ptr());
  return true;
}

bool read_running(const py::handle& mean, const py::handle& var, Running& r) {
  return plain_tensor(mean.ptr(), r.mean) && plain_tensor(var.ptr(), r.var) &&
         r.mean.defined() == r.var.defined() &&
         !(r.mean.defined() && (r.mean.requires_grad() || r.var.requires_grad()));
}

bool read_number(const py::handle& object, double& number) {
  number = PyFloat_AsDouble(object.ptr());
  if (PyErr_Occurred() == nullptr) return true;
  PyErr_Clear();
  return false;
}

// NaN stands for None: the average over all batches.
bool read_momentum(const py::handle& object, double& momentum) {
  momentum = std::nan("");
  return object.is_none() || (read_number(object, momentum) && std::isfinite(momentum));
}

// One value per channel; beside a number of values that fits, the shape is checked.
bool channel_fits(const at::Tensor& p, const at::Tensor& x, int64_t channels) {
  return (!p.defined() || p.dim() == 1) && parameter_fits(p, x, channels);
}

bool residual_fits(const at::Tensor& r, const at::Tensor& x) {
  return !r.defined() || (same_shape(r, x) && same_layout(r, x));
}

// A copy where something is to be saved for backward: DDP writes to buffers between a forward and
// its backward.
at::Tensor frozen_statistic(const at::Tensor& running, const at::Tensor& x, bool saved) {
  const auto dtype = accumulate_type(x.scalar_type());
  if (running.is_cpu() && running.is_contiguous()) {
    if (running.scalar_type() == dtype && !saved) return running;
    at::Tensor copy = at::detail::empty_cpu(running.sizes(), running.options().dtype(dtype));
    // Tensor::to takes as long as the rest of the call on a small input.
    visit_dtype(dtype, [&](auto wide) {
      visit_dtype(running.scalar_type(), [&](auto narrow) {
        const auto* in = running.const_data_ptr<decltype(narrow)>();
        auto* out = copy.mutable_data_ptr<decltype(wide)>();
        for (int64_t i = 0; i < running.numel(); ++i) out[i] = static_cast<decltype(wide)>(in[i]);
      });
    });
    return copy;
  }
  return dense(running.detach()).to(dtype, /*non_blocking=*/false, /*copy=*/saved);
}

// Batch norm over dimension 1, without dropout and masks. `momentum` is a number, or None for the
// average over all batches; `chunk` is the virtual batch size, 0 for the whole batch.
py::object batch_norm(const py::handle& input, const py::handle& running_mean,
                      const py::handle& running_var, const py::handle& weight,
                      const py::handle& bias, const py::handle& residual, const py::handle& tracked,
                      const py::handle& skipped, bool batch_statistics, bool updating,
                      const py::handle& momentum_arg, const py::handle& eps_arg, int64_t activation,
                      int64_t chunk) {
  at::Tensor x, w, b, res;
  Running r;
  Channels c;
  double momentum = 0.0, eps = 0.0;
  if (!undisturbed() || !read_momentum(momentum_arg, momentum) || !read_number(eps_arg, eps) ||
      activation < 0 || !plain_tensor(input.ptr(), x) || !x.defined() ||
      !plain_tensor(weight.ptr(), w) || !plain_tensor(bias.ptr(), b) ||
      !plain_tensor(residual.ptr(), res) || !read_running(running_mean, running_var, r) ||
      !read_counter(tracked, r.tracked) || !read_counter(skipped, r.skipped) ||
      !read_channels(x, c) || !channel_fits(w, x, c.count) || !channel_fits(b, x, c.count) ||
      !residual_fits(res, x) || !(batch_statistics ? eps > 0 : eps >= 0) || !std::isfinite(eps)) {
    return py::none();
  }
  if (chunk <= 0 || chunk > c.batch || !batch_statistics) chunk = c.batch;
  NormCall call;
  call.view = batch_view(c, chunk);
  call.eps = eps;
  call.activation = activation;
  const int64_t last = (c.batch - (call.view[0] - 1) * chunk) * c.spatial;
  if (r.mean.defined() && (!channel_fits(r.mean, x, c.count) || !channel_fits(r.var, x, c.count))) {
    return py::none();
  }
  OptionalTensor same;
  if (res.defined()) same = res;
  at::Tensor y;
  if (!batch_statistics) {
    if (updating || !r.mean.defined()) return py::none();
    {
      py::gil_scoped_release release;
      const bool saved = torch::autograd::compute_requires_grad(x, w, b, res);
      y = norm(x, dense_or_none(w), dense_or_none(b), same, frozen_statistic(r.mean, x, saved),
               frozen_statistic(r.var, x, saved), {}, call)
              .y;
    }
    return wrap(y);
  }
  if (last == 1 || (updating && !(r.mean.defined() && is_updatable(r, c.count)))) return py::none();
  {
    py::gil_scoped_release release;
    const NormOutput out = norm(x, dense_or_none(w), dense_or_none(b), same, {}, {}, {}, call);
    if (updating && !recomputing()) {
      update(r, out.mean, out.var, momentum, chunk * c.spatial, last, false);
    }
    y = out.y;
  }
  return wrap(y);
}

// Group norm, and with a group for every channel (`groups` None) instance norm, without running
// statistics.
py::object group_norm(const py::handle& input, const py::handle& groups_arg,
                      const py::handle& weight, const py::handle& bias, const py::handle& residual,
                      const py::handle& eps_arg, int64_t activation) {
  at::Tensor x, w, b, res;
  Channels c;
  double eps = 0.0;
  if (!undisturbed() || !read_number(eps_arg, eps) || activation < 0 ||
      !plain_tensor(input.ptr(), x) || !x.defined() || !plain_tensor(weight.ptr(), w) ||
      !plain_tensor(bias.ptr(), b) || !plain_tensor(residual.ptr(), res) || !read_channels(x, c) ||
      !channel_fits(w, x, c.count) || !channel_fits(b, x, c.count) || !residual_fits(res, x) ||
      !(eps >= 0 && std::isfinite(eps))) {
    return py::none();
  }
  int64_t groups = c.count;
  if (groups_arg.is_none()) {
    if (c.spatial == 1) return py::none();
  } else {
    if (!PyLong_CheckExact(groups_arg.ptr())) return py::none();
    int overflow = 0;
    groups = PyLong_AsLongLongAndOverflow(groups_arg.ptr(), &overflow);
    if (groups < 1 || c.count % groups != 0 || x.numel() == groups) return py::none();
  }
  NormCall call;
  call.view = group_view(c, groups);
  call.eps = eps;
  call.activation = activation;
  at::Tensor y;
  {
    py::gil_scoped_release release;
    OptionalTensor same;
    if (res.defined()) same = res;
    y = norm(x, dense_or_none(w), dense_or_none(b), same, {}, {}, {}, call).y;
  }
  return wrap(y);
}

// The running statistics after a forward that Python arranged. False where this can't write to
// them; nothing has changed then.
bool update_running(const py::handle& running_mean, const py::handle& running_var,
                    const py::handle& tracked, const py::handle& skipped, const at::Tensor& mean,
                    const at::Tensor& var, const py::handle& momentum_arg, int64_t count,
                    int64_t last_count, bool average) {
  Running r;
  double momentum = 0.0;
  if (!undisturbed() || !read_momentum(momentum_arg, momentum) ||
      !read_running(running_mean, running_var, r) || !r.mean.defined() ||
      !read_counter(tracked, r.tracked) || !read_counter(skipped, r.skipped) ||
      !is_updatable(r, mean.size(-1)) || !mean.is_cpu() || !mean.is_contiguous() ||
      !var.is_contiguous()) {
    return false;
  }
  update(r, mean, var, momentum, count, last_count, average);
  return true;
}

}  // namespace

void register_channel_norms(py::module_& m) {
  using torch::wrap_pybind_function;
  m.def("batch_norm", wrap_pybind_function(batch_norm));
  m.def("group_norm", wrap_pybind_function(group_norm));
  m.def("update_running", wrap_pybind_function(update_running));
}

}  // namespace fastnorm
