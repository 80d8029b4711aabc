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
  int row_bits;        // 1 << row_bits: rows of all warps that share them, 16, 32 or 64
  unsigned arrivals;   // at the grid's counter that complete the barrier at hand
  float2* statistics;  // of the rows that were normalised last
  int* starts;         // of the sequences, as cu_seqlens
  int* keys;           // of the sequences
  int* positions;      // of the j-th place of each sequence: its rows, then its tokens that are no row (pack.py)
  char* region;

  __device__ explicit Block(const Params& params) : p(params) {
    const int rank = blockIdx.x % GROUP;
    group = blockIdx.x / GROUP;
    const int64_t strip = strip_bytes(p.shape);
    peers = {rank, p.strips + strip * GROUP * group, strip, p.counters + (group + 1) * COUNTER_STRIDE, 0};
    rows = p.cu_seqlens[p.shape.batch];
    row_bits = bert_fast::row_bits(rows);
    arrivals = 0;
    char* memory = shared_memory();
    statistics = reinterpret_cast<float2*>(memory + statistics_offset());
    starts = reinterpret_cast<int*>(memory + maps_offset());
    keys = starts + MAX_ROWS + 1;
    positions = keys + MAX_ROWS;
    region = memory + region_offset();
    load_maps();
  }

  // For all threads after the next __syncthreads.
  __device__ void load_maps() {
    const int i = threadIdx.x, batch = p.shape.batch, length = p.shape.length;
    if (i <= batch) starts[i] = p.cu_seqlens[i];
    if (i < batch) keys[i] = p.kv_len[i];
    if (i < batch * length) {
      const int sequence = i / length, place = i % length;
      const int start = p.cu_seqlens[sequence], end = p.cu_seqlens[sequence + 1];
      const int dropped = rows + sequence * length - start;  // where its tokens that are no row begin
      positions[i] = p.token[start + place < end ? start + place : dropped + start + place - end] - sequence * length;
    }
  }

  // The barrier of the grid. Between its halves lies what would otherwise come before or after it.
  __device__ void arrive() {
    arrivals += gridDim.x;
    arrive_at(p.counters);
  }
  __device__ void wait() const { wait_at(p.counters, arrivals); }
};

}  // namespace bert_fast
