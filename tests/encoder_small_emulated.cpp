// csrc/encoder_small.cuh on the CPU, and its plan as tables, for tests/test_encoder_small.py (by ctypes).
#include "cuda_emulator.h"  // in device.cuh's place, so before the kernel

#include "../csrc/encoder_small.cuh"

using namespace bert_fast;

namespace {

struct Numbers {
  int64_t layers, hidden, intermediate, heads, batch, length, activation, uniform_empty, half, blocks, shared_limit,
      clusters, seed;
};

Shape shape_of(const Numbers& n) {
  return {int(n.layers),           int(n.hidden), int(n.intermediate), int(n.heads),
          int(n.hidden / n.heads), int(n.batch),  int(n.length)};
}

template <class E>
void kernel(const Params& p) {
  if (p.shape.head_dim == 32) return encoder_small_kernel<E, 32>(p);
  if (p.shape.head_dim == 64) return encoder_small_kernel<E, 64>(p);
  encoder_small_kernel<E, 128>(p);
}

}  // namespace

// Runs the kernel. pointers: x, token, cu_seqlens, kv_len, last, hidden, probs, then 16 for each layer. Returns what
// went wrong, or an empty text.
extern "C" const char* run(const Numbers* n, double scale, const double* eps, void* const* pointers) {
  static std::string problem;
  Params p = {};
  p.shape = shape_of(*n);
  const char* no_plan = make_plan(p.shape, n->blocks, n->shared_limit, p.plan);
  if (no_plan) return no_plan;
  p.x = pointers[0];
  p.token = static_cast<const int*>(pointers[1]);
  p.cu_seqlens = static_cast<const int*>(pointers[2]);
  p.kv_len = static_cast<const int*>(pointers[3]);
  p.last = pointers[4];
  p.hidden = pointers[5];
  p.probs = pointers[6];
  p.activation = n->activation;
  p.uniform_empty = n->uniform_empty;
  p.scale = scale;
  pointers += 7;
  for (int i = 0; i < n->layers; ++i, pointers += WEIGHTS + VECTORS) {
    std::copy(pointers, pointers + WEIGHTS, p.layers[i].weight);
    std::copy(pointers + WEIGHTS, pointers + WEIGHTS + VECTORS, p.layers[i].vector);
    p.layers[i].eps1 = eps[2 * i];
    p.layers[i].eps2 = eps[2 * i + 1];
  }
  const size_t size = lay_out(p, nullptr, n->clusters), guard = 256;
  std::vector<uint4> memory(size / 16 + guard / 16, make_uint4(~0u, ~0u, ~0u, ~0u));  // NaN, as fresh memory may be
  char* base = reinterpret_cast<char*>(memory.data());
  lay_out(p, base, n->clusters);
  memset(p.counters, 0, size_t(p.plan.groups + 1) * COUNTER_STRIDE * 4);
  problem = emulate(p.plan.blocks, THREADS, GROUP, p.plan.shared_bytes, n->seed, n->clusters,
                    [&] { n->half ? kernel<Fp16>(p) : kernel<Bf16>(p); });
  for (size_t i = size; i < size + guard && problem.empty(); ++i)
    if (base[i] != char(0xff)) problem = "written past the workspace";
  return problem.c_str();
}

// The plan: blocks, groups, round, unit, stages, x_units, region_bytes, shared_bytes. Returns why there is none, or an
// empty text.
extern "C" const char* plan(const Numbers* n, int* out) {
  Plan p;
  const char* why = make_plan(shape_of(*n), n->blocks, n->shared_limit, p);
  if (!why) memcpy(out, &p, sizeof(p));
  return why ? why : "";
}

// Every stage of every block's ring in order: block, layer, product, tile, first step, steps. Returns how many.
extern "C" int64_t stages(const Numbers* n, int (*out)[6], int64_t room) {
  Params p = {};
  p.shape = shape_of(*n);
  make_plan(p.shape, n->blocks, n->shared_limit, p.plan);
  int64_t count = 0;
  for (int block = 0; block < p.plan.blocks; ++block) {
    for (WeightOrder o(p, block / GROUP, block % GROUP); !o.ended() && count < room; o.next()) {
      const int done = o.unit * p.plan.unit;
      const int row[6] = {block,
                          o.layer,
                          o.product,
                          o.tiles.begin + (o.first + o.tile) * p.plan.groups,
                          o.steps.begin + done,
                          smaller(p.plan.unit, o.steps.count - done)};
      memcpy(out[count++], row, sizeof(row));
    }
  }
  return count;
}

// Every store of a product, as add_blocks goes through them: block, layer, product, tile, row. Returns how many.
extern "C" int64_t stores(const Numbers* n, int rows, int (*out)[5], int64_t room) {
  const Shape s = shape_of(*n);
  Plan p;
  make_plan(s, n->blocks, n->shared_limit, p);
  int64_t count = 0;
  for (int block = 0; block < p.blocks; ++block)
    for (int layer = 0; layer < s.layers; ++layer)
      for (int product = 0; product < PRODUCTS; ++product) {
        const Slice tiles = hand(s, p.groups, layer, product, block / GROUP);
        for (int first = 0; first < tiles.count; first += p.round) {
          const int bits = row_bits(rows), pairs = smaller(p.round, tiles.count - first) << bits;
          for (int i = 0; pair_of(i, block % GROUP) < pairs && count < room; ++i) {
            const int pair = pair_of(i, block % GROUP), at = pair & ((1 << bits) - 1);
            const int row[5] = {block, layer, product, tiles.begin + (first + (pair >> bits)) * p.groups, at};
            if (at < rows) memcpy(out[count++], row, sizeof(row));
          }
        }
      }
  return count;
}

// Every head whose probabilities a block stores: block, layer, head. Returns how many.
extern "C" int64_t probabilities(const Numbers* n, int (*out)[3], int64_t room) {
  const Shape s = shape_of(*n);
  Plan p;
  make_plan(s, n->blocks, n->shared_limit, p);
  int64_t count = 0;
  for (int block = 0; block < p.blocks; ++block)
    for (int layer = 0; layer < s.layers; ++layer) {
      const Slice tiles = hand(s, p.groups, layer, OUT, block / GROUP), part = slice(s, OUT, block % GROUP);
      for (int first = 0; first < tiles.count; first += p.round) {
        const int heads = part.count * STEP / s.head_dim, before = part.begin * STEP / s.head_dim;
        for (int head = 0; stores_probabilities(tiles, first) && head < heads && count < room; ++head) {
          const int row[3] = {block, layer, before + head};
          memcpy(out[count++], row, sizeof(row));
        }
      }
    }
  return count;
}
