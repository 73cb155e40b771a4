// Global and shared memory of the emulator: bounds, alignment, bytes, coalescing, async copies.
#include <map>
#include <set>
#include <tuple>
#include <unordered_map>

#include "state.h"

namespace simt {
namespace {

struct Buffer {
  std::string name;
  uintptr_t begin, end;
  bool writable;
  uint64_t loaded = 0, stored = 0;  // bytes
  std::vector<uint8_t> touched;     // kStored and kReadOnly of each byte, in the launch in progress
};
std::vector<Buffer> buffers;

// Requests of one warp at one place in the code, the n-th time: the lanes' addresses together.
struct Request {
  std::vector<std::pair<uintptr_t, unsigned>> lanes;
  bool store;
};
using RequestKey = std::tuple<const void*, const void*, unsigned>;  // warp, call site, visit
std::map<RequestKey, Request> requests;
std::map<RequestKey, Request> shared_requests;

struct Totals {
  uint64_t bytes = 0, accesses = 0, requests = 0, segments = 0, least_segments = 0;
};
struct SharedTotals {
  uint64_t requests = 0, wavefronts = 0, least_wavefronts = 0;
};
Totals loads, stores;
SharedTotals shared_totals;
std::string launch_shape;
std::map<unsigned, uint64_t> widths;            // bytes per lane access -> accesses
std::map<std::string, uint64_t> bytes_by_hint;  // cache operator -> bytes
std::string kernel_name;
std::string reports, report;

Buffer* find_buffer(uintptr_t begin, uintptr_t end) {
  for (Buffer& buffer : buffers) {
    if (begin >= buffer.begin && end <= buffer.end) return &buffer;
  }
  return nullptr;
}

unsigned visit(Fiber& fiber, const void* site) {
  for (auto& [known, count] : fiber.visits) {
    if (known == site) return count++;
  }
  fiber.visits.emplace_back(site, 1);
  return 0;
}

void check(const Fiber& fiber, uintptr_t address, unsigned bytes, bool store, Buffer*& buffer) {
  const char* verb = store ? "stores" : "loads";
  if (address % bytes) {
    fail(describe(fiber) + " " + verb + " " + std::to_string(bytes) +
         " bytes at an address that is only " + std::to_string(address & (~address + 1)) +
         "-byte aligned");
  }
  buffer = find_buffer(address, address + bytes);
  if (buffers.empty()) return;
  if (buffer != nullptr) {
    if (store && !buffer->writable) {
      fail(describe(fiber) + " stores into '" + buffer->name + "', which is an input");
    }
    return;
  }
  std::string nearest = "no buffer";
  uintptr_t best = UINTPTR_MAX;
  for (const Buffer& b : buffers) {
    const uintptr_t distance = address < b.begin ? b.begin - address : address - b.begin;
    if (distance >= best) continue;
    best = distance;
    nearest = "byte " +
              std::to_string(static_cast<int64_t>(address) - static_cast<int64_t>(b.begin)) +
              " of '" + b.name + "', which has " + std::to_string(b.end - b.begin);
  }
  fail(describe(fiber) + " " + verb + " " + std::to_string(bytes) +
       " bytes out of bounds: " + nearest);
}

constexpr int kRankBits = 20;  // of a shared address, below the rank of its block in the cluster

// 32 banks of 4 bytes; wide accesses go in groups of lanes that ask for 128 bytes together.
// The fewest are as many as the distinct bytes fill.
void add_wavefronts(const Request& request) {
  ++shared_totals.requests;
  const unsigned bytes = request.lanes.front().second;
  const size_t per_group = bytes <= 4 ? 32 : 128 / bytes;
  for (size_t first = 0; first < request.lanes.size(); first += per_group) {
    std::map<unsigned, std::set<uintptr_t>> words;
    const size_t last = std::min(request.lanes.size(), first + per_group);
    for (size_t i = first; i < last; ++i) {
      const uintptr_t address = request.lanes[i].first;
      for (uintptr_t word = address / 4; word <= (address + bytes - 1) / 4; ++word) {
        words[word % 32 + 32 * (address >> kRankBits)].insert(word);
      }
    }
    size_t worst = 0, all = 0;
    for (const auto& [bank, distinct] : words) {
      worst = std::max(worst, distinct.size());
      all += distinct.size();
    }
    shared_totals.wavefronts += worst;
    shared_totals.least_wavefronts += (all + 31) / 32;
  }
}

constexpr uint8_t kStored = 1, kReadOnly = 2;

// The read-only cache (__ldg) doesn't see what the same launch stores, and the compiler may move
// its loads before the stores, or behind them.
void check_read_only(const Fiber& fiber, Buffer& buffer, uintptr_t address, unsigned bytes,
                     bool store, const char* hint) {
  if (!store && std::strcmp(hint, "g") != 0) return;
  if (buffer.touched.empty()) buffer.touched.resize(buffer.end - buffer.begin);
  const uint8_t own = store ? kStored : kReadOnly, other = store ? kReadOnly : kStored;
  for (uintptr_t at = address - buffer.begin; at < address - buffer.begin + bytes; ++at) {
    buffer.touched[at] |= own;
    if ((buffer.touched[at] & other) == 0) continue;
    fail(describe(fiber) + (store ? " stores" : " loads") + " byte " + std::to_string(at) +
         " of '" + buffer.name + "', which this launch also " +
         (store ? "reads through the read-only cache" : "stores, through the read-only cache"));
  }
}

void complete(const std::vector<Copy>& group) {
  for (const Copy& copy : group) std::memcpy(copy.target, copy.source, copy.bytes);
}

}  // namespace

void begin_accounting(const char* kernel, const Launch& launch) {
  kernel_name = kernel;
  launch_shape = "{\"grid\":" + std::to_string(launch.grid.x) +
                 ",\"threads\":" + std::to_string(launch.block.x) +
                 ",\"shared\":" + std::to_string(launch.shared) +
                 ",\"cluster\":" + std::to_string(launch.cluster) + "}";
  loads = stores = Totals{};
  shared_totals = SharedTotals{};
  widths.clear();
  bytes_by_hint.clear();
  requests.clear();
  shared_requests.clear();
  for (Buffer& buffer : buffers) {
    buffer.loaded = buffer.stored = 0;
    buffer.touched.clear();
  }
}

void end_block_accounting() {
  for (const auto& [key, request] : requests) {
    Totals& totals = request.store ? stores : loads;
    std::set<uintptr_t> segments;
    uint64_t bytes = 0;
    for (const auto& [address, size] : request.lanes) {
      bytes += size;
      segments.insert(address / 128);
    }
    ++totals.requests;
    totals.segments += segments.size();
    totals.least_segments += (bytes + 127) / 128;
  }
  requests.clear();
  for (const auto& [key, request] : shared_requests) add_wavefronts(request);
  shared_requests.clear();
}

__attribute__((noinline)) void global_access(const void* pointer, unsigned bytes, bool store,
                                             const char* hint) {
  Fiber& fiber = *current;
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  Buffer* buffer = nullptr;
  check(fiber, address, bytes, store, buffer);
  if (buffer != nullptr) check_read_only(fiber, *buffer, address, bytes, store, hint);
  if (!settings.count) return;
  Totals& totals = store ? stores : loads;
  totals.bytes += bytes;
  ++totals.accesses;
  ++widths[bytes];
  bytes_by_hint[std::string(store ? "st." : "ld.") + hint] += bytes;
  if (buffer != nullptr) (store ? buffer->stored : buffer->loaded) += bytes;
  const void* site = __builtin_return_address(0);
  Request& request = requests[{fiber.warp, site, visit(fiber, site)}];
  request.store = store;
  // Segments begin where the buffer does: torch aligns its memory to more than 128 bytes.
  const uintptr_t begin = buffer == nullptr ? 0 : buffer->begin % 128;
  request.lanes.emplace_back(address - begin, bytes);
}

__attribute__((noinline)) void shared_access(const void* pointer, unsigned bytes, bool store) {
  Fiber& fiber = *current;
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  if (address % bytes) {
    fail(describe(fiber) + " makes a misaligned shared access of " + std::to_string(bytes) +
         " bytes");
  }
  unsigned rank = 0;
  while (rank < fiber.view.cluster_size &&
         !inside_shared(fiber.block->cluster_first[rank], pointer, bytes)) {
    ++rank;
  }
  if (rank == fiber.view.cluster_size) {
    fail(describe(fiber) + (store ? " stores" : " loads") + " outside its shared memory: byte " +
         std::to_string(static_cast<const unsigned char*>(pointer) - fiber.block->shared));
  }
  if (!settings.count) return;
  const void* site = __builtin_return_address(0);
  Request& request = shared_requests[{fiber.warp, site, visit(fiber, site)}];
  request.store = store;
  // Banks begin where a block's shared memory does, which here lies anywhere; each block has its
  // own.
  const uintptr_t begin = reinterpret_cast<uintptr_t>(fiber.block->cluster_first[rank].shared);
  request.lanes.emplace_back((uintptr_t{rank} << kRankBits) + address - begin, bytes);
}

void copy_async(void* shared_target, const void* source, unsigned bytes, Site site) {
  Fiber& fiber = *current;
  if (bytes != 4 && bytes != 8 && bytes != 16) {
    fail(describe(fiber) + ": an asynchronous copy has 4, 8 or 16 bytes, got " +
         std::to_string(bytes));
  }
  if (!inside_shared(*fiber.block, shared_target, bytes) ||
      reinterpret_cast<uintptr_t>(shared_target) % bytes) {
    fail(describe(fiber) + ": bad target of " + site.what + " at line " +
         std::to_string(site.line));
  }
  global_access(source, bytes, false, "async");
  // What stood there is gone, what will stand there has not come yet.
  std::memset(shared_target, 0xFF, bytes);
  fiber.uncommitted.push_back({shared_target, source, bytes});
}

void copy_async_commit() {
  Fiber& fiber = *current;
  fiber.copies.push_back(std::move(fiber.uncommitted));
  fiber.uncommitted.clear();
}

void copy_async_wait(unsigned groups_left) {
  Fiber& fiber = *current;
  while (fiber.copies.size() > groups_left) {
    complete(fiber.copies.front());
    fiber.copies.erase(fiber.copies.begin());
  }
}

void end_accounting() {
  if (!settings.count) return;
  auto totals = [](const Totals& t) {
    return "{\"bytes\":" + std::to_string(t.bytes) + ",\"accesses\":" + std::to_string(t.accesses) +
           ",\"requests\":" + std::to_string(t.requests) +
           ",\"segments\":" + std::to_string(t.segments) +
           ",\"least_segments\":" + std::to_string(t.least_segments) + "}";
  };
  std::string text = "{\"kernel\":\"" + kernel_name + "\",\"load\":" + totals(loads) +
                     ",\"store\":" + totals(stores) + ",\"launch\":" + launch_shape +
                     ",\"shared\":{\"requests\":" + std::to_string(shared_totals.requests) +
                     ",\"wavefronts\":" + std::to_string(shared_totals.wavefronts) +
                     ",\"least_wavefronts\":" + std::to_string(shared_totals.least_wavefronts) +
                     "},\"widths\":{";
  std::string separator;
  for (const auto& [bytes, count] : widths) {
    text += separator + "\"" + std::to_string(bytes) + "\":" + std::to_string(count);
    separator = ",";
  }
  text += "},\"hints\":{";
  separator.clear();
  for (const auto& [hint, bytes] : bytes_by_hint) {
    text += separator + "\"" + hint + "\":" + std::to_string(bytes);
    separator = ",";
  }
  text += "},\"buffers\":{";
  separator.clear();
  for (const Buffer& buffer : buffers) {
    text += separator + "\"" + buffer.name + "\":{\"loaded\":" + std::to_string(buffer.loaded) +
            ",\"stored\":" + std::to_string(buffer.stored) + "}";
    separator = ",";
  }
  reports += (reports.empty() ? "" : ",") + text + "}}";
}

}  // namespace simt

#define SIMT_EXPORT extern "C" __attribute__((visibility("default")))

SIMT_EXPORT void simt_add_buffer(const char* name, const void* pointer, size_t bytes,
                                 int writable) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(pointer);
  simt::buffers.push_back({name, begin, begin + bytes, writable != 0, 0, 0, {}});
}
SIMT_EXPORT void simt_clear_buffers() { simt::buffers.clear(); }

// JSON list of the launches since simt_clear_reports() that were counted.
SIMT_EXPORT void simt_clear_reports() { simt::reports.clear(); }
SIMT_EXPORT const char* simt_reports() {
  simt::report = "[" + simt::reports + "]";
  return simt::report.c_str();
}
