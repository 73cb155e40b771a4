// Launches of the dropout kernel.
#include "cuda/dropout.cuh"
#include "cuda/launch.h"

namespace fastnorm::cuda {

template <typename T>
void launch_dropout(const DropoutPass<T>& p, cudaStream_t stream) {
  dropout(p, StreamLaunch{stream});
}

#define FASTNORM_INSTANTIATE(T) template void launch_dropout(const DropoutPass<T>&, cudaStream_t);
FASTNORM_FOR_EACH_DTYPE(FASTNORM_INSTANTIATE)

}  // namespace fastnorm::cuda
