// Rows of 16-bit numbers and the LayerNorm that is applied to them on the way.
#pragma once

#include "block.cuh"

namespace bert_fast {

// Four numbers of a row.
template <class E>
__device__ float4 unpack4(uint2 packed) {
  const float2 low = E::unpack(packed.x), high = E::unpack(packed.y);
  return make_float4(low.x, low.y, high.x, high.y);
}

template <class E>
__device__ void store4(void* to, float4 x) {
  *static_cast<uint2*>(to) = make_uint2(E::pack(x.x, x.y), E::pack(x.z, x.w));
}

__device__ inline float normalised(float x, float2 statistics, float gamma, float beta) {
  return (x - statistics.x) * statistics.y * gamma + beta;
}

template <class E>
__device__ float4 normalised4(float4 x, float2 statistics, uint2 gamma, uint2 beta) {
  const float4 g = unpack4<E>(gamma), b = unpack4<E>(beta);
  return make_float4(normalised(x.x, statistics, g.x, b.x), normalised(x.y, statistics, g.y, b.y),
                     normalised(x.z, statistics, g.z, b.z), normalised(x.w, statistics, g.w, b.w));
}

struct Rows {
  const void* from;  // (rows, columns), 16-bit
  int columns;
  // Of the LayerNorm on the way; null: there is none. statistics: of the tiles of `from`.
  const void *gamma = nullptr, *beta = nullptr;
  const void* statistics = nullptr;
  float eps = 0;
};

// Mean and 1 / deviation of every row from those of its tiles, 8 lanes a row; all threads, then a __syncthreads.
__device__ inline void merge_statistics(Block& b, const Rows& x) {
  constexpr int LANES = 8, MOST = MAX_HIDDEN / TILE / LANES;
  const int tiles = x.columns / TILE, lane = threadIdx.x % LANES;
  const float share = 1.0f / tiles;
  for (int first = 0; first < b.rows; first += THREADS / LANES) {
    const int row = first + threadIdx.x / LANES;
    float2 part[MOST];
    float sum = 0;
#pragma unroll
    for (int i = 0; i < MOST; ++i) {
      const int tile = lane + i * LANES;
      part[i] = make_float2(0, 0);
      if (row < b.rows && tile < tiles) part[i] = load_float2(bytes(x.statistics) + (int64_t(row) * tiles + tile) * 8);
      sum += part[i].x;
    }
    for (int i = 1; i < LANES; i *= 2) sum += shfl_xor(sum, i);
    const float mean = sum * share;
    float squares = 0;  // of deviations: within the tiles, and of the tiles' means
#pragma unroll
    for (int i = 0; i < MOST; ++i) {
      const float apart = part[i].x - mean;
      if (lane + i * LANES < tiles) squares += part[i].y + TILE * apart * apart;
    }
    for (int i = 1; i < LANES; i *= 2) squares += shfl_xor(squares, i);
    if (lane == 0 && row < b.rows) b.statistics[row] = make_float2(mean, rsqrtf(squares * share / TILE + x.eps));
  }
}

template <class E>
__device__ uint4 normalised8(uint4 x, float2 statistics, uint4 gamma, uint4 beta) {
  const float4 low = normalised4<E>(unpack4<E>(make_uint2(x.x, x.y)), statistics, make_uint2(gamma.x, gamma.y),
                                    make_uint2(beta.x, beta.y));
  const float4 high = normalised4<E>(unpack4<E>(make_uint2(x.z, x.w)), statistics, make_uint2(gamma.z, gamma.w),
                                     make_uint2(beta.z, beta.w));
  return make_uint4(E::pack(low.x, low.y), E::pack(low.z, low.w), E::pack(high.x, high.y), E::pack(high.z, high.w));
}

// Columns begin .. begin + count of all rows into the region; all threads, then a __syncthreads. PARTS: matrices side
// by side in x, whose columns go side by side too. meanwhile() runs once, in all threads, behind the first loads: the
// statistics that normalising waits for come from L2 as the rows do.
template <class E, int PARTS, class Meanwhile>
__device__ void load_rows(Block& b, const Rows& x, int begin, int count, const Meanwhile& meanwhile) {
  constexpr int BATCH = 10;  // loads in flight a thread, 16 bytes each: query, key and value of 32 rows of BERT-base
  // A thread keeps its 8 columns and goes through the rows; a few threads have none where a row is no divisor of all.
  const int pieces = count / 8, together = THREADS / pieces, rows = b.rows * PARTS;
  const int first = threadIdx.x / pieces, piece = threadIdx.x - first * pieces;
  const char* from = bytes(x.from) + (begin + piece * 8) * 2;
  uint4 gamma = {}, beta = {};
  if (x.gamma) {
    gamma = *reinterpret_cast<const uint4*>(bytes(x.gamma) + (begin + piece * 8) * 2);
    beta = *reinterpret_cast<const uint4*>(bytes(x.beta) + (begin + piece * 8) * 2);
  }
  int row = first < together ? first : rows;
  bool once = true;
  do {
    uint4 loaded[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; ++i)
      if (row + i * together < rows) loaded[i] = load_16(from + int64_t(row + i * together) * x.columns * 2);
    if (once) meanwhile();
    once = false;
#pragma unroll
    for (int i = 0; i < BATCH; ++i, row += together) {
      if (row >= rows) continue;
      const uint4 v = x.gamma ? normalised8<E>(loaded[i], b.statistics[row], gamma, beta) : loaded[i];
      *reinterpret_cast<uint4*>(b.region + row / PARTS * x_row_bytes(b.p.plan) + (row % PARTS * pieces + piece) * 16) =
          v;
    }
  } while (row < rows);
}

// LayerNorm(x) in token order, zeros where a token is no row; statistics are merged already.
template <class E>
__device__ void store_normalised(Block& b, void* to, const Rows& x) {
  const int hidden = x.columns;
  for (int row = blockIdx.x; row < b.p.shape.batch * b.p.shape.length; row += gridDim.x) {
    char* out = bytes(to) + int64_t(b.p.token[row]) * hidden * 2;
    for (int i = threadIdx.x; i < hidden / 4; i += THREADS) {
      float4 y = make_float4(0, 0, 0, 0);
      if (row < b.rows) {
        const uint2 g = static_cast<const uint2*>(x.gamma)[i], d = static_cast<const uint2*>(x.beta)[i];
        const uint2 h = load_8(bytes(x.from) + (int64_t(row) * hidden + i * 4) * 2);
        y = normalised4<E>(unpack4<E>(h), b.statistics[row], g, d);
      }
      store4<E>(out + i * 8, y);
    }
  }
}

}  // namespace bert_fast
