// One product: activations x weight tiles, sums over warps and blocks, and what is done with a sum.
#pragma once

#include "attention.cuh"
#include "ring.cuh"

namespace bert_fast {

// What becomes of four sums of one row: y = act(sum + bias) or, with a residual, sum + bias + LayerNorm(residual).
struct Epilogue {
  const void* const* bias;  // one for every weight_features features
  int weight_features;
  void* to;  // (rows, columns)
  int columns;
  int activation = -1;         // of enum Activation
  Rows residual = {};          // its statistics are merged already
  void* statistics = nullptr;  // (rows, columns / TILE) float2 of y, with a residual
};

// One product of one layer: what is read, what is written, and this block's share. In shared memory, since it would
// take half of a thread's registers.
struct Task {
  int layer, product;
  Slice tiles, part;  // the group's hand, the block's slice
  Rows x = {};        // none in OUT, where the context is computed
  Epilogue to = {};
};

static_assert(sizeof(Task) <= TASK_BYTES);

template <float (*F)(float)>
__device__ float4 each(float4 x) {
  return make_float4(F(x.x), F(x.y), F(x.z), F(x.w));
}

__device__ inline float gelu(float x) { return 0.5f * x * (1 + erff(x * 0.70710678f)); }
// 0.5 + 0.5 tanh(u) is sigmoid(2 u)
__device__ inline float gelu_tanh(float x) { return x / (1 + expf(-1.59576912f * (x + 0.044715f * x * x * x))); }
__device__ inline float relu(float x) { return x > 0 || x != x ? x : 0; }  // NaN stays
__device__ inline float silu(float x) { return x / (1 + expf(-x)); }

__device__ inline float4 activate(float4 x, int activation) {
  switch (activation) {
    case GELU: return each<gelu>(x);
    case GELU_TANH: return each<gelu_tanh>(x);
    case RELU: return each<relu>(x);
    default: return each<silu>(x);
  }
}

__device__ inline float4 add(float4 x, float4 y) { return make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w); }

// What the epilogue of four features of one row reads.
struct Given {
  uint2 bias, residual, gamma, beta;
};

__device__ inline Given load_given(const Epilogue& e, int feature, int row) {
  Given g{};
  const int which = (feature >= e.weight_features) + (feature >= 2 * e.weight_features);
  g.bias = *reinterpret_cast<const uint2*>(bytes(e.bias[which]) + (feature - which * e.weight_features) * 2);
  const Rows& r = e.residual;
  if (r.from) g.residual = load_8(bytes(r.from) + (int64_t(row) * r.columns + feature) * 2);
  if (r.gamma) {
    g.gamma = *reinterpret_cast<const uint2*>(bytes(r.gamma) + feature * 2);
    g.beta = *reinterpret_cast<const uint2*>(bytes(r.beta) + feature * 2);
  }
  return g;
}

// Four neighbouring lanes have the 16 features of a tile in one row; all lanes of the warp, live or not.
template <class E>
__device__ void finish(const Block& b, const Epilogue& e, const Given& given, float4 y, int feature, int row,
                       bool live) {
  y = add(y, unpack4<E>(given.bias));
  if (e.activation >= 0) y = activate(y, e.activation);
  if (e.residual.from) {
    float4 r = unpack4<E>(given.residual);
    if (e.residual.gamma && live) r = normalised4<E>(r, b.statistics[row], given.gamma, given.beta);
    y = add(y, r);
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

// Sums of a block's warps: 16 rows (two of the tensor cores' right operands) x up to ROUND tiles.
using Sums = float[ROUND][2][4];

// Adds one unit of COUNT tiles: this warp's 16 rows, its part of the `steps`. x: the unit's columns in the region;
// before: steps of the units before.
template <class E, int COUNT>
__device__ void multiply(const Block& b, const Ring& ring, const char* x, int before, int steps, Sums& sum) {
  const Plan& plan = b.p.plan;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int groups = 1 << (b.row_bits - 4), parts = WARPS / groups;  // powers of two
  const int row = warp % groups * 16, part = warp / groups;
  if (row >= b.rows) return;
  // Rows are the right operand, features the left: a few rows fill the narrow side of a tensor-core product.
  x += (row + lane / 16 * 8 + lane % 8) * x_row_bytes(plan) + lane / 8 % 2 * 16;
  const char* w = ring.memory + lane % 16 * stage_row_bytes(plan) + lane / 16 * 16;
  // Parts take turns through all units, so that none has the odd step of each: after 6 steps of 4 parts, part 2 is
  // next.
  for (int k = (part - before) & (parts - 1); k < steps; k += parts) {
    uint32_t rows[4], tile[COUNT][4];
    ldmatrix_x4(rows, x + k * STEP * 2);
#pragma unroll
    for (int t = 0; t < COUNT; ++t) ldmatrix_x4(tile[t], w + ring.stage(t) * stage_bytes(plan) + k * STEP * 2);
#pragma unroll
    for (int t = 0; t < COUNT; ++t) {
      E::mma(sum[t][0], tile[t], rows[0], rows[1]);
      E::mma(sum[t][1], tile[t], rows[2], rows[3]);
    }
  }
}

template <class E>
__device__ void multiply(const Block& b, const Ring& ring, int count, const char* x, int before, int steps, Sums& sum) {
  switch (count) {  // so that the loads of all tiles are in flight together
    case 1: return multiply<E, 1>(b, ring, x, before, steps, sum);
    case 2: return multiply<E, 2>(b, ring, x, before, steps, sum);
    case 3: return multiply<E, 3>(b, ring, x, before, steps, sum);
    case 4: return multiply<E, 4>(b, ring, x, before, steps, sum);
    case 5: return multiply<E, 5>(b, ring, x, before, steps, sum);
    case 6: return multiply<E, 6>(b, ring, x, before, steps, sum);
    case 7: return multiply<E, 7>(b, ring, x, before, steps, sum);
    default: return multiply<E, ROUND>(b, ring, x, before, steps, sum);
  }
}

// Sums of all warps of the block, (tile, row, SUM_STRIDE), to where the group reads them. Rows past the last hold
// anything, and are read by nobody.
__device__ inline void add_warps(const Block& b, int count, const Sums& sum) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, bits = b.row_bits;
  const int groups = 1 << (bits - 4), parts = WARPS / groups;
  float* sums = reinterpret_cast<float*>(b.region);
  const int row = warp % groups * 16 + lane % 4 * 2, part = warp / groups;
#pragma unroll
  for (int t = 0; t < ROUND; ++t) {
    if (t < count) {
      float* to = sums + (((part * count + t) << bits) + row) * SUM_STRIDE + lane / 4;
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
  __syncthreads();
  char* own = b.peers.own(b.region);
  for (int i = threadIdx.x; i < count << bits << 2; i += THREADS) {
    const int at = i / 4 * SUM_STRIDE + i % 4 * 4;
    float4 total = *reinterpret_cast<float4*>(sums + at);
    for (int part = 1; part < parts; ++part)
      total = add(total, *reinterpret_cast<float4*>(sums + (part * count << bits) * SUM_STRIDE + at));
    *reinterpret_cast<float4*>(own + at * 4) = total;  // in place within a cluster: this thread alone has read it
  }
}

// Adds the sums of the group's blocks and stores what the epilogue makes of them. `first`: the round's, in the hand.
template <class E>
__device__ void add_blocks(Block& b, const Task& t, int first, int count, const Sums& sum) {
  // Four lanes a pair; what does not depend on the sums is loaded before they are waited for.
  const int pairs = count << b.row_bits, column = threadIdx.x % 4 * 4;
  int pair = pair_of(threadIdx.x / 4, b.peers.rank), feature = 0, row = 0;
  bool live = false;
  Given given{};
  const auto prepare = [&] {
    row = pair & ((1 << b.row_bits) - 1);
    live = pair < pairs && row < b.rows;
    if (!live) return;
    feature = (t.tiles.begin + (first + (pair >> b.row_bits)) * b.p.plan.groups) * TILE + column;
    given = load_given(t.to, feature, row);
  };
  prepare();
  add_warps(b, count, sum);
  b.peers.sync();
  for (int before = 0; before < pairs; before += pair_of(THREADS / 4, 0)) {
    float4 y = make_float4(0, 0, 0, 0);
    if (live) {
#pragma unroll
      for (int other = 0; other < GROUP; ++other)
        y = add(y, b.peers.read(b.peers.of(other, b.region) + (pair * SUM_STRIDE + column) * 4));
    }
    finish<E>(b, t.to, given, y, feature, row, live);
    pair += pair_of(THREADS / 4, 0);
    prepare();
  }
}

// This block's share of a product, round by round: load rows, or attend; multiply; add; store.
template <class E, int D>
__device__ void run(Block& b, Ring& ring, const Task& t) {
  const Plan& plan = b.p.plan;
  bool merged = !t.x.gamma;
  const auto merge = [&] {
    if (merged) return;
    merge_statistics(b, t.x);
    __syncthreads();
    merged = true;
  };
  for (int first = 0; first < t.tiles.count; first += plan.round) {
    const int count = smaller(plan.round, t.tiles.count - first);
    if (t.product == OUT && t.part.count) {
      attend_all<E, D>(b, t.layer, t.part, b.p.probs && stores_probabilities(t.tiles, first));
      __syncthreads();
    }
    Sums sum = {};
    const char* x = b.region;
    for (int before = 0, resident = 0; before < t.part.count; before += plan.unit, resident -= plan.unit) {
      if (t.product != OUT && resident == 0) {
        if (before > 0) __syncthreads();  // until all warps have multiplied the rows that were there
        resident = plan.x_units * plan.unit;
        load_rows<E, 1>(b, t.x, (t.part.begin + before) * STEP, smaller(resident, t.part.count - before) * STEP, merge);
        __syncthreads();
        x = b.region;
      }
      ring.wait(count);
      multiply<E>(b, ring, count, x, before, smaller(plan.unit, t.part.count - before), sum);
      ring.release(count);
      x += plan.unit * STEP * 2;
    }
    __syncthreads();  // the region's rows are multiplied; sums take their place
    add_blocks<E>(b, t, first, count, sum);
    if (first + plan.round < t.tiles.count) b.peers.release();  // before the region, or the strip, is written again
  }
  merge();  // also where no rows were loaded: the residual of the next product is normalised with them
}

}  // namespace bert_fast
