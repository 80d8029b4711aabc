// The ring of weight tiles in shared memory: filled in the order of the multiplications, across phases and layers.
#pragma once

#include "block.cuh"

namespace bert_fast {

// Where a row of a product's weight lies.
__device__ inline const char* weight_row(const Params& p, int layer, int product, int feature) {
  int weight = ATTENTION_OUT + product - OUT;
  if (product == QKV) {  // three weights, one behind the other
    const int hidden = p.shape.hidden, which = (feature >= hidden) + (feature >= 2 * hidden);
    weight = QUERY + which;
    feature -= which * hidden;
  }
  return bytes(p.layers[layer].weight[weight]) + int64_t(feature) * steps(p.shape, product) * STEP * 2;
}

// The block's weights in the order in which it multiplies them, stage by stage: TILE features x one unit of its slice.
struct WeightOrder {
  const Params& p;
  int group, rank;
  int layer = 0, product = 0, first = 0, unit = 0, tile = 0;  // tile: within the round that starts at `first`
  Slice tiles{}, steps{};

  __device__ WeightOrder(const Params& params, int group, int rank) : p(params), group(group), rank(rank) { settle(); }

  __device__ bool ended() const { return layer == p.shape.layers; }

  // To the next product of which this block has a part.
  __device__ void settle() {
    for (; !ended(); next_product()) {
      tiles = hand(p.shape, p.plan.groups, layer, product, group);
      steps = slice(p.shape, product, rank);
      if (tiles.count && steps.count) return;
    }
  }

  __device__ void next_product() {
    if (++product < PRODUCTS) return;
    product = 0;
    ++layer;
  }

  __device__ void next() {
    if (++tile < smaller(p.plan.round, tiles.count - first)) return;
    tile = 0;
    if (++unit < units(p.plan, steps.count)) return;
    unit = 0;
    if ((first += p.plan.round) < tiles.count) return;
    first = 0;
    next_product();
    settle();
  }
};

// Weight tiles on their way to the tensor cores. A stage's barrier completes when all threads' copies have landed.
struct Ring {
  const Params& p;
  WeightOrder order;
  uint64_t* barriers;
  char* memory;
  int write = 0;       // stage that is filled next
  int room, held = 0;  // stages that may be filled; stages filled, not yet multiplied
  int read = 0;        // stage that is multiplied next, and the phase of its barrier
  uint32_t phase = 0;

  __device__ Ring(const Block& b) : p(b.p), order(b.p, b.group, b.peers.rank), room(b.p.plan.stages) {
    barriers = reinterpret_cast<uint64_t*>(shared_memory());
    memory = shared_memory() + ring_offset(p.plan);
    if (int(threadIdx.x) < p.plan.stages) mbarrier_init(barriers + threadIdx.x, THREADS);
    __syncthreads();
    fill();
  }

  // Ask for what there is room for. All threads; a __syncthreads must lie between the last `release` and this.
  __device__ void fill() {
    constexpr int LANES = THREADS / TILE;  // threads that copy one row
    const int row = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    for (; room > 0 && !order.ended(); --room, ++held, order.next()) {
      const int feature = (order.tiles.begin + (order.first + order.tile) * p.plan.groups) * TILE + row;
      const int done = order.unit * p.plan.unit;
      const int pieces = smaller(p.plan.unit, order.steps.count - done) * 2;  // of 16 bytes
      const char* from = weight_row(p, order.layer, order.product, feature) + (order.steps.begin + done) * STEP * 2;
      char* to = memory + write * stage_bytes(p.plan) + row * stage_row_bytes(p.plan);
      for (int i = lane; i < pieces; i += LANES) cp_async_16(to + i * 16, from + i * 16);
      cp_async_arrive(barriers + write);
      if (++write == p.plan.stages) write = 0;
    }
  }

  __device__ int stage(int ahead) const {
    return read + ahead < p.plan.stages ? read + ahead : read + ahead - p.plan.stages;
  }

  // Until the next `count` stages have landed.
  __device__ void wait(int count) {
    if (held < count) {  // a short ring: some are not even asked for
      __syncthreads();
      fill();
    }
    for (int i = 0; i < count; ++i) mbarrier_wait(barriers + stage(i), read + i < p.plan.stages ? phase : phase ^ 1);
  }

  // This thread has multiplied `count` stages.
  __device__ void release(int count) {
    phase ^= read + count >= p.plan.stages;
    read = stage(count);
    held -= count;
    room += count;
  }
};

}  // namespace bert_fast
