// Launches of the dropout kernel.
#include "cuda/dropout.cuh"
#include "cuda/launch.h"

namespace fastnorm::cuda {

template <typename T>
void launch_dropout(const DropoutPass<T>& p, cudaStream_t stream) {
  dropout(p, StreamLaunch{stream});
}

template void launch_dropout(const DropoutPass<float>&, cudaStream_t);
template void launch_dropout(const DropoutPass<double>&, cudaStream_t);
template void launch_dropout(const DropoutPass<__half>&, cudaStream_t);
template void launch_dropout(const DropoutPass<__nv_bfloat16>&, cudaStream_t);

}  // namespace fastnorm::cuda
