// encoder_small: all layers of a BERT encoder on at most MAX_ROWS rows, in one launch.
//
//   A layer, all blocks side by side, a barrier of the whole grid after each line:
//
//   1 QKV   h  -> LayerNorm -> x Wqkv + b                     -> qkv       tiles of 16 features, dealt to groups
//   2       softmax(q k / sqrt(d)) v, and probabilities       -> context   a (sequence, head) a block
//   3 OUT   context x Wo + b + LayerNorm(h)                   -> h1, statistics of h1     as 1
//   4 UP    h1 -> LayerNorm -> act(x Wup + b)                 -> wide                     as 1
//   5 DOWN  wide x Wdown + b + LayerNorm(h1)                  -> h, statistics of h       as 1
//
//   After the last layer: h -> LayerNorm -> last_hidden_state. hidden_states leave in line 1 of the layer after.
//
//   A product. Block r of a group of four multiplies the r-th slice of the inner dimension, all rows, for all tiles of
//   the group: it reads a quarter of the activations, and one row of blocks all of them. Its eight warps divide rows
//   (16 each) and, where rows are few, the slice. fp32 sums meet in shared memory: first of the warps, then of the four
//   blocks (a cluster, so that they read each other's), in a fixed order; bias, activation or residual, one rounding,
//   one store. A LayerNorm is no pass of its own: whoever stores a tile stores mean and squared deviations of its 16
//   columns too, whoever reads rows merges these and normalises on the way into shared memory.
//
//   Resident. Shared memory of a block: a ring of weight tiles | the activations of this phase, then sums over them.
//   The ring knows no phases: a block's tiles of all layers follow each other in it, and it is filled again as soon as
//   tiles have been read, before the barrier and whatever the barrier waits for. So memory streams weights all the time
//   and a phase costs its latency: barrier, rows from L2, products, exchange. Rows between phases live in L2.
#pragma once

#include "attention.cuh"
#include "product.cuh"

namespace bert_fast {

// Biases and LayerNorm parameters of a layer into L2, ahead of their use: the ring streams matrices only.
__device__ inline void prefetch_vectors(const Params& p, int layer) {
  if (layer == p.shape.layers) return;
  constexpr int LINE = 64;  // numbers
  const int lines = ceil_div(larger(p.shape.intermediate, p.shape.hidden), LINE);
  for (int i = blockIdx.x * THREADS + threadIdx.x; i < VECTORS * lines; i += gridDim.x * THREADS) {
    const int vector = i / lines, first = i % lines * LINE;
    const int size = vector == UP_BIAS ? p.shape.intermediate : p.shape.hidden;
    if (first < size) prefetch_l2(bytes(p.layers[layer].vector[vector]) + first * 2);
  }
}

// What one product of one layer reads and writes. The embeddings are normalised already.
struct Task {
  Rows x;
  Epilogue to;
  const void* statistics = nullptr;  // of the tiles of x, where x is normalised
  float eps = 0;
};

__device__ inline Task task(const Params& p, int layer, int product) {
  const int hidden = p.shape.hidden, wide = p.shape.intermediate;
  const Layer& own = p.layers[layer];
  const void* const* v = own.vector;
  Rows h = {p.x, hidden, nullptr, nullptr};
  if (layer > 0) h = {p.h, hidden, p.layers[layer - 1].vector[GAMMA2], p.layers[layer - 1].vector[BETA2]};
  const Rows h1 = {p.h1, hidden, v[GAMMA1], v[BETA1]};
  switch (product) {
    case QKV:
      return {h, {nullptr, hidden, p.qkv, 3 * hidden, -1}, p.statistics, layer > 0 ? p.layers[layer - 1].eps2 : 0};
    case OUT:
      return {{p.context, hidden}, {v[OUT_BIAS], hidden, p.h1, hidden, -1, h.from, h.gamma, h.beta, p.statistics1}};
    case UP: return {h1, {v[UP_BIAS], wide, p.wide, wide, p.activation}, p.statistics1, own.eps1};
    default: return {{p.wide, wide}, {v[DOWN_BIAS], hidden, p.h, hidden, -1, h1.from, h1.gamma, h1.beta, p.statistics}};
  }
}

template <class E, int D>
__global__ void __launch_bounds__(THREADS, 1) encoder_small_kernel(const __grid_constant__ Params p) {
  Block b(p);
  Ring ring(b);
  prefetch_vectors(p, 0);
  for (int layer = 0; layer < p.shape.layers; ++layer) {
    prefetch_vectors(p, layer + 1);
    for (int product = 0; product < PRODUCTS; ++product) {
      if (product == OUT) {
        attend_all<E, D>(b, layer);
        b.grid_sync();
      }
      const Task t = task(p, layer, product);
      if (t.x.gamma) {
        merge_statistics(b, t.statistics, t.eps);
        __syncthreads();
      }
      if (product == QKV && layer > 0 && p.hidden) {
        const int64_t size = int64_t(p.shape.batch) * p.shape.length * p.shape.hidden * 2;
        store_normalised<E>(b, bytes(p.hidden) + (layer - 1) * size, t.x.gamma, t.x.beta);
      }
      multiply_all<E>(b, ring, layer, product, t.x, t.to);
      b.grid_sync();
    }
  }
  const Layer& last = p.layers[p.shape.layers - 1];
  merge_statistics(b, p.statistics, last.eps2);
  __syncthreads();
  store_normalised<E>(b, p.last, last.vector[GAMMA2], last.vector[BETA2]);
}

}  // namespace bert_fast
