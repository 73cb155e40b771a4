// The part of cooperative groups that kernels use: clusters and the grid barrier.
#pragma once
#include "../simt.h"

namespace cooperative_groups {

struct cluster_group {
  static unsigned block_rank() { return simt::self().rank_in_cluster; }
  static unsigned num_blocks() { return simt::self().cluster_size; }
  template <typename T>
  static T* map_shared_rank(T* pointer, unsigned rank) {
    return reinterpret_cast<T*>(simt::shared_of_rank(pointer, rank));
  }
  static void sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    simt::sync_cluster({"cluster.sync", file, line});
  }
  static void barrier_arrive(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    simt::arrive_cluster({"cluster.barrier_arrive", file, line});
  }
  static void barrier_wait(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    simt::wait_cluster({"cluster.barrier_wait", file, line});
  }
};
inline cluster_group this_cluster() { return {}; }

struct grid_group {
  static void sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    simt::sync_grid({"grid.sync", file, line});
  }
};
inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups
