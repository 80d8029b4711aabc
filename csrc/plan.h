// Who computes what in encoder_small: pure functions of a model's shape and of the number of blocks.
//
// Words, and BERT-base's numbers on 128 blocks:
//   product  x (rows, inner) times a weight (features, inner); four a layer: QKV, OUT, UP, DOWN
//   tile     16 features of a weight                                                                 144, 48, 192, 48
//   group    four blocks that share tiles, a cluster where the chip has clusters                                   32
//   hand     a group's tiles of one product. Tiles are dealt like cards, each product going on where the one before
//            stopped, so that in the long run no group streams more weights than another                   at most 6
//   round    tiles that a block multiplies at once, their sums in registers: the largest hand, if memory allows     6
//   step     16 columns of the inner dimension, those of one tensor-core product                    48, in DOWN 192
//   slice    the steps of one block of a group                                                        12, in DOWN 48
//   unit     steps of a tile in one stage of the ring of weights: a slice, in DOWN a part of it                    12
//   part     steps of a unit that one warp multiplies, where rows do not occupy all warps
//   pair     (tile of a round, row): the four blocks' sums for it are added and stored by one of them
#pragma once

#ifndef __CUDACC__
#define __host__
#define __device__
#endif
#define HD __host__ __device__ inline

namespace bert_fast {

constexpr int GROUP = 4;      // blocks that share tiles, a cluster where the chip has clusters
constexpr int THREADS = 256;  // of a block
constexpr int WARPS = THREADS / 32;
constexpr int TILE = 16;  // features of a tile: rows of the tensor cores' left operand
constexpr int STEP = 16;  // inner dimension of one tensor-core product
constexpr int ROUND = 8;  // tiles whose sums a block can hold in registers at once
constexpr int MAX_ROWS = 64;
constexpr int MAX_HIDDEN = 1024;
constexpr int MAX_LAYERS = 24;  // pointers of all weights travel as a kernel parameter, 4 KB at most
constexpr int MAX_STAGES = 64;
constexpr int PAD = 16;         // bytes after each row of 16-bit numbers in shared memory, against bank conflicts
constexpr int SUM_STRIDE = 20;  // floats between rows of partial sums, TILE of them used

enum Product { QKV, OUT, UP, DOWN, PRODUCTS };

struct Shape {
  int layers, hidden, intermediate, heads, head_dim, batch, length;  // capacities: batch * length rows at most
};

struct Slice {
  int begin, count;
};

HD int ceil_div(int a, int b) { return (a + b - 1) / b; }
HD int round_up(int a, int b) { return ceil_div(a, b) * b; }
HD int smaller(int a, int b) { return a < b ? a : b; }
HD int larger(int a, int b) { return a > b ? a : b; }

HD int features(const Shape& s, int product) {
  return product == QKV ? 3 * s.hidden : product == UP ? s.intermediate : s.hidden;
}
HD int steps(const Shape& s, int product) { return (product == DOWN ? s.intermediate : s.hidden) / STEP; }
HD int tiles(const Shape& s, int product) { return features(s, product) / TILE; }

// The steps of the inner dimension that the block of a rank multiplies. The hidden dimension is cut between heads,
// since a block computes the context that it multiplies.
HD Slice slice(const Shape& s, int product, int rank) {
  const int of = product == DOWN ? steps(s, DOWN) : s.heads, each = product == DOWN ? 1 : s.head_dim / STEP;
  const int begin = of * rank / GROUP;
  return {begin * each, (of * (rank + 1) / GROUP - begin) * each};
}

// The hand of one group: tiles first, first + groups, ..., `count` of them.
HD Slice hand(const Shape& s, int groups, int layer, int product, int group) {
  int dealt = 0;  // before this product
  for (int i = 0; i < PRODUCTS; ++i) dealt += tiles(s, i) * (i < product ? layer + 1 : layer);
  const int first = (group + groups - dealt % groups) % groups;
  const int all = tiles(s, product);
  return {first, first < all ? ceil_div(all - first, groups) : 0};
}

// Pairs number pair_of(0, rank), pair_of(1, rank), ... are those of the block of a rank.
HD int pair_of(int place, int rank) { return place * GROUP + rank; }

// Every group computes all probabilities; the one with OUT's first tile, in the round in which it multiplies that,
// stores them, each block those of its slice.
HD bool stores_probabilities(const Slice& hand, int first) { return hand.begin + first == 0; }

struct Plan {
  int blocks, groups;
  int round;         // tiles that a block multiplies at once
  int unit;          // steps of a stage: a stage of the ring holds TILE features x unit steps of a weight
  int stages;        // of the ring
  int x_units;       // units of activations in shared memory at once
  int region_bytes;  // activations, then partial sums over them
  int shared_bytes;
};

HD int units(const Plan& p, int steps) { return ceil_div(steps, p.unit); }
HD int stage_row_bytes(const Plan& p) { return p.unit * STEP * 2 + PAD; }
HD int stage_bytes(const Plan& p) { return TILE * stage_row_bytes(p); }
// Query, key and value of a slice lie side by side in a row.
HD int x_row_bytes(const Plan& p) { return larger(p.x_units, 3) * p.unit * STEP * 2 + PAD; }

// Rows are divided into 16 for a warp, rounded up to 16, 32 or 64; the warps that are left over divide the steps.
HD int row_bits(int rows) { return rows <= 16 ? 4 : rows <= 32 ? 5 : 6; }
HD int sums_bytes(int tiles) { return WARPS * 16 * tiles * SUM_STRIDE * 4; }

// Shared memory: barriers of the ring, the task at hand, statistics of the rows, maps of pack, region, ring.
constexpr int TASK_BYTES = 256;  // at most
HD int task_offset() { return MAX_STAGES * 8; }
HD int statistics_offset() { return task_offset() + TASK_BYTES; }
HD int maps_offset() { return statistics_offset() + MAX_ROWS * 8; }
HD int region_offset() { return round_up(maps_offset() + (3 * MAX_ROWS + 1) * 4, 128); }
HD int ring_offset(const Plan& p) { return region_offset() + p.region_bytes; }

// nullptr and a plan, or why there is none. blocks: resident at once; shared_limit: bytes of shared memory of a block.
//
// A whole hand at once, and all activations of a phase, if the ring then has room for twice what is multiplied at once
// and so runs ahead of the barriers; else first fewer activations, for as long a ring as can be had.
HD const char* make_plan(const Shape& s, int blocks, int shared_limit, Plan& best) {
  Plan p{blocks / GROUP * GROUP, blocks / GROUP, 0, 0, 0, 0, 0, 0};
  if (p.groups < 1) return "fewer blocks fit the device than one group has";
  p.unit = ceil_div(s.heads, GROUP) * (s.head_dim / STEP);
  const int rows = round_up(s.batch * s.length, 16);
  int most = 1;
  for (int i = 0; i < PRODUCTS; ++i) most = larger(most, smaller(ROUND, ceil_div(tiles(s, i), p.groups)));
  for (p.round = most; p.round > 0; --p.round) {
    best = p;
    for (p.x_units = units(p, ceil_div(steps(s, DOWN), GROUP)); p.x_units > 0; --p.x_units) {
      p.region_bytes = round_up(larger(rows * x_row_bytes(p), sums_bytes(p.round)), 128);
      p.stages = smaller((shared_limit - ring_offset(p)) / stage_bytes(p), MAX_STAGES);
      p.shared_bytes = ring_offset(p) + p.stages * stage_bytes(p);
      if (p.stages > best.stages) best = p;
      if (best.stages >= 2 * p.round) return nullptr;
    }
    if (best.stages > p.round) return nullptr;
    p.stages = 0;
  }
  return "a block's shared memory is too small";
}

}  // namespace bert_fast
