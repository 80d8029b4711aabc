// What the host passes to encoder_small (encoder_small.cuh is the kernel, encoder_small.cu the host's side).
#pragma once

#include <cstddef>
#include <cstdint>

#include "plan.h"

namespace bert_fast {

enum Weight { QUERY, KEY, VALUE, ATTENTION_OUT, UP_WEIGHT, DOWN_WEIGHT, WEIGHTS };
enum Vector { QUERY_BIAS, KEY_BIAS, VALUE_BIAS, OUT_BIAS, GAMMA1, BETA1, UP_BIAS, DOWN_BIAS, GAMMA2, BETA2, VECTORS };
enum Activation { GELU, GELU_TANH, RELU, SILU };

// Parameters of one layer where the modules keep them, all of the rows' dtype.
struct Layer {
  const void* weight[WEIGHTS];  // (features, inner)
  const void* vector[VECTORS];
  float eps1, eps2;  // of the LayerNorm after attention, and of the last one
};

struct Params {
  Layer layers[MAX_LAYERS];
  Shape shape;
  Plan plan;
  int activation;
  int uniform_empty;  // a sequence without keys has uniform weights, not a context of zeros
  float scale;        // of the scores
  // From pack: row -> token, first row of each sequence, keys of each sequence.
  const int *token, *cu_seqlens, *kv_len;
  const void* x;  // (rows, hidden), the embeddings
  // Outputs in token order, zeros where a token is no row. Null where not wanted.
  void* last;    // (B * S, hidden)
  void* hidden;  // (layers - 1, B * S, hidden)
  void* probs;   // (layers, B, heads, S, S)
  // Workspace. h: rows before a LayerNorm, of which every number is exchanged by the thread that adds to it;
  // statistics: (mean, squared deviations) of TILE columns of a row of h.
  void *qkv, *wide, *h;
  void* statistics;    // (rows, hidden / TILE) float2
  unsigned* counters;  // zeros: one for the grid, one for each group, COUNTER_STRIDE apart
  char* strips;        // sums that groups exchange on chips without clusters
};
constexpr int COUNTER_STRIDE = 32;  // a line of L2 each
static_assert(sizeof(Params) <= 4096, "a kernel's parameters are 4 KB at most");

// Sums of a block that the others of its group read.
HD int64_t strip_bytes(const Shape& s) { return int64_t(ROUND) * SUM_STRIDE * 4 << row_bits(s.batch * s.length); }

// Lays the workspace out in memory at `base` (may be null) and returns its size.
inline size_t lay_out(Params& p, char* base, bool clusters) {
  size_t used = 0;
  const auto take = [&](size_t bytes) {
    char* at = base ? base + used : nullptr;
    used += (bytes + 255) / 256 * 256;
    return at;
  };
  const Shape& s = p.shape;
  const size_t rows = size_t(s.batch) * s.length, row = rows * s.hidden * 2;
  p.counters = reinterpret_cast<unsigned*>(take(size_t(p.plan.groups + 1) * COUNTER_STRIDE * 4));
  p.qkv = take(3 * row);
  p.h = take(row);
  p.wide = take(rows * s.intermediate * 2);
  p.statistics = take(rows * (s.hidden / TILE) * 8);
  p.strips = take(clusters ? 0 : size_t(p.plan.blocks) * strip_bytes(s));
  return used;
}

}  // namespace bert_fast
