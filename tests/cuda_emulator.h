// A CUDA launch on the CPU: the functions of csrc/device.cuh with other bodies. Included first, in its place.
//
// Every load sees the last store: a missing fence or a stale line of L1 does not show. What does is in cuda_machine.h.
#ifndef BERT_FAST_DEVICE_CUH
#define BERT_FAST_DEVICE_CUH

#include "cuda_machine.h"

namespace bert_fast {

// Each has the place of the call as one more parameter.
#define BERT_FAST_CLUSTERS (::bert_fast::emulator::machine->clusters)

inline char* shared_memory() { return emulator::machine->memory(blockIdx.x); }

struct Bf16 : emulator::Element<Bf16> {
  static uint32_t round(float x) {
    const uint32_t bits = __float_as_uint(x);
    return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }
  static float number(uint32_t bits) { return __uint_as_float(bits << 16); }
};

struct Fp16 : emulator::Element<Fp16> {
  static uint32_t round(float x) {
    const uint32_t bits = __float_as_uint(x) & 0x7fffffff, sign = __float_as_uint(x) >> 16 & 0x8000;
    if (x != x) return 0x7fff;
    if (bits >= __float_as_uint(65520)) return sign | 0x7c00;
    if (bits < __float_as_uint(0x1p-14f))  // the addition rounds to a multiple of the smallest number, 2^-24
      return sign | (__float_as_uint(__uint_as_float(bits) + 0.5f) - __float_as_uint(0.5f));
    return sign | (bits - (112 << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
  }
  static float number(uint32_t bits) {
    const float x = __uint_as_float((bits & 0x7fff) << 13) * 0x1p112f;  // of the exponents' offsets 15 and 127
    return __uint_as_float(__float_as_uint(x) | (x >= 65536 ? 0x7f800000 : 0) | (bits & 0x8000) << 16);
  }
};

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared, BERT_FAST_CALL("ldmatrix_x4")) {
  emulator::ldmatrix<false>(call, r, shared);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared, BERT_FAST_CALL("ldmatrix_x4_trans")) {
  emulator::ldmatrix<true>(call, r, shared);
}

inline float shfl_xor(float x, int lanes, BERT_FAST_CALL("shfl_xor")) {
  std::pair<float, int> arguments{x, lanes};
  emulator::collective(call, emulator::exchange, &arguments);
  return arguments.first;
}

inline uint4 load_16(const void* p, BERT_FAST_CALL("load_16")) { return emulator::load<uint4>(call, p); }
inline uint2 load_8(const void* p, BERT_FAST_CALL("load_8")) { return emulator::load<uint2>(call, p); }
inline float2 load_float2(const void* p, BERT_FAST_CALL("load_float2")) { return emulator::load<float2>(call, p); }

inline void prefetch_l2(const void*) {}

// Lands at once or when the barrier's phase ends, as drawn: the one shows in a stage that is still being read, the
// other in one that is read too early.
inline void cp_async_16(void* shared, const void* global, BERT_FAST_CALL("cp_async_16")) {
  emulator::check_shared(call, shared, 16);
  emulator::check_aligned(call, global, 16);
  if (emulator::machine->random() % 2)
    memcpy(shared, global, 16);
  else
    emulator::current->copies.push_back({shared, global});
}

// A phase in which all threads have arrived ends as late as possible: when one waits, or arrives for the next phase.
inline void cp_async_arrive(uint64_t* barrier, BERT_FAST_CALL("cp_async_arrive")) {
  emulator::Barrier& b = emulator::find_barrier(call, barrier);
  if (b.arrived == b.threads) emulator::end_phase(b);
  std::vector<emulator::Copy>& copies = emulator::current->copies;
  b.copies.insert(b.copies.end(), copies.begin(), copies.end());
  copies.clear();
  if (++b.arrived == b.threads && !b.waiting.empty()) emulator::end_phase(b);
}

inline void mbarrier_init(uint64_t* barrier, int threads, BERT_FAST_CALL("mbarrier_init")) {
  emulator::check_shared(call, barrier, 8);
  *barrier = emulator::INITIALISED + emulator::machine->barriers.size();
  emulator::machine->barriers.push_back({barrier, static_cast<unsigned>(threads)});
}

inline void mbarrier_wait(uint64_t* barrier, uint32_t parity, BERT_FAST_CALL("mbarrier_wait")) {
  emulator::Barrier& b = emulator::find_barrier(call, barrier);
  if (b.phase % 2 != parity) return;
  if (b.arrived == b.threads) return emulator::end_phase(b);
  b.waiting.push_back(emulator::current);
  emulator::stop(call);
}

inline void arrive_at(unsigned* counter, BERT_FAST_CALL("arrive_at")) {
  emulator::collective(call, emulator::meet<false>);
  if (threadIdx.x > 0) return;
  ++*counter;
  std::vector<emulator::Spinning>& all = emulator::machine->spinning;
  const auto reached = [](const emulator::Spinning& s) { return *s.counter >= s.target; };
  for (const emulator::Spinning& s : all)
    if (reached(s)) emulator::wake(*s.thread);
  all.erase(std::remove_if(all.begin(), all.end(), reached), all.end());
}

inline void wait_at(unsigned* counter, unsigned target, BERT_FAST_CALL("wait_at")) {
  if (threadIdx.x == 0 && *counter < target) {
    emulator::machine->spinning.push_back({emulator::current, counter, target});
    emulator::stop({"the counter of wait_at", call.line});
  }
  emulator::collective(call, emulator::meet<false>);
}

template <int SIZE>
struct Group {
  int rank;
  char* strips;
  int64_t strip;
  unsigned* counter;
  unsigned target;

  char* own(char* shared) const { return BERT_FAST_CLUSTERS ? shared : strips + rank * strip; }

  const char* of(int other, const char* shared, BERT_FAST_CALL("Group::of")) const {
    if (!BERT_FAST_CLUSTERS) return strips + other * strip;
    emulator::check_shared(call, shared, 1);
    if (other < 0 || other >= SIZE) emulator::fail(call, "no such block in the group");
    return emulator::machine->memory(blockIdx.x / SIZE * SIZE + other) + (shared - shared_memory());
  }

  static float4 read(const char* p, BERT_FAST_CALL("Group::read")) {
    if (BERT_FAST_CLUSTERS) {
      const int64_t block = (p - emulator::machine->shared) / emulator::machine->stride;
      if (block / SIZE != blockIdx.x / SIZE) emulator::fail(call, "not the memory of a block in the group");
      emulator::check_shared(call, p, 16, block);
      if (!emulator::machine->running[block]) emulator::fail(call, "the block has ended, and its memory with it");
    }
    return emulator::load<float4>(call, p);
  }

  void sync(BERT_FAST_CALL("Group::sync")) {
    if (BERT_FAST_CLUSTERS) {
      if (SIZE != emulator::machine->group_size) emulator::fail(call, "another size than the launch's clusters");
      return emulator::collective(call, emulator::meet<true>);
    }
    target += SIZE;
    arrive_at(counter, call);
    wait_at(counter, target, call);
  }

  void release(BERT_FAST_CALL("Group::release")) { sync(call); }
};

}  // namespace bert_fast

inline void __syncthreads(BERT_FAST_CALL("__syncthreads")) {
  bert_fast::emulator::collective(call, bert_fast::emulator::meet<false>);
}
inline void __syncwarp(BERT_FAST_CALL("__syncwarp")) {
  bert_fast::emulator::collective(call, [](int, void* const*) { return true; });
}

#endif
