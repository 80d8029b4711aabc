// What the kernels need of the chip: element types, tensor-core products, copies to shared memory, barriers.
//
// All inline assembly stands here, so that a kernel file is plain C++ and the tests can run it on a CPU with another
// body for each of these functions (tests/cuda_emulator.h). Everything works from sm_80 on; what newer chips do better
// is chosen by __CUDA_ARCH__ in this file alone. Names follow the PTX instructions.
#ifndef BERT_FAST_DEVICE_CUH
#define BERT_FAST_DEVICE_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

// Clusters with shared memory that their blocks can read: sm_90 and sm_100. Their driver support on sm_120 is not
// something this project has seen, so there, as on sm_80, blocks share through global memory.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200
#define BERT_FAST_CLUSTERS 1
#else
#define BERT_FAST_CLUSTERS 0
#endif

namespace bert_fast {

constexpr int WARP = 32;

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// The block's dynamic shared memory.
__device__ inline char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

// Element types: two numbers to and from one register, and one m16n8k16 product with fp32 sums.
// Fragments (lane = 4 * g + t): a[0..3] rows g, g+8, g, g+8, columns 2t, 2t, 2t+8, 2t+8; b[0..1] rows 2t, 2t+8, column
// g; c[0..1] row g, c[2..3] row g+8, columns 2t and 2t+1.
struct Bf16 {
  __device__ static uint32_t pack(float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
  __device__ static float2 unpack(uint32_t both) {
    return make_float2(__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u));
  }
  __device__ static void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

struct Fp16 {
  __device__ static uint32_t pack(float low, float high) {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
  __device__ static float2 unpack(uint32_t both) { return __half22float2(*reinterpret_cast<const __half2*>(&both)); }
  __device__ static void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

// Four 8x8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l / 8.
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}

__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}

__device__ inline float shfl_xor(float x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }

// What another block has written in this launch: from L2, since this SM's L1 may hold an older line.
__device__ inline uint4 load_16(const void* global) { return __ldcg(static_cast<const uint4*>(global)); }
__device__ inline uint2 load_8(const void* global) { return __ldcg(static_cast<const uint2*>(global)); }
__device__ inline float2 load_float2(const void* global) { return __ldcg(static_cast<const float2*>(global)); }

__device__ inline void prefetch_l2(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

// 16 bytes from global to shared memory behind the thread's back; `cp_async_arrive` counts the thread in at `barrier`
// once all its copies so far have landed.
__device__ inline void cp_async_16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global)
               : "memory");
}

__device__ inline void cp_async_arrive(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ inline void mbarrier_init(uint64_t* barrier, int threads) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(threads) : "memory");
}

// Waits for the end of the barrier's phase number `parity` modulo 2.
__device__ inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done = 0;
  do {
#if __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
#else
    asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
#endif
                 : "=r"(done)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
  } while (!done);
}

// A barrier of blocks in two halves: each arrives at `counter`, then waits until `target` arrivals have been counted.
// What any thread of an arrived block has written before is then visible to all threads of the waiting one:
// __syncthreads orders it before thread 0's release, and thread 0's acquire before what follows the other
// __syncthreads.
__device__ inline void arrive_at(unsigned* counter) {
  __syncthreads();
  if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

__device__ inline void wait_at(unsigned* counter, unsigned target) {
  if (threadIdx.x == 0) {
    unsigned seen;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    } while (seen < target);
  }
  __syncthreads();
}

// SIZE neighbouring blocks that read each other's memory: a cluster and its shared memory, or a strip of global memory.
template <int SIZE>
struct Group {
  int rank;      // of this block
  char* strips;  // global memory without clusters: `strip` bytes for each block of the group
  int64_t strip;
  unsigned* counter;  // global, zero at first; without clusters
  unsigned target;

  // Where this block puts what the others are to read: `shared` itself, or its strip.
  __device__ char* own(char* shared) const { return BERT_FAST_CLUSTERS ? shared : strips + rank * strip; }

  // The same place of the block `other`.
  __device__ const char* of(int other, const char* shared) const {
#if BERT_FAST_CLUSTERS
    uint64_t address;
    asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(shared), "r"(other));
    return reinterpret_cast<const char*>(address);
#else
    return strips + other * strip;
#endif
  }

  __device__ static float4 read(const char* p) {
#if BERT_FAST_CLUSTERS
    return *reinterpret_cast<const float4*>(p);
#else
    return __ldcg(reinterpret_cast<const float4*>(p));
#endif
  }

  // What the blocks have put at `own` is there for `of` and `read` after; nothing else is ordered. (A barrier with
  // .release has every warp wait for its global stores as well; compilers before 12.8 know no other.)
  __device__ void sync() {
#if BERT_FAST_CLUSTERS
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1208
    asm volatile("fence.release.sync_restrict::shared::cta.cluster;\nbarrier.cluster.arrive.relaxed.aligned;" ::
                     : "memory");
#else
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    target += SIZE;
    arrive_at(counter);
    wait_at(counter, target);
#endif
  }

  // Nobody reads what is at `own` any more.
  __device__ void release() {
#if BERT_FAST_CLUSTERS
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    sync();
#endif
  }
};

}  // namespace bert_fast

#endif
