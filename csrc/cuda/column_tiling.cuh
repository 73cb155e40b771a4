// How the column geometry shares out its elements: packs of 16 bytes, the walk of a thread over
// them, and where the partial sums of a block go.
//
//   form    reduced elements                       a block takes                 file
//   column  columns of a [rows][row] matrix        columns x a chunk of rows     column_norm.cuh
//   plane   long planes of one or more channels    a chunk of a channel          column_norm.cuh
//   pixel   one strided column per pixel           pixels x all rows             pixel_norm.cuh
//
// Column form. A thread owns one pack of columns and walks down the rows; neighbours own
// neighbouring packs. Narrow rows are folded: `fold` of them make one row of up to 128 packs, so
// that any number of channels gives full packs and full blocks. The position of an element within
// its sample alone decides who adds it up, in what order; where it isn't aligned to 16 bytes the
// pack is loaded element by element and nothing else changes. Hence a sample has the same bits in
// any batch, and a ragged end is a pack with fewer elements.
//
// Everything here depends on the view alone: no device, no pointer, and, but for the size of the
// grid, not on the number of samples.
#pragma once

#include <algorithm>
#include <numeric>

#include "cuda/elementwise.cuh"
#include "cuda/norm_cuda.h"

namespace fastnorm::cuda {

inline constexpr int kColumnThreads = 128;  // of the column and the plane form, at most
inline constexpr int kMergeThreads = 256;
inline constexpr int kPixelThreads = 256;
inline constexpr int64_t kPlaneLength = 512;    // elements from which planes get their own blocks
inline constexpr int64_t kPlanePacks = 2048;    // of a block of the plane form
inline constexpr int64_t kResidentRows = 16;    // folded rows that a block reads twice from cache
inline constexpr int64_t kColumnBlocks = 1056;  // per sample, when it has the rows for them
inline constexpr int64_t kMinChunk = 8, kMaxChunk = 256;  // folded rows

FASTNORM_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What a launch does: add up its elements, map them, or both, when a block has all it needs.
enum class Phase : int { Reduce = 0, Map = 1, Both = 2 };

// Up to n neighbours in memory, of which [low, high) are there.
struct Span {
  int64_t index;  // of element 0, in the tensor
  int low, high;
  bool whole;  // all n, aligned

  FASTNORM_DEVICE bool any() const { return low < high; }
  FASTNORM_DEVICE bool has(int e) const { return whole || (e >= low && e < high); }
};

// `again`: the tensor is read once more after this launch's pass, and not written by it.
template <int n, typename T>
FASTNORM_DEVICE Pack<T, n> load_span(const T* p, const Span& s, bool again) {
  if (s.whole) return again ? load<n>(p + s.index) : load_streaming<n>(p + s.index);
  Pack<T, n> pack{};
#pragma unroll
  for (int e = 0; e < n; ++e) {
    if (e < s.low || e >= s.high) continue;
    pack.v[e] = again ? load(p + s.index + e) : load_streaming<1>(p + s.index + e).v[0];
  }
  return pack;
}

template <int n, typename T>
FASTNORM_DEVICE void store_span(T* p, const Span& s, const Pack<T, n>& pack) {
  if (s.whole) return store_streaming(p + s.index, pack);
#pragma unroll
  for (int e = 0; e < n; ++e) {
    if (e >= s.low && e < s.high) store(p + s.index + e, pack.v[e]);
  }
}

// Visible to this thread after copy_async_wait.
template <int n, typename T>
FASTNORM_DEVICE void fetch_span(const T* p, const Span& s, T* place) {
  if (s.whole) return copy_async<n>(place, p + s.index);
#pragma unroll
  for (int e = 0; e < n; ++e) {
    if (s.has(e)) fetch_async<1>(place + e, p + s.index + e);
  }
}

// A thread's packs on their way into shared memory, kRing of each of `tensors` tensors: 32 KB of a
// tensor under way on a multiprocessor of 16 warps, where one pack ahead in registers was 8 KB.
inline constexpr int kRing = 4;

template <typename T, int n>
struct Ring {
  T* mine;
  int tensors;

  FASTNORM_DEVICE Ring(void* memory, int tensors_)
      : mine(static_cast<T*>(memory) + threadIdx.x * n), tensors(tensors_) {}
  static size_t bytes(int threads, int tensors) { return size_t{kRing} * tensors * threads * 16; }

  FASTNORM_DEVICE T* at(int turn, int tensor) const {
    return mine + ((turn % kRing) * tensors + tensor) * static_cast<int>(blockDim.x) * n;
  }
  // fetch(span, turn) starts the copies of a pack, use(span, turn) finds them there; begin() is
  // called when the first ones are on their way.
  template <typename Walk, typename Fetch, typename Begin, typename Use>
  FASTNORM_DEVICE void stream(Walk walk, Fetch&& fetch, Begin&& begin, Use&& use) const {
    Walk ahead = walk;
    const auto fetch_next = [&](int turn) {
      const Span s = ahead.next();
      if (s.any()) fetch(s, turn);
      copy_async_commit();
    };
    for (int turn = 0; turn < kRing - 1; ++turn) fetch_next(turn);
    begin();
    for (int turn = 0;; ++turn) {
      const Span here = walk.next();
      if (!here.any()) break;
      fetch_next(turn + kRing - 1);
      copy_async_wait<kRing - 1>();
      use(here, turn);
    }
    copy_async_wait<0>();
  }
};

// Dropout of elements index .. index+n-1, index being any: the two Philox calls they span.
template <typename A, int n>
FASTNORM_DEVICE void drop_span(const Drop<A>& drop, A (&v)[n], int64_t index) {
  if (!drop.on) return;
  if (index % n == 0) return drop.apply(v, index);
  const int64_t call = index / 8;
  const Philox4 one = philox4x32_10(static_cast<uint64_t>(call), drop.seed);
  const Philox4 two = philox4x32_10(static_cast<uint64_t>(call + 1), drop.seed);
  const auto pair = [](uint32_t low, uint32_t high) {
    return low | static_cast<uint64_t>(high) << 32;
  };
  const uint64_t a = pair(one.word[0], one.word[1]), b = pair(one.word[2], one.word[3]);
  const uint64_t c = pair(two.word[0], two.word[1]), d = pair(two.word[2], two.word[3]);
  const int first = static_cast<int>(index - call * 8);
#pragma unroll
  for (int e = 0; e < n; ++e) {
    const int at = first + e;
    const uint64_t four = at < 4 ? a : at < 8 ? b : at < 12 ? c : d;
    v[e] = (four >> (16 * (at % 4)) & 0xffffu) < drop.threshold ? v[e] * drop.scale : A(0);
  }
}

// ---- Column form

struct ColumnTiling {
  int64_t row, fold, columns;  // elements of a row; columns = fold * row
  int64_t tile, tiles;         // columns of a block
  int64_t chunk, chunks;       // folded rows of a block; chunks of a full outer block
  int threads;
  bool resident, aligned;

  static ColumnTiling of(const View& v, int width) {
    ColumnTiling t{};
    t.row = v.row_size();
    const int64_t most = int64_t{kColumnThreads} * width;
    const int64_t period =
        width / std::gcd(t.row, int64_t{width});  // rows, to the next aligned one
    t.fold = 1;
    if (t.row * period <= most) {
      const int64_t wanted = std::min(most / t.row, ceil_div(v.reduce_outer, 4));
      t.fold = std::max<int64_t>(1, wanted / period) * period;
    }
    t.columns = t.fold * t.row;
    t.tiles = 1;
    t.tile = ceil_div(t.columns, width) * width;
    if (t.columns > most) {
      // Whole statistics, if they fit.
      int64_t unit = std::lcm(int64_t{width}, v.reduce_inner);
      if (unit > most) unit = width;
      t.tiles = ceil_div(t.columns, most / unit * unit);
      t.tile = ceil_div(ceil_div(t.columns, t.tiles), unit) * unit;
      t.tiles = ceil_div(t.columns, t.tile);
    }
    t.threads = static_cast<int>(ceil_div(t.tile / width, 32) * 32);
    const int64_t rows = ceil_div(v.reduce_outer, t.fold);
    t.resident = rows <= kResidentRows && (t.tiles == 1 || t.tile % v.reduce_inner == 0);
    t.chunk = t.resident
                  ? rows
                  : std::clamp(ceil_div(rows * t.tiles, kColumnBlocks), kMinChunk, kMaxChunk);
    t.chunks = ceil_div(rows, t.chunk);
    return t;
  }
};

// A block's part of the column form: columns [first, end) of a chunk of the folded rows of outer
// block o. The chunk is `limit` contiguous elements: `full` folded rows and `rest` elements.
struct ColumnTile {
  int64_t o, chunk, index, first, end, offset, limit, full, rest;

  FASTNORM_DEVICE ColumnTile(const View& v, const ColumnTiling& t, int64_t task) {
    const int64_t above = divide(task, t.tiles);
    index = task - above * t.tiles;
    o = divide(above, t.chunks);
    chunk = above - o * t.chunks;
    first = index * t.tile;
    end = first + t.tile < t.columns ? first + t.tile : t.columns;
    const int64_t size = v.rows_of(o) * t.row, begin = chunk * t.chunk * t.columns;
    offset = o * v.reduce_outer * t.row + begin;
    limit = size - begin < t.chunk * t.columns ? size - begin : t.chunk * t.columns;
    if (limit < 0) limit = 0;
    full = divide(limit, t.columns);
    rest = limit - full * t.columns;
  }
  // Elements of column j.
  FASTNORM_DEVICE int64_t count(int64_t j) const { return full + (j < rest ? 1 : 0); }
};

// This thread's packs, from the first row down.
template <int n>
struct ColumnWalk {
  int64_t index, stride;
  int left, high, last_high;  // rows left; elements of a pack, and of the last one
  bool aligned;

  FASTNORM_DEVICE ColumnWalk(const ColumnTiling& t, const ColumnTile& tile) {
    const int64_t column = tile.first + int64_t{threadIdx.x} * n;
    index = tile.offset + column;
    stride = t.columns;
    left = column < tile.end ? static_cast<int>(tile.count(column)) : 0;
    high = tile.end - column < n ? static_cast<int>(tile.end - column) : n;
    const int64_t there = tile.rest - column;
    last_high = there > 0 && there < high ? static_cast<int>(there) : high;
    aligned = t.aligned;
  }
  FASTNORM_DEVICE Span next() {
    if (left == 0) return {0, 0, 0, false};
    --left;
    Span s{index, 0, left == 0 ? last_high : high, false};
    s.whole = s.high == n && aligned && index % n == 0;
    index += stride;
    return s;
  }
};

// Runs of `size` columns that belong together (of a statistic, or of a channel), `total` of them
// in a row of the tensor; those of one tile. In a folded tile each is there `fold` times.
struct Segments {
  int64_t first, n;  // segments first .. first+n-1
  int64_t size, begin, end, row, fold;

  FASTNORM_DEVICE Segments(const ColumnTiling& t, const ColumnTile& tile, int64_t size_,
                           int64_t total)
      : size(size_), begin(tile.first), end(tile.end), row(t.row), fold(t.fold) {
    first = fold > 1 ? 0 : divide(begin, size);
    n = fold > 1 ? total : divide(end - 1, size) - first + 1;
  }
  FASTNORM_DEVICE int64_t low(int64_t g) const {
    return (first + g) * size > begin ? (first + g) * size : begin;
  }
  FASTNORM_DEVICE int count(int64_t g) const {
    if (fold > 1) return static_cast<int>(fold * size);
    const int64_t high = (first + g + 1) * size;
    return static_cast<int>((high < end ? high : end) - low(g));
  }
  // Column i of segment g, from the beginning of the tile.
  FASTNORM_DEVICE int column(int64_t g, int i) const {
    if (fold == 1) return static_cast<int>(low(g) - begin) + i;
    const int turn = size == 1 ? i : static_cast<int>(divide(i, size));
    return static_cast<int>(turn * row + g * size + (i - turn * size));
  }
};

// Threads that share a segment: a power of two, up to a warp.
FASTNORM_DEVICE int lanes_of_segment(const Segments& s) {
  int lanes = 1;
  const int64_t columns = s.fold * s.size < s.end - s.begin ? s.fold * s.size : s.end - s.begin;
  while (lanes < 32 && lanes < columns && 2 * lanes * s.n <= int64_t{blockDim.x}) lanes *= 2;
  return lanes;
}

// f(segment, lane, lanes) by every thread of the block, whole warps at a time; segments past the
// last are asked for as well, for the sake of shuffles in f.
template <typename F>
FASTNORM_DEVICE void for_each_segment(const Segments& s, F&& f) {
  const int lanes = lanes_of_segment(s), thread = static_cast<int>(threadIdx.x);
  const int step = static_cast<int>(blockDim.x) / lanes;
  for (int64_t g = 0; g < s.n; g += step) f(g + thread / lanes, thread % lanes, lanes);
}

// Shared memory of one value per column of a tile: element e of thread t's pack lies at
// e * pitch + t, so that neither threads nor neighbouring columns share a bank.
template <typename A, int n>
FASTNORM_HD int column_pitch(int threads) {
  return threads + 128 / static_cast<int>(sizeof(A)) / n;
}

// Where the partial sums lie: [outer][chunk][tile][slot], the slot being the segment's number
// within its tile. A segment has the chunks of all tiles that it touches.
struct Pieces {
  int64_t outer, segments, chunks, tiles, slots, tile, size;
  bool folded;

  static Pieces of(const View& v, const ColumnTiling& t, int64_t size, int64_t segments) {
    const int64_t touched = t.tile % size == 0 ? t.tile / size : (t.tile - 1) / size + 2;
    return {
        v.outer, segments, t.chunks,  t.tiles, t.fold > 1 ? segments : std::min(segments, touched),
        t.tile,  size,     t.fold > 1};
  }
  FASTNORM_HD int64_t total() const { return outer * chunks * tiles * slots; }

  FASTNORM_DEVICE int64_t slot(int64_t o, int64_t chunk, int64_t at, int64_t segment) const {
    const int64_t first = folded || tiles == 1 ? 0 : divide(at * tile, size);
    return ((o * chunks + chunk) * tiles + at) * slots + segment - first;
  }
};

// The pieces of one segment, in the order in which they are merged: f(index of the piece) for
// pieces row, row + rows, ... A segment that goes on in another tile is the first one there.
struct PieceList {
  int64_t first, per_chunk, slots, chunks, tiles, first_slot;

  FASTNORM_DEVICE PieceList(const Pieces& all, int64_t o, int64_t segment) {
    const bool split = !all.folded && all.tiles > 1;
    const int64_t tile = split ? divide(segment * all.size, all.tile) : 0;
    tiles = split ? divide((segment + 1) * all.size - 1, all.tile) - tile + 1 : 1;
    chunks = all.chunks;
    slots = all.slots;
    per_chunk = all.tiles * slots;
    first = (o * chunks * all.tiles + tile) * slots;
    first_slot = segment - (split ? divide(tile * all.tile, all.size) : 0);
  }
  FASTNORM_DEVICE int64_t begin() const { return first + first_slot; }
  // The count is known before the loop: so the loads of four pieces are under way at once.
  template <typename F>
  FASTNORM_DEVICE void for_each(int row, int rows, F&& f) const {
    const int64_t total = chunks * tiles;
    const int count = static_cast<int>(total > row ? divide(total - row + rows - 1, rows) : 0);
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      const int64_t at = row + int64_t{i} * rows, chunk = tiles == 1 ? at : divide(at, tiles);
      const int64_t tile = at - chunk * tiles;
      f(first + chunk * per_chunk + tile * slots + (tile == 0 ? first_slot : 0));
    }
  }
};

// ---- Plane form

struct PlaneTiling {
  int64_t length, planes, part, parts, chunks;  // a chunk: `planes` planes, or one part of a plane
  int64_t packs;                                // of a part, whatever its alignment
  bool aligned;

  static bool takes(const View& v) { return v.inner >= kPlaneLength; }
  static PlaneTiling of(const View& v, int width) {
    PlaneTiling t{};
    const int64_t most = kPlanePacks * width;
    t.length = v.inner;
    t.parts = ceil_div(t.length, most);
    t.part = ceil_div(ceil_div(t.length, t.parts), width) * width;
    t.parts = ceil_div(t.length, t.part);
    t.planes = t.parts > 1 ? 1 : std::max<int64_t>(1, most / t.length);
    t.chunks = ceil_div(v.reduce_outer, t.planes) * t.parts;
    t.packs = t.length % width == 0 ? t.part / width : t.part / width + 1;
    return t;
  }
  // Partial sums of the channels, for segments of `size` channels: a statistic's, or one.
  Pieces pieces(const View& v, int64_t size) const {
    return {v.outer, v.channels() / size, chunks, v.channels(), 1, 1, size, false};
  }
};

// A block's part: elements [begin, end) of planes [first, last) of a channel.
struct PlaneTile {
  int64_t o, chunk, channel, statistic, first, last, begin, end, offset, stride;

  FASTNORM_DEVICE PlaneTile(const View& v, const PlaneTiling& t, int64_t task) {
    const int64_t channels = v.channels(), above = divide(task, channels);
    channel = task - above * channels;
    o = divide(above, t.chunks);
    statistic = o * v.kept + divide(channel, v.channels_per_kept());
    chunk = above - o * t.chunks;
    stride = v.row_size();
    offset = o * v.reduce_outer * stride + channel * t.length;
    const int64_t group = divide(chunk, t.parts), rows = v.rows_of(o);
    first = group * t.planes;
    last = first + t.planes < rows ? first + t.planes : rows;
    begin = (chunk - group * t.parts) * t.part;
    end = begin + t.part < t.length ? begin + t.part : t.length;
  }
  FASTNORM_DEVICE bool empty() const { return first >= last; }
  FASTNORM_DEVICE int64_t first_element() const { return offset + first * stride + begin; }
};

// This thread's packs: aligned ones, of which the first and the last of a part may be ragged.
template <int n>
struct PlaneWalk {
  int64_t start, stride, length, packs, pack, left;  // `left` planes, this one included
  bool aligned;

  FASTNORM_DEVICE PlaneWalk(const PlaneTiling& t, const PlaneTile& tile) {
    start = tile.first_element();
    stride = tile.stride;
    length = tile.end - tile.begin;
    packs = t.packs;
    pack = threadIdx.x;
    left = tile.last - tile.first;
    aligned = t.aligned;
  }
  FASTNORM_DEVICE Span next() {
    while (left > 0) {
      if (pack >= packs) {
        pack -= packs;
        start += stride;
        --left;
        continue;
      }
      const int64_t head = start % n, at = pack * n - head;  // from the beginning of the part
      pack += blockDim.x;
      Span s{start + at, at < 0 ? static_cast<int>(-at) : 0,
             length - at < n ? static_cast<int>(length - at) : n, false};
      if (!s.any()) continue;
      s.whole = s.low == 0 && s.high == n && aligned;
      return s;
    }
    return {0, 0, 0, false};
  }
};

}  // namespace fastnorm::cuda
