// Attention of short sequences, all keys of a query at once in registers, of the heads of one slice.
#pragma once

#include "rows.cuh"

namespace bert_fast {

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

// One warp: 16 queries of one head of one sequence. Query, key and value of the slice's heads are side by side in the
// region's rows, `width` bytes each; the context takes the place of the query. probs: (S, S) of the head, or null.
template <class E, int D>
__device__ void attend(Block& b, int sequence, int head, int first, int width, uint16_t* probs) {
  const int start = b.starts[sequence], length = b.starts[sequence + 1] - start, most = b.p.shape.length;
  const bool uniform = b.keys[sequence] == 0 && b.p.uniform_empty;
  const int keys = uniform ? length : b.keys[sequence];
  const int lane = threadIdx.x % WARP, stride = x_row_bytes(b.p.plan);
  float weights[MAX_ROWS / 8][4] = {};
  if (first < length) {
    char* heads = b.region + head * D * 2;
    // Rows past the sequence's last one are that one again: another sequence's may be anything, even NaN.
    const auto row = [&](int i) { return heads + (start + smaller(i, length - 1)) * stride; };
    const char* query = row(first + lane % 16) + lane / 16 * 16;
#pragma unroll
    for (int n = 0; n < MAX_ROWS / 16; ++n) {
      if (n * 16 < length) {
        const char* key = row(n * 16 + lane / 16 * 8 + lane % 8) + width + lane / 8 % 2 * 16;
#pragma unroll
        for (int k = 0; k < D / STEP; ++k) {
          uint32_t q[4], two[4];
          ldmatrix_x4(q, query + k * STEP * 2);
          ldmatrix_x4(two, key + k * STEP * 2);
          E::mma(weights[2 * n], q, two[0], two[1]);
          E::mma(weights[2 * n + 1], q, two[2], two[3]);
        }
      }
    }
    softmax(weights, keys, uniform ? 0 : b.p.scale);
    constexpr int COLUMNS = D < 64 ? D : 64;  // of the context at once: as many as registers hold
#pragma unroll 1
    for (int column = 0; column < D; column += COLUMNS) {
      float out[COLUMNS / 8][4] = {};
#pragma unroll
      for (int n = 0; n < MAX_ROWS / 16; ++n) {
        if (n * 16 < length) {
          const float (&low)[4] = weights[2 * n], (&high)[4] = weights[2 * n + 1];
          const uint32_t left[4] = {E::pack(low[0], low[1]), E::pack(low[2], low[3]), E::pack(high[0], high[1]),
                                    E::pack(high[2], high[3])};
          const char* value = row(n * 16 + lane % 16) + 2 * width + column * 2 + lane / 16 * 16;
#pragma unroll
          for (int d = 0; d < COLUMNS / 16; ++d) {
            uint32_t two[4];
            ldmatrix_x4_trans(two, value + d * 32);
            E::mma(out[2 * d], left, two[0], two[1]);
            E::mma(out[2 * d + 1], left, two[2], two[3]);
          }
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = first + lane / 4 + half * 8;
        if (i >= length) continue;
        char* to = row(i) + column * 2 + lane % 4 * 4;
#pragma unroll
        for (int d = 0; d < COLUMNS / 8; ++d)
          *reinterpret_cast<uint32_t*>(to + d * 16) = E::pack(out[d][half * 2], out[d][half * 2 + 1]);
      }
    }
  }
  if (!probs) return;
  const int* positions = b.positions + sequence * most;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = first + lane / 4 + half * 8;
    if (i >= most) continue;
    uint16_t* at = probs + positions[i] * most;
#pragma unroll
    for (int n = 0; n < MAX_ROWS / 8; ++n) {
      const int j = n * 8 + lane % 4 * 2;
      const bool is_row = i < length;
      const uint32_t two = E::pack(is_row ? weights[n][half * 2] : 0, is_row ? weights[n][half * 2 + 1] : 0);
      if (j < most) at[positions[j]] = uint16_t(two & 0xffff);
      if (j + 1 < most) at[positions[j + 1]] = uint16_t(two >> 16);
    }
  }
}

// The context of the slice's heads, all rows, into the region, as load_rows would bring it; all threads, then a
// __syncthreads. Every group computes the context that it multiplies, in place of one more barrier of the grid.
// store: this group's blocks store the probabilities of their heads.
template <class E, int D>
__device__ void attend_all(Block& b, int layer, Slice part, bool store) {
  const Shape& s = b.p.shape;
  const int heads = part.count * STEP / D, before = part.begin * STEP / D, width = part.count * STEP * 2;
  load_rows<E, 3>(b, Rows{b.p.qkv, s.hidden}, part.begin * STEP, part.count * STEP, [] {});
  __syncthreads();
  int turn = threadIdx.x / WARP;
  for (int sequence = 0; sequence < s.batch; ++sequence) {
    const int queries = store ? s.length : b.starts[sequence + 1] - b.starts[sequence];
    for (int first = 0; first < queries; first += 16) {
      for (int head = 0; head < heads; ++head) {
        if (turn++ % WARPS) continue;
        const int64_t matrix = (int64_t(layer) * s.batch + sequence) * s.heads + before + head;
        uint16_t* probs = store ? static_cast<uint16_t*>(b.p.probs) + matrix * s.length * s.length : nullptr;
        attend<E, D>(b, sequence, head, first, width, probs);
      }
    }
  }
}

}  // namespace bert_fast
