// One product: activations x weight tiles, sums over warps and blocks, and what is done with a sum.
#pragma once

#include "attention.cuh"
#include "ring.cuh"

namespace bert_fast {

__device__ inline float activate(float x, int activation) {
  switch (activation) {
    case GELU: return 0.5f * x * (1 + erff(x * 0.70710678f));
    case GELU_TANH: return x / (1 + expf(-1.59576912f * (x + 0.044715f * x * x * x)));  // 0.5 + 0.5 tanh is a sigmoid
    case RELU: return x > 0 || x != x ? x : 0;                                          // NaN stays
    default: return x / (1 + expf(-x));
  }
}

// What becomes of four sums of one row: y = act(sum + bias) or, with a residual, sum + bias + LayerNorm(residual).
struct Epilogue {
  const void* bias;  // of the features of one weight
  int weight_features;
  void* to;  // (rows, columns)
  int columns;
  int activation = -1;                           // of enum Activation
  const void* residual = nullptr;                // (rows, columns)
  const void *gamma = nullptr, *beta = nullptr;  // of the residual's LayerNorm, where it has one
  void* statistics = nullptr;                    // (rows, columns / TILE) float2 of y, with a residual
};

// Of one row, what the epilogue of four features reads.
struct Given {
  uint2 bias, residual, gamma, beta;
};

__device__ inline Given load_given(const Params& p, int layer, const Epilogue& e, int feature, int row) {
  Given g{};
  const char* bias = bytes(e.bias);
  int within = feature;
  if (e.weight_features < e.columns) {  // three weights side by side
    bias = bytes(p.layers[layer].vector[QUERY_BIAS + feature / e.weight_features]);
    within = feature % e.weight_features;
  }
  g.bias = *reinterpret_cast<const uint2*>(bias + within * 2);
  if (e.residual) g.residual = load_8(bytes(e.residual) + (int64_t(row) * e.columns + feature) * 2);
  if (e.gamma) {
    g.gamma = *reinterpret_cast<const uint2*>(bytes(e.gamma) + feature * 2);
    g.beta = *reinterpret_cast<const uint2*>(bytes(e.beta) + feature * 2);
  }
  return g;
}

// Four lanes have the 16 features of a tile in one row.
template <class E>
__device__ void finish(Block& b, const Epilogue& e, const Given& given, float4 y, int feature, int row, bool live) {
  const float4 bias = unpack4<E>(given.bias);
  y = make_float4(y.x + bias.x, y.y + bias.y, y.z + bias.z, y.w + bias.w);
  if (e.activation >= 0) {
    y = make_float4(activate(y.x, e.activation), activate(y.y, e.activation), activate(y.z, e.activation),
                    activate(y.w, e.activation));
  }
  if (e.residual) {
    float4 r = unpack4<E>(given.residual);
    if (e.gamma && live) r = normalised4<E>(r, b.statistics[row], given.gamma, given.beta);
    y = make_float4(y.x + r.x, y.y + r.y, y.z + r.z, y.w + r.w);
    float mean = y.x + y.y + y.z + y.w;
    for (int i = 1; i < 4; i *= 2) mean += shfl_xor(mean, i);
    mean /= TILE;
    const float4 d = make_float4(y.x - mean, y.y - mean, y.z - mean, y.w - mean);
    float squares = d.x * d.x + d.y * d.y + d.z * d.z + d.w * d.w;
    for (int i = 1; i < 4; i *= 2) squares += shfl_xor(squares, i);
    if (live && threadIdx.x % 4 == 0) {
      const int64_t at = int64_t(row) * (e.columns / TILE) + feature / TILE;
      static_cast<float2*>(e.statistics)[at] = make_float2(mean, squares);
    }
  }
  if (live) store4<E>(bytes(e.to) + (int64_t(row) * e.columns + feature) * 2, y);
}

// The sums of a round over this warp's part of one unit: 16 rows x `count` tiles.
template <class E>
__device__ void multiply(const Block& b, const Ring& ring, int count, int unit, int done, float (&sum)[ROUND][2][4]) {
  const Plan& plan = b.p.plan;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int groups = row_groups(b.rows), parts = WARPS / groups;
  const int row = warp % groups * 16, part = warp / groups;
  if (row >= b.rows) return;
  // Rows are the right operand, features the left: a few rows fill the narrow side of a tensor-core product.
  const char* x = b.region + (row + lane / 16 * 8 + lane % 8) * x_row_bytes(plan) + lane / 8 % 2 * 16;
  const int w = lane % 16 * stage_row_bytes(plan) + lane / 16 * 16;
  const int resident = unit % plan.x_units * plan.unit;
  // Parts take turns over all units, so that none has the odd step of each.
  for (int k = (part + parts - unit * plan.unit % parts) % parts; k < done; k += parts) {
    uint32_t rows[4];
    ldmatrix_x4(rows, x + (resident + k) * STEP * 2);
#pragma unroll
    for (int t = 0; t < ROUND; ++t) {
      if (t < count) {
        uint32_t tile[4];
        ldmatrix_x4(tile, ring.memory + ring.stage(t) * stage_bytes(plan) + w + k * STEP * 2);
        E::mma(sum[t][0], tile, rows[0], rows[1]);
        E::mma(sum[t][1], tile, rows[2], rows[3]);
      }
    }
  }
}

// Sums of all warps of the block, (tile, row, SUM_STRIDE), where the group reads them.
__device__ inline void add_warps(Block& b, int count, const float (&sum)[ROUND][2][4]) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int groups = row_groups(b.rows), parts = WARPS / groups, height = groups * 16;
  float* sums = reinterpret_cast<float*>(b.region);
  const int row = warp % groups * 16 + lane % 4 * 2, part = warp / groups;
  if (warp % groups * 16 < b.rows) {
#pragma unroll
    for (int t = 0; t < ROUND; ++t) {
      if (t < count) {
        float* to = sums + ((part * count + t) * height + row) * SUM_STRIDE + lane / 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float* at = to + half * 8 * SUM_STRIDE;
          at[0] = sum[t][half][0];
          at[SUM_STRIDE] = sum[t][half][1];
          at[8] = sum[t][half][2];
          at[SUM_STRIDE + 8] = sum[t][half][3];
        }
      }
    }
  }
  __syncthreads();
  char* own = b.peers.own(b.region);
  for (int i = threadIdx.x; i < count * b.rows * 4; i += THREADS) {
    const int pair = i / 4, at = (pair / b.rows * height + pair % b.rows) * SUM_STRIDE + i % 4 * 4;
    float4 total = *reinterpret_cast<float4*>(sums + at);
    for (int part = 1; part < parts; ++part) {
      const float4 more = *reinterpret_cast<float4*>(sums + part * count * height * SUM_STRIDE + at);
      total = make_float4(total.x + more.x, total.y + more.y, total.z + more.z, total.w + more.w);
    }
    *reinterpret_cast<float4*>(own + at * 4) = total;  // in place within a cluster: this thread alone has read it
  }
}

// What one product of one layer reads and writes.
struct Task {
  Rows x;
  Epilogue to;
  const void* statistics = nullptr;  // of the tiles of x, where x is normalised
  float eps = 0;
};

template <class E, int D>
__device__ void multiply_all(Block& b, Ring& ring, int layer, int product, const Task& t) {
  const Plan& plan = b.p.plan;
  const Slice tiles = hand(b.p.shape, plan.groups, layer, product, b.group);
  const Slice part = slice(b.p.shape, product, b.peers.rank);
  bool merged = !t.x.gamma;
  const auto merge = [&] {
    if (merged) return;
    merge_statistics(b, t.statistics, t.eps);
    __syncthreads();
    merged = true;
  };
  for (int first = 0; first < tiles.count; first += plan.round) {
    const int count = smaller(plan.round, tiles.count - first);
    if (product == OUT && part.count) {  // its rows are one unit
      attend_all<E, D>(b, layer, part, b.p.probs && tiles.begin + first == 0);
      __syncthreads();
    }
    float sum[ROUND][2][4] = {};
    for (int unit = 0; unit * plan.unit < part.count; ++unit) {
      const int before = unit * plan.unit;
      if (product != OUT && unit % plan.x_units == 0) {
        const int held = smaller(plan.x_units * plan.unit, part.count - before);
        load_rows<E, 1>(b, t.x, (part.begin + before) * STEP, held * STEP, merge);
        __syncthreads();
      }
      ring.wait(count);
      multiply<E>(b, ring, count, unit, smaller(plan.unit, part.count - before), sum);
      __syncthreads();
      ring.release(count);
    }
    // Pairs (tile, row) of this block, four lanes each; what does not depend on the sums is loaded before the wait.
    const int pairs = count * b.rows, height = row_groups(b.rows) * 16, column = threadIdx.x % 4 * 4;
    int pair = pair_of(threadIdx.x / 4, b.peers.rank), feature = 0, row = 0;
    Given given{};
    const auto prepare = [&] {
      if (pair >= pairs) return;
      row = pair % b.rows;
      feature = (tiles.begin + (first + pair / b.rows) * plan.groups) * TILE + column;
      given = load_given(b.p, layer, t.to, feature, row);
    };
    prepare();
    add_warps(b, count, sum);
    b.peers.sync();
    for (int before = 0; before < pairs; before += pair_of(THREADS / 4, 0)) {
      const bool live = pair < pairs;
      float4 y = make_float4(0, 0, 0, 0);
      if (live) {
        const int at = ((pair / b.rows * height + row) * SUM_STRIDE + column) * 4;
#pragma unroll
        for (int other = 0; other < GROUP; ++other) {
          const float4 theirs = b.peers.read(b.peers.of(other, b.region) + at);
          y = make_float4(y.x + theirs.x, y.y + theirs.y, y.z + theirs.z, y.w + theirs.w);
        }
      }
      finish<E>(b, t.to, given, y, feature, row, live);
      pair += pair_of(THREADS / 4, 0);
      prepare();
    }
    if (first + plan.round < tiles.count) b.peers.sync();  // before the region, or the strip, is written again
  }
  merge();  // also where no rows were loaded: the residual of the next product is normalised with them
}

}  // namespace bert_fast
