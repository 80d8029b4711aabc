// One block of encoder_small: its place in the launch, and its shared memory.
#pragma once

#include "device.cuh"
#include "encoder_small.h"

namespace bert_fast {

__device__ inline const char* bytes(const void* p) { return static_cast<const char*>(p); }
__device__ inline char* bytes(void* p) { return static_cast<char*>(p); }

struct Block {
  const Params& p;
  Group<GROUP> peers;
  int group;
  int rows;            // of all sequences; the host knows only that they are batch * length at most
  unsigned passed;     // grid barriers, in blocks
  float2* statistics;  // of the rows that were normalised last
  int* positions;
  char* region;

  __device__ explicit Block(const Params& params) : p(params) {
    const int rank = blockIdx.x % GROUP;
    group = blockIdx.x / GROUP;
    const int64_t strip = strip_bytes(p.shape);
    peers = {rank, p.strips + strip * GROUP * group, strip, p.counters + (group + 1) * COUNTER_STRIDE, 0};
    rows = p.cu_seqlens[p.shape.batch];
    passed = 0;
    char* memory = shared_memory();
    statistics = reinterpret_cast<float2*>(memory + statistics_offset());
    positions = reinterpret_cast<int*>(memory + positions_offset());
    region = memory + region_offset();
  }

  __device__ void grid_sync() {
    passed += gridDim.x;
    counted_barrier(p.counters, passed);
  }
};

}  // namespace bert_fast
