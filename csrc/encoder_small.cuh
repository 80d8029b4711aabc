// encoder_small: all layers of a BERT encoder on at most MAX_ROWS rows, in one launch.
//
//   A layer is four products, all blocks side by side, and a barrier of the whole grid after each:
//
//   QKV    LayerNorm(h) x Wqkv + b                             -> qkv
//   OUT    softmax(q k * scale) v x Wout + b + LayerNorm(h)    -> h, its statistics   (and probabilities)
//   UP     act(LayerNorm(h) x Wup + b)                         -> wide
//   DOWN   wide x Wdown + b + LayerNorm(h)                     -> h, its statistics
//
//   After the last layer LayerNorm(h) -> last_hidden_state; hidden_states leave beside the QKV of the layer after.
//
//   Who. Tiles of 16 features are dealt to groups of four blocks. Block r of a group multiplies the r-th slice of the
//   inner dimension, so it reads a quarter of the activations, and the group all of them. In OUT the slice is that of
//   some heads, whose attention the block computes itself: every group does so again, in place of one more barrier.
//   A block's eight warps divide the rows, 16 each, and, where rows are few, the slice. Their fp32 sums meet in shared
//   memory, those of the four blocks as well (a group is a cluster), in a fixed order; then bias, activation or
//   residual, one rounding, one store. A LayerNorm is no pass of its own: whoever stores a tile stores mean and squared
//   deviations of its 16 columns too, and whoever reads rows merges these and normalises on the way in.
//
//   What is resident where. A block's shared memory: a ring of weight tiles | the activations of this product, in their
//   place then the sums. The ring knows no products: the block's tiles of all layers follow each other in it. What a
//   product has used is asked for again while its barrier is awaited, for BERT-base on an H100 a layer ahead of its
//   use. So no product waits for weights, it costs its latency: barrier, rows from L2, tensor cores, exchange, store.
//   Rows between products live in L2.
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

__device__ inline Task task(const Block& b, int layer, int product) {
  const Params& p = b.p;
  const int hidden = p.shape.hidden, wide = p.shape.intermediate;
  const Layer &own = p.layers[layer], &before = p.layers[layer > 0 ? layer - 1 : 0];
  Rows h = {p.x, hidden};  // the embeddings are normalised already
  if (layer > 0) h = {p.h, hidden, before.vector[GAMMA2], before.vector[BETA2], p.statistics, before.eps2};
  const Rows h1 = {p.h, hidden, own.vector[GAMMA1], own.vector[BETA1], p.statistics, own.eps1};
  Task t = {layer, product, hand(p.shape, p.plan.groups, layer, product, b.group),
            slice(p.shape, product, b.peers.rank)};
  if (product == QKV) {
    t.x = h;
    t.to = {own.vector + QUERY_BIAS, hidden, p.qkv, 3 * hidden};
  } else if (product == OUT) {
    t.to = {own.vector + OUT_BIAS, hidden, p.h, hidden, -1, h, p.statistics};
  } else if (product == UP) {
    t.x = h1;
    t.to = {own.vector + UP_BIAS, wide, p.wide, wide, p.activation};
  } else {
    t.x = {p.wide, wide};
    t.to = {own.vector + DOWN_BIAS, hidden, p.h, hidden, -1, h1, p.statistics};
  }
  return t;
}

template <class E, int D>
__global__ void __launch_bounds__(THREADS, 1) encoder_small_kernel(const __grid_constant__ Params p) {
  Block b(p);
  Task& t = *reinterpret_cast<Task*>(shared_memory() + task_offset());
  if (threadIdx.x == 0) t = task(b, 0, QKV);
  Ring ring(b);
  prefetch_vectors(p, 0);
  for (int layer = 0, product = QKV; layer < p.shape.layers;) {
    run<E, D>(b, ring, t);
    if (product == QKV && layer > 0 && p.hidden) {
      const int64_t size = int64_t(p.shape.batch) * p.shape.length * p.shape.hidden * 2;
      store_normalised<E>(b, bytes(p.hidden) + (layer - 1) * size, t.x);
    }
    b.arrive();
    if (product == QKV) prefetch_vectors(p, layer + 1);
    layer += product == DOWN;
    product = (product + 1) % PRODUCTS;
    if (threadIdx.x == THREADS - 1 && layer < p.shape.layers) t = task(b, layer, product);
    ring.fill();
    b.wait();
  }
  const Layer& last = p.layers[p.shape.layers - 1];
  const Rows h = {p.h, p.shape.hidden, last.vector[GAMMA2], last.vector[BETA2], p.statistics, last.eps2};
  merge_statistics(b, h);
  __syncthreads();
  store_normalised<E>(b, p.last, h);
}

}  // namespace bert_fast
