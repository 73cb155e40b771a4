// Every operator of the norms: its schema, and one line on what it is.
//
// `view` is the six numbers of common/norm.h, `statistic` and `activation` its enums. The
// operators are pure; tensors are dense in the memory order of the input. An output that the
// mask or the configuration leaves out is an empty tensor.
#include <torch/library.h>

TORCH_LIBRARY(fastnorm, m) {
  // y = dropout(activation(norm(x) * (weight + offset) + bias + residual)); with mean and var
  // given, these normalize (frozen or running statistics) and none are returned.
  m.def(
      "norm_fwd(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mean, "
      "Tensor? var, Tensor? seed, SymInt[] view, int statistic, float eps, float weight_offset, "
      "int activation, float dropout_p) -> (Tensor y, Tensor mean, Tensor var)");
  // Gradients of x, weight, bias and residual.
  m.def(
      "norm_bwd(Tensor grad_output, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, "
      "Tensor? mean, Tensor var, Tensor? seed, SymInt[] view, int statistic, bool frozen, "
      "float eps, float weight_offset, int activation, float dropout_p, bool[4] output_mask) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  // sum = residual + dropout(x); y = norm(sum).
  m.def(
      "add_norm_fwd(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Tensor? seed, "
      "SymInt[] view, int statistic, float eps, float weight_offset, float dropout_p) "
      "-> (Tensor y, Tensor sum, Tensor mean, Tensor var)");
  // Gradients of x, weight, bias and residual, from those of y and sum (either may be absent).
  m.def(
      "add_norm_bwd(Tensor? grad_output, Tensor? grad_sum, Tensor sum, Tensor? weight, "
      "Tensor? mean, Tensor var, Tensor? seed, SymInt[] view, int statistic, float eps, "
      "float weight_offset, float dropout_p, bool[4] output_mask) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  // grads += l1 sign(params) + l2 params; returns (sum |params|, sum params^2), each 0 where its
  // strength is. The one operator that changes its arguments, as optimizers do.
  m.def("add_penalty_grad_(Tensor(a!)[] grads, Tensor[] params, float l1, float l2) -> Tensor");
}
