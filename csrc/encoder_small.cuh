// encoder_small: all layers of a BERT encoder on at most MAX_ROWS rows, in one launch.
//
//   A layer is four products, all blocks side by side, and a barrier of the whole grid after each:
//
//   QKV    LayerNorm(h) x Wqkv + b                             -> qkv
//   OUT    softmax(q k * scale) v x Wout + b + LayerNorm(h)    -> h1, statistics of h1   (and probabilities)
//   UP     act(LayerNorm(h1) x Wup + b)                        -> wide
//   DOWN   wide x Wdown + b + LayerNorm(h1)                    -> h, statistics of h
//
//   After the last layer LayerNorm(h) -> last_hidden_state; hidden_states leave beside the QKV of the layer after.
//
//   Who. Tiles of 16 features are dealt to groups of four blocks. Block r of a group multiplies the r-th slice of the
//   inner dimension, so it reads a quarter of the activations, and the group all of them. In OUT the slice is that of
//   some heads, whose attention the block computes itself: every group does so again, which costs less than a barrier.
//   A block's eight warps divide the rows, 16 each, and, where rows are few, the slice. Their fp32 sums meet in shared
//   memory, those of the four blocks as well (a group is a cluster), in a fixed order; then bias, activation or
//   residual, one rounding, one store. A LayerNorm is no pass of its own: whoever stores a tile stores mean and squared
//   deviations of its 16 columns too, and whoever reads rows merges these and normalises on the way in.
//
//   What is resident where. A block's shared memory: a ring of weight tiles | the activations of this product, in their
//   place then the sums. The ring knows no products: the block's tiles of all layers follow each other in it, and are
//   asked for as soon as there is room, long before the barrier that their product waits for. So memory streams weights
//   all the time, and a product costs its latency: barrier, rows from L2, tensor cores, exchange, store. Rows between
//   products live in L2.
#pragma once

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

// The embeddings are normalised already.
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
      return {{nullptr, hidden}, {v[OUT_BIAS], hidden, p.h1, hidden, -1, h.from, h.gamma, h.beta, p.statistics1}};
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
      const Task t = task(p, layer, product);
      multiply_all<E, D>(b, ring, layer, product, t);
      if (product == QKV && layer > 0 && p.hidden) {
        const int64_t size = int64_t(p.shape.batch) * p.shape.length * p.shape.hidden * 2;
        store_normalised<E>(b, bytes(p.hidden) + (layer - 1) * size, t.x.gamma, t.x.beta);
      }
      b.grid_sync();
    }
  }
  const Layer& last = p.layers[p.shape.layers - 1];
  merge_statistics(b, p.statistics, last.eps2);
  __syncthreads();
  store_normalised<E>(b, p.last, last.vector[GAMMA2], last.vector[BETA2]);
}

}  // namespace bert_fast
