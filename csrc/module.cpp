// The module fastnorm._C: everything that includes Torch's headers, as one translation unit. They
// take 9 to 20 s to parse, and in a file each they were 110 of the 240 s that a build took.
#include "autograd.cpp"
#include "cross_entropy.cpp"
#include "dropout.cpp"
#include "eager.cpp"
#include "eager_channels.cpp"
#include "norm_op_cpu.cpp"
#include "ops.cpp"
#include "penalty_cpu.cpp"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  fastnorm::register_norms(m);
  fastnorm::register_channel_norms(m);
  fastnorm::register_dropout(m);
  fastnorm::register_cross_entropy(m);
}
