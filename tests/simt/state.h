// The emulator's records of a launch, shared by scheduler.cpp and memory.cpp.
#pragma once

#include <memory>

#include "fiber.h"
#include "simt.h"

namespace simt {

struct Fiber;

// One warp collective in progress: complete when every lane of the mask has arrived.
struct Gathering {
  unsigned mask = 0, arrived = 0, left = 0;
  uint64_t slots[32];
  Site site;
};

struct Warp {
  std::vector<Gathering*> open, idle;
  std::vector<std::unique_ptr<Gathering>> owned;
  Fiber* lanes[32] = {};
};

struct Barrier {
  unsigned arrived = 0, expected = 0, phase = 0;
  Site site;
  std::vector<Fiber*> waiting;
};

struct Copy {
  void* target;
  const void* source;
  unsigned bytes;
};

struct Block {
  dim3 index;
  unsigned running = 0;
  std::vector<unsigned char> storage;
  unsigned char* shared = nullptr;
  Barrier barrier;
  Barrier* cluster_barrier = nullptr;
  Block* cluster_first = nullptr;  // the cluster's blocks follow it in memory
  unsigned rank = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
};

struct Fiber {
  ThreadView view;  // first: simt::self() reads it
  Context context;
  Block* block = nullptr;
  Warp* warp = nullptr;
  unsigned linear = 0;  // index in the block
  bool ready = false, done = false;
  Site waits_at = {};
  Gathering* gathering = nullptr;
  unsigned cluster_phase = 0;
  bool cluster_arrived = false;
  std::vector<std::vector<Copy>> copies;  // committed groups, oldest first
  std::vector<Copy> uncommitted;
  std::vector<std::pair<const void*, unsigned>> visits;  // call site -> accesses so far
};

std::string describe(const Fiber& fiber);
bool inside_shared(const Block& block, const void* pointer, size_t bytes);

// Memory accounting of the launch in progress (memory.cpp).
void begin_accounting(const char* kernel, const Launch& launch);
void end_block_accounting();
void end_accounting();

struct Settings {
  int order = 0;  // 0 forward, 1 reverse, 2 shuffled every round, 3 warps out of phase
  unsigned seed = 0;
  bool count = false;
};
extern Settings settings;
extern std::string last_error;

}  // namespace simt
