// Attention of short sequences: all keys of a query at once, in registers.
#pragma once

#include "block.cuh"

namespace bert_fast {

// Query, key and value of sequence `at` and one head into the region, rows past `length` of the last 16 zeros.
template <int D>
__device__ void load_heads(Block& b, int start, int length, int head) {
  constexpr int PIECES = D / 8, STRIDE = D * 2 + PAD;
  const int padded = round_up(length, 16), hidden = b.p.shape.hidden;
  for (int i = threadIdx.x; i < 3 * padded * PIECES; i += THREADS) {
    const int piece = i % PIECES, row = i / PIECES % padded, which = i / PIECES / padded;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (row < length) {
      const int64_t at = (int64_t(start + row) * 3 + which) * hidden + head * D + piece * 8;
      v = load_16(bytes(b.p.qkv) + at * 2);
    }
    *reinterpret_cast<uint4*>(b.region + (which * padded + row) * STRIDE + piece * 16) = v;
  }
}

// Softmax of 16 queries' scores, rows lane / 4 and lane / 4 + 8, over keys 0 .. keys: p becomes the probabilities.
__device__ inline void softmax(float (&p)[MAX_ROWS / 8][4], int keys, float scale) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float highest = -INFINITY, total = 0;
#pragma unroll
    for (int i = 0; i < MAX_ROWS / 4; ++i) {
      float& x = p[i / 2][half * 2 + i % 2];
      x = i / 2 * 8 + column + i % 2 < keys ? x * scale : -INFINITY;
      highest = fmaxf(highest, x);
    }
    for (int i = 1; i < 4; i *= 2) highest = fmaxf(highest, shfl_xor(highest, i));
#pragma unroll
    for (int i = 0; i < MAX_ROWS / 4; ++i) {
      float& x = p[i / 2][half * 2 + i % 2];
      x = keys > 0 ? exp2f((x - highest) * 1.44269504f) : 0;
      total += x;
    }
    for (int i = 1; i < 4; i *= 2) total += shfl_xor(total, i);
    const float inverse = keys > 0 ? 1 / total : 0;
#pragma unroll
    for (int i = 0; i < MAX_ROWS / 4; ++i) p[i / 2][half * 2 + i % 2] *= inverse;
  }
}

// Attention of one head of one sequence; a warp has 16 queries and all keys.
template <class E, int D>
__device__ void attend(Block& b, int layer, int sequence, int head) {
  constexpr int STRIDE = D * 2 + PAD;
  const Params& p = b.p;
  const Shape& s = p.shape;
  const int start = p.cu_seqlens[sequence], length = p.cu_seqlens[sequence + 1] - start;
  if (length == 0 && !p.probs) return;
  const bool uniform = p.kv_len[sequence] == 0 && p.uniform_empty;
  const int keys = uniform ? length : p.kv_len[sequence], padded = round_up(length, 16);
  __syncthreads();  // the region is read no more
  load_heads<D>(b, start, length, head);
  if (p.probs && int(threadIdx.x) < s.length) {  // rows, then the tokens that are no row (pack.py)
    const int j = threadIdx.x, dropped = b.rows + sequence * s.length - start;
    const int token = p.token[j < length ? start + j : dropped + j - length];
    b.positions[j] = token - sequence * s.length;
  }
  __syncthreads();
  const int lane = threadIdx.x % WARP, first = threadIdx.x / WARP * 16;
  if (first >= (p.probs ? s.length : length)) return;
  float weights[MAX_ROWS / 8][4] = {};
  if (first < length) {
    const char* query = b.region + (first + lane % 16) * STRIDE + lane / 16 * 16;
    const char* key = b.region + (padded + lane / 16 * 8 + lane % 8) * STRIDE + lane / 8 % 2 * 16;
    const char* value = b.region + (2 * padded + lane % 16) * STRIDE + lane / 16 * 16;
#pragma unroll
    for (int k = 0; k < D / STEP; ++k) {
      uint32_t q[4];
      ldmatrix_x4(q, query + k * STEP * 2);
#pragma unroll
      for (int n = 0; n < MAX_ROWS / 16; ++n) {
        if (n * 16 < length) {
          uint32_t two[4];
          ldmatrix_x4(two, key + n * 16 * STRIDE + k * STEP * 2);
          E::mma(weights[2 * n], q, two[0], two[1]);
          E::mma(weights[2 * n + 1], q, two[2], two[3]);
        }
      }
    }
    softmax(weights, keys, uniform ? 0 : p.scale);
    float out[D / 8][4] = {};
#pragma unroll
    for (int n = 0; n < MAX_ROWS / 16; ++n) {
      if (n * 16 < length) {
        const float (&low)[4] = weights[2 * n], (&high)[4] = weights[2 * n + 1];
        const uint32_t left[4] = {E::pack(low[0], low[1]), E::pack(low[2], low[3]), E::pack(high[0], high[1]),
                                  E::pack(high[2], high[3])};
#pragma unroll
        for (int d = 0; d < D / 16; ++d) {
          uint32_t two[4];
          ldmatrix_x4_trans(two, value + n * 16 * STRIDE + d * 32);
          E::mma(out[2 * d], left, two[0], two[1]);
          E::mma(out[2 * d + 1], left, two[2], two[3]);
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + lane / 4 + half * 8;
      if (row >= length) continue;
      char* to = bytes(p.context) + (int64_t(start + row) * s.hidden + head * D + lane % 4 * 2) * 2;
#pragma unroll
      for (int d = 0; d < D / 8; ++d)
        *reinterpret_cast<uint32_t*>(to + d * 16) = E::pack(out[d][half * 2], out[d][half * 2 + 1]);
    }
  }
  if (!p.probs) return;
  const int64_t matrix = (int64_t(layer) * s.batch + sequence) * s.heads + head;
  uint16_t* to = static_cast<uint16_t*>(p.probs) + matrix * s.length * s.length;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first + lane / 4 + half * 8;
    if (row >= s.length) continue;
    uint16_t* at = to + b.positions[row] * s.length;
#pragma unroll
    for (int n = 0; n < MAX_ROWS / 8; ++n) {
      const int column = n * 8 + lane % 4 * 2;
      const bool is_row = row < length;
      const uint32_t two = E::pack(is_row ? weights[n][half * 2] : 0, is_row ? weights[n][half * 2 + 1] : 0);
      if (column < s.length) at[b.positions[column]] = uint16_t(two & 0xffff);
      if (column + 1 < s.length) at[b.positions[column + 1]] = uint16_t(two >> 16);
    }
  }
}

template <class E, int D>
__device__ void attend_all(Block& b, int layer) {
  const int heads = b.p.shape.heads;
  for (int i = blockIdx.x; i < b.p.shape.batch * heads; i += gridDim.x) attend<E, D>(b, layer, i / heads, i % heads);
}

}  // namespace bert_fast
