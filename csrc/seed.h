// Where the random bits of a call begin.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>

namespace fastnorm {

// One int64 element on the device of `like`, as torch.randint(2**63 - 1, (1,)) draws it from
// `generator` or the device's default one. Throws, before anything is drawn, when the generator
// is of another device. On CUDA the value is drawn on the device, so that a captured graph draws
// anew at each replay.
at::Tensor draw_seed(const at::Tensor& like, const std::optional<at::Generator>& generator);

}  // namespace fastnorm
