// Entry point of the dropout kernel.
#include "cuda/dropout.cuh"

#include "norm_entry.h"

// integers: outer, shared, inner, activation, kind, columns, backward
// pointers: in, x, bias, residual, out, seed
extern "C" __attribute__((visibility("default"))) int dropout(int dtype, const int64_t* integers,
                                                              double p, void* const* pointers) {
  using namespace fastnorm;
  using namespace fastnorm::cuda;
  int status = 0;
  visit_entry_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    DropoutConfig config = DropoutConfig::of(
        {integers[0], integers[1], integers[2]}, static_cast<Activation>(integers[3]), p,
        static_cast<DropoutKind>(integers[4]), static_cast<const int64_t*>(pointers[5]));
    if (integers[6] != 0) config.shift = config.dropped = 0.0;
    dropout(DropoutPass<T>{config, static_cast<const T*>(pointers[0]),
                           static_cast<const T*>(pointers[1]), static_cast<const T*>(pointers[2]),
                           static_cast<const T*>(pointers[3]), static_cast<T*>(pointers[4]),
                           integers[5]},
            EmulatedLaunch{&status});
  });
  return status;
}
