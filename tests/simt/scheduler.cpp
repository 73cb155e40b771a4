// Fibers, collectives and the launch of the emulator.
#include <map>
#include <random>

#include "state.h"

namespace simt {

Fiber* current = nullptr;
Settings settings;
std::string last_error;

namespace {

constexpr size_t kMaxShared = 227 * 1024;
constexpr size_t kGuard = 64;
constexpr unsigned char kGuardByte = 0xA5;
constexpr unsigned char kPoison = 0xFF;  // a NaN in every floating-point type

StackPool stacks;
Context scheduler;
const std::function<void()>* kernel_body = nullptr;
Barrier grid_barrier;
bool cooperative = false;
std::mt19937 generator;

std::string at(const Site& site) {
  std::string file = site.file;
  return std::string(site.what) + " at " + file.substr(file.rfind('/') + 1) + ":" +
         std::to_string(site.line);
}

void block_here(Site site) {
  Fiber* self = current;
  self->ready = false;
  self->waits_at = site;
  switch_context(self->context, scheduler);
}

void release(Barrier& barrier) {
  barrier.arrived = 0;
  ++barrier.phase;
  for (Fiber* fiber : barrier.waiting) fiber->ready = true;
  barrier.waiting.clear();
}

// All threads of `barrier` must come by the same statement.
void sync(Barrier& barrier, Site site) {
  if (barrier.arrived > 0 &&
      (barrier.site.line != site.line || std::strcmp(barrier.site.file, site.file) != 0)) {
    fail("divergent barrier: " + describe(*current) + " is in " + at(site) +
         " while others wait in " + at(barrier.site));
  }
  barrier.site = site;
  if (++barrier.arrived == barrier.expected) {
    release(barrier);
  } else {
    barrier.waiting.push_back(current);
    block_here(site);
  }
}

void finish_thread(Fiber& fiber) {
  Block& block = *fiber.block;
  fiber.done = true;
  fiber.ready = false;
  if (!fiber.copies.empty() || !fiber.uncommitted.empty()) {
    fail(describe(fiber) + " returned with asynchronous copies it never waited for");
  }
  if (--block.running == 0) {
    for (size_t i = 0; i < kGuard; ++i) {
      if (block.storage[i] != kGuardByte ||
          block.storage[block.storage.size() - 1 - i] != kGuardByte) {
        fail("block (" + std::to_string(block.index.x) + "," + std::to_string(block.index.y) +
             ") wrote outside its " + std::to_string(block.storage.size() - 2 * kGuard) +
             " bytes of dynamic shared memory");
      }
    }
    // A sibling that still reads this memory through the cluster must not see the old values.
    std::fill(block.storage.begin(), block.storage.end(), kPoison);
  }
}

void fiber_main() {
  entered_from(scheduler);
  (*kernel_body)();
  finish_thread(*current);
  switch_context(current->context, scheduler, true);
}

void resume(Fiber& fiber) {
  current = &fiber;
  switch_context(scheduler, fiber.context);
  current = nullptr;
}

void report_deadlock(const std::vector<Fiber*>& fibers) {
  std::map<std::string, std::vector<const Fiber*>> stuck;
  size_t returned = 0;
  for (const Fiber* fiber : fibers) {
    if (fiber->done) {
      ++returned;
    } else {
      stuck[at(fiber->waits_at)].push_back(fiber);
    }
  }
  std::string text = "deadlock: ";
  for (const auto& [where, group] : stuck) {
    text += std::to_string(group.size()) + " threads wait in " + where +
            " (first: " + describe(*group.front()) + ", last: " + describe(*group.back()) + "); ";
  }
  last_error = text + std::to_string(returned) + " threads have returned";
}

void run_round(std::vector<Fiber*>& fibers, bool& progress) {
  if (settings.order == 2) std::shuffle(fibers.begin(), fibers.end(), generator);
  if (settings.order != 3) {
    for (Fiber* fiber : fibers) {
      if (!fiber->ready) continue;
      progress = true;
      resume(*fiber);
      if (!last_error.empty()) return;
    }
    return;
  }
  // One warp runs as far as it can before the next one starts.
  std::vector<Warp*> warps;
  for (Fiber* fiber : fibers) {
    if (fiber->ready && (warps.empty() || warps.back() != fiber->warp))
      warps.push_back(fiber->warp);
  }
  std::shuffle(warps.begin(), warps.end(), generator);
  for (Warp* warp : warps) {
    for (bool again = true; again;) {
      again = false;
      for (Fiber* lane : warp->lanes) {
        if (lane == nullptr || !lane->ready) continue;
        progress = again = true;
        resume(*lane);
        if (!last_error.empty()) return;
      }
    }
  }
}

void prepare_block(Block& block, const Launch& config, dim3 index, size_t& stack) {
  const unsigned threads = config.block.x * config.block.y * config.block.z;
  block.index = index;
  block.running = threads;
  block.storage.assign(config.shared + 2 * kGuard, kPoison);
  std::fill_n(block.storage.begin(), kGuard, kGuardByte);
  std::fill_n(block.storage.end() - kGuard, kGuard, kGuardByte);
  block.shared = block.storage.data() + kGuard;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(block.storage.data(), block.storage.size());
#endif
  block.barrier = Barrier{};
  block.barrier.expected = threads;
  block.fibers.resize(threads);
  block.warps.clear();
  block.warps.resize((threads + 31) / 32);
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = block.fibers[t];
    Context context = fiber.context;
    fiber = Fiber{};
    fiber.context = context;
    fiber.context.stack = stacks.get(stack++);
    fiber.context.stack_bytes = kStackBytes;
    fiber.context.prepare(fiber_main);
    fiber.view.thread = {t % config.block.x, t / config.block.x % config.block.y,
                         t / (config.block.x * config.block.y)};
    fiber.view.block = index;
    fiber.view.block_dim = config.block;
    fiber.view.grid_dim = config.grid;
    fiber.view.shared = block.shared;
    fiber.view.rank_in_cluster = block.rank;
    fiber.view.cluster_size = config.cluster;
    fiber.block = &block;
    fiber.linear = t;
    fiber.warp = &block.warps[t / 32];
    fiber.warp->lanes[t % 32] = &fiber;
    fiber.ready = true;
  }
}

std::string check_limits(const Launch& config) {
  const uint64_t threads = uint64_t{config.block.x} * config.block.y * config.block.z;
  if (threads == 0 || threads > 1024) {
    return "a block must have 1 to 1024 threads, got " + std::to_string(threads);
  }
  if (config.block.z > 64) return "blockDim.z must be at most 64";
  if (config.grid.x == 0 || config.grid.y == 0 || config.grid.z == 0) {
    return "the grid is empty";
  }
  if (config.grid.x > 0x7fffffffu || config.grid.y > 65535 || config.grid.z > 65535) {
    return "the grid must be at most 2^31-1 x 65535 x 65535";
  }
  if (config.shared > kMaxShared) {
    return "dynamic shared memory must be at most 227 KB, got " + std::to_string(config.shared);
  }
  const unsigned largest = config.large_cluster ? 16 : 8;
  if (config.cluster == 0 || config.cluster > largest || (config.cluster & (config.cluster - 1))) {
    return "a cluster must have 1, 2, 4, ... " + std::to_string(largest) + " blocks, got " +
           std::to_string(config.cluster);
  }
  if (config.grid.x % config.cluster) {
    return "gridDim.x " + std::to_string(config.grid.x) + " is no multiple of the cluster " +
           std::to_string(config.cluster);
  }
  return "";
}

}  // namespace

std::string describe(const Fiber& fiber) {
  const dim3 b = fiber.view.block, t = fiber.view.thread;
  std::string text = "block (" + std::to_string(b.x) + "," + std::to_string(b.y) + "," +
                     std::to_string(b.z) + ") thread (" + std::to_string(t.x) + "," +
                     std::to_string(t.y) + "," + std::to_string(t.z) + ")";
  return text;
}

bool inside_shared(const Block& block, const void* pointer, size_t bytes) {
  const unsigned char* p = static_cast<const unsigned char*>(pointer);
  return p >= block.shared && p + bytes <= block.shared + (block.storage.size() - 2 * kGuard);
}

void fail(const std::string& message) {
  if (last_error.empty()) last_error = message;
  // The fibers are abandoned as they stand; run() sees last_error and returns.
  for (;;) switch_context(current->context, scheduler);
}

void sync_threads(Site site) {
  Block& block = *current->block;
  if (block.running < block.fibers.size()) {
    fail(describe(*current) + " waits in " + at(site) + " but " +
         std::to_string(block.fibers.size() - block.running) +
         " threads of its block have returned");
  }
  sync(block.barrier, site);
}

void arrive_cluster(Site site) {
  Barrier& barrier = *current->block->cluster_barrier;
  if (current->cluster_arrived) fail(describe(*current) + " arrives twice in " + at(site));
  current->cluster_arrived = true;
  current->cluster_phase = barrier.phase;
  barrier.site = site;
  if (++barrier.arrived == barrier.expected) release(barrier);
}

void wait_cluster(Site site) {
  Barrier& barrier = *current->block->cluster_barrier;
  if (!current->cluster_arrived) {
    fail(describe(*current) + " waits without having arrived in " + at(site));
  }
  current->cluster_arrived = false;
  if (barrier.phase == current->cluster_phase) {
    barrier.waiting.push_back(current);
    block_here(site);
  }
}

void sync_cluster(Site site) {
  arrive_cluster(site);
  wait_cluster(site);
}

void sync_grid(Site site) {
  if (!cooperative) fail(at(site) + " needs a cooperative launch");
  sync(grid_barrier, site);
}

unsigned char* shared_of_rank(const void* pointer, unsigned rank) {
  const Fiber& self = *current;
  if (rank >= self.view.cluster_size) {
    fail(describe(self) + " maps rank " + std::to_string(rank) + " of a cluster of " +
         std::to_string(self.view.cluster_size));
  }
  if (!inside_shared(*self.block, pointer, 1)) {
    fail(describe(self) + " maps an address that is not in its shared memory");
  }
  Block& target = self.block->cluster_first[rank];
  if (self.block->cluster_barrier->phase == 0) {
    fail(describe(self) + " maps shared memory before any cluster barrier: rank " +
         std::to_string(rank) + " may not run yet");
  }
  if (target.running == 0) {
    fail(describe(self) + " maps the shared memory of rank " + std::to_string(rank) +
         ", which has returned");
  }
  return target.shared + (static_cast<const unsigned char*>(pointer) - self.block->shared);
}

unsigned lane_id() { return current->linear % 32; }

const uint64_t* gather(unsigned mask, uint64_t value, Site site) {
  Fiber& self = *current;
  Warp& warp = *self.warp;
  const unsigned lane = lane_id();
  if (self.gathering != nullptr) {
    if (--self.gathering->left == 0) warp.idle.push_back(self.gathering);
    self.gathering = nullptr;
  }
  if (!((mask >> lane) & 1u)) {
    fail(describe(self) + " is not in the mask of its own " + at(site));
  }
  for (unsigned other = 0; other < 32; ++other) {
    if (((mask >> other) & 1u) && (warp.lanes[other] == nullptr || warp.lanes[other]->done)) {
      fail(describe(self) + ": the mask of " + at(site) + " names lane " + std::to_string(other) +
           ", which " + (warp.lanes[other] == nullptr ? "does not exist" : "has returned"));
    }
  }
  Gathering* gathering = nullptr;
  for (Gathering* open : warp.open) {
    if (open->mask == mask) gathering = open;
  }
  if (gathering == nullptr) {
    if (warp.idle.empty()) {
      warp.owned.push_back(std::make_unique<Gathering>());
      warp.idle.push_back(warp.owned.back().get());
    }
    gathering = warp.idle.back();
    warp.idle.pop_back();
    gathering->mask = mask;
    gathering->arrived = 0;
    gathering->site = site;
    gathering->left = static_cast<unsigned>(__builtin_popcount(mask));
    warp.open.push_back(gathering);
  } else if (gathering->site.line != site.line || gathering->site.what != site.what) {
    fail("divergent warp: " + describe(self) + " is in " + at(site) + " while other lanes are in " +
         at(gathering->site));
  }
  gathering->slots[lane] = value;
  gathering->arrived |= 1u << lane;
  self.gathering = gathering;
  if (gathering->arrived == mask) {
    warp.open.erase(std::find(warp.open.begin(), warp.open.end(), gathering));
    for (unsigned other = 0; other < 32; ++other) {
      if (((mask >> other) & 1u) && other != lane) warp.lanes[other]->ready = true;
    }
  } else {
    block_here(site);
  }
  return gathering->slots;
}

int run(const char* name, const Launch& config, const std::function<void()>& body) {
  last_error = check_limits(config);
  if (!last_error.empty()) {
    last_error = std::string(name) + ": " + last_error;
    return 1;
  }
  kernel_body = &body;
  cooperative = config.cooperative;
  generator.seed(settings.seed);
  begin_accounting(name, config);

  // grid.x runs fastest; a cluster is neighbours along x.
  const uint64_t blocks = uint64_t{config.grid.x} * config.grid.y * config.grid.z;
  const uint64_t together = config.cooperative ? blocks : config.cluster;
  const uint64_t threads = uint64_t{config.block.x} * config.block.y * config.block.z;
  if (together * threads > 65536) {
    last_error = std::string(name) + ": more than 65536 threads at a time; test a smaller grid";
    return 1;
  }
  std::vector<uint64_t> groups(blocks / together);
  for (uint64_t i = 0; i < groups.size(); ++i) groups[i] = i;
  if (settings.order == 1) std::reverse(groups.begin(), groups.end());
  if (settings.order >= 2) std::shuffle(groups.begin(), groups.end(), generator);

  static std::vector<Block> resident;
  resident.resize(together);
  std::vector<Barrier> cluster_barriers(together / config.cluster);
  for (uint64_t group : groups) {
    size_t stack = 0;
    std::vector<Fiber*> fibers;
    grid_barrier = Barrier{};
    grid_barrier.expected = static_cast<unsigned>(together * threads);
    for (uint64_t i = 0; i < together; ++i) {
      const uint64_t linear = group * together + i;
      Block& block = resident[i];
      block.rank = static_cast<unsigned>(linear % config.cluster);
      block.cluster_first = &block - block.rank;
      block.cluster_barrier = &cluster_barriers[i / config.cluster];
      *block.cluster_barrier = Barrier{};
      block.cluster_barrier->expected = static_cast<unsigned>(config.cluster * threads);
      const dim3 index{static_cast<unsigned>(linear % config.grid.x),
                       static_cast<unsigned>(linear / config.grid.x % config.grid.y),
                       static_cast<unsigned>(linear / config.grid.x / config.grid.y)};
      prepare_block(block, config, index, stack);
      for (Fiber& fiber : block.fibers) fibers.push_back(&fiber);
    }
    if (settings.order == 1) std::reverse(fibers.begin(), fibers.end());
    for (;;) {
      bool progress = false;
      run_round(fibers, progress);
      if (!last_error.empty()) break;
      bool all_done = true;
      for (const Block& block : resident) all_done = all_done && block.running == 0;
      if (all_done) break;
      if (!progress) {
        report_deadlock(fibers);
        break;
      }
    }
    if (!last_error.empty()) {
      last_error = std::string(name) + ": " + last_error;
      return 1;
    }
    end_block_accounting();
  }
  end_accounting();
  return 0;
}

}  // namespace simt

#define SIMT_EXPORT extern "C" __attribute__((visibility("default")))

SIMT_EXPORT void simt_set_order(int order, unsigned seed) {
  simt::settings.order = order;
  simt::settings.seed = seed;
}
SIMT_EXPORT void simt_set_counting(int on) { simt::settings.count = on != 0; }
SIMT_EXPORT const char* simt_last_error() { return simt::last_error.c_str(); }
