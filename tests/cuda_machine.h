// Blocks, warps and threads of a launch on the CPU: fibers, in what order they run, where they meet, and what is said
// of those that never do.
//
// The lanes of a warp run one after another up to their next collective, and which warp goes on is drawn from the seed:
// a missing barrier is a wrong result for some seeds.
#pragma once

#include "cuda_words.h"

namespace bert_fast {

constexpr int WARP = 32;

namespace emulator {

constexpr int64_t STACK = 64 << 10, PAGE = 4096;
constexpr uint64_t INITIALISED = 0xba221e4ull << 32;  // upper half of an mbarrier's word; its number is the lower half

// A place in the kernel: the line tells two calls of one function apart.
struct Call {
  const char* name = "";
  int line = 0;
  bool operator!=(const Call& other) const { return name != other.name || line != other.line; }
  std::string text() const { return std::string(name) + " (line " + std::to_string(line) + ")"; }
};
#define BERT_FAST_CALL(name) ::bert_fast::emulator::Call call = {name, __builtin_LINE()}  // as parameter: the caller's

struct Copy {
  void* to;
  const void* from;
};

struct Thread {
  enum State { READY, STOPPED, ENDED } state = READY;
  bool started = false;
  int index = 0, block = 0;  // index: in the grid
  Call call;                 // what it is stopped at
  std::vector<Copy> copies;  // not counted in at any barrier yet
  jmp_buf registers;
};

// Carries a collective out with the arguments of all lanes; false if they are to stay stopped.
using Operation = bool (*)(int warp, void* const* arguments);

struct Warp {
  int ready = WARP, arrived = 0;  // lanes that can go on; lanes that have come to the collective `call`
  Call call;
  Operation operation = nullptr;
  void* arguments[WARP];
};

// A barrier of whole warps.
struct Meeting {
  int arrived = 0;
  Call call;
};

struct Barrier {
  const void* address;
  unsigned threads, arrived = 0, phase = 0;
  std::vector<Copy> copies{};  // of this phase, still to be made
  std::vector<Thread*> waiting{};
};

struct Spinning {
  Thread* thread;
  const unsigned* counter;
  unsigned target;
};

struct Launch {
  int blocks, threads, group_size;
  int64_t shared_bytes;
  bool clusters;
  const std::function<void()>& function;
};

struct Machine : Launch {
  std::mt19937 random;
  std::vector<Thread> all;
  std::vector<Warp> warps;
  std::vector<Meeting> meetings[2];  // of blocks, of groups
  std::vector<int> running;          // threads of each block that have not ended
  std::deque<Barrier> barriers;
  std::vector<Spinning> spinning;
  Thread scheduler;
  unsigned first = 0, start = 0, step = 0, turn = 0;  // the round of one warp: its first thread, and the lanes' order
  int64_t stride;                                     // from one block's shared memory to the next one's
  char *shared, *stacks;
  std::string error;

  Machine(const Launch& launch, unsigned seed) : Launch(launch), random(seed), all(blocks * threads) {
    warps.resize(all.size() / WARP);
    for (auto& each : meetings) each.resize(blocks);
    running.assign(blocks, threads);
    scheduler.started = true;
    stride = (shared_bytes / PAGE + 2) * PAGE;  // a page or more between two blocks, to see who writes there
    shared = map(blocks * stride);
    stacks = map(all.size() * STACK);
    memset(shared, 0xff, blocks * stride);  // NaN in all types
    for (size_t i = 0; i < all.size(); ++i) {
      all[i].index = i, all[i].block = i / threads;
      mprotect(stacks + i * STACK, PAGE, PROT_NONE);  // a stack overflow crashes
    }
  }
  ~Machine() {
    munmap(shared, blocks * stride);
    munmap(stacks, all.size() * STACK);
  }

  static char* map(size_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) abort();
    return static_cast<char*>(p);
  }
  char* memory(int block) const { return shared + block * stride; }
};

inline Machine* machine = nullptr;
inline Thread* current = nullptr;

inline void enter();

// Never inlined: what a fiber keeps in registers must be on its stack, or in `registers`, while another one runs.
__attribute__((noinline)) inline void switch_to(Thread& next) {
  if (_setjmp(current->registers)) return;
  current = &next;
  threadIdx.x = next.index - next.block * blockDim.x;
  blockIdx.x = next.block;
  if (next.started) _longjmp(next.registers, 1);
  next.started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_link = nullptr;
  context.uc_stack.ss_sp = machine->stacks + next.index * STACK;
  context.uc_stack.ss_size = STACK - next.index * 576 % 16384;  // equal addresses modulo 4096 would share a cache set
  makecontext(&context, enter, 0);
  setcontext(&context);
  abort();
}

// On to the warp's next lane that can run, after the last one back to the scheduler.
inline void advance() {
  Machine& m = *machine;
  while (m.turn < WARP) {
    Thread& next = m.all[m.first + (m.start + m.step * m.turn++) % WARP];
    if (next.state == Thread::READY) return switch_to(next);
  }
  switch_to(m.scheduler);
}

inline void enter() {
  machine->function();
  current->state = Thread::ENDED;
  --machine->warps[current->index / WARP].ready;
  --machine->running[current->block];
  advance();
  abort();
}

[[noreturn]] inline void fail(Call call, const std::string& what) {
  machine->error =
      call.text() + " in block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(threadIdx.x) + ": " + what;
  switch_to(machine->scheduler);
  abort();
}

inline void stop(Call call) {
  current->call = call;
  current->state = Thread::STOPPED;
  --machine->warps[current->index / WARP].ready;
  advance();
}

inline void wake(Thread& thread) {
  thread.state = Thread::READY;
  ++machine->warps[thread.index / WARP].ready;
}

// `arguments` lie on the lane's stack, which stays as it is until all lanes have come and the operation is done.
inline void collective(Call call, Operation operation, void* arguments = nullptr) {
  Warp& warp = machine->warps[current->index / WARP];
  if (warp.arrived++ == 0) {
    warp.call = call;
    warp.operation = operation;
  } else if (call != warp.call) {
    fail(call, "other lanes of its warp are at " + warp.call.text());
  }
  warp.arguments[current->index % WARP] = arguments;
  stop(call);
}

// A barrier of a block, or of a group of blocks.
template <bool GROUP>
bool meet(int warp, void* const*) {
  Machine& m = *machine;
  const int count = m.threads / WARP * (GROUP ? m.group_size : 1), which = warp / count;
  Meeting& meeting = m.meetings[GROUP][which];
  const Call call = m.warps[warp].call;
  if (meeting.arrived++ == 0) meeting.call = call;
  if (call != meeting.call) m.error = call.text() + ": other warps are at " + meeting.call.text();
  if (meeting.arrived == count) {
    meeting.arrived = 0;
    for (int i = 0; i < count * WARP; ++i) wake(m.all[which * count * WARP + i]);
  }
  return false;
}

inline void check_aligned(Call call, const void* p, unsigned bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail(call, "address not aligned to " + std::to_string(bytes) + " bytes");
}

inline void check_shared(Call call, const void* p, unsigned bytes, int block = blockIdx.x) {
  const int64_t offset = static_cast<const char*>(p) - machine->memory(block);
  if (offset < 0 || offset + bytes > machine->shared_bytes)
    fail(call, "offset " + std::to_string(offset) + " is outside of the block's shared memory");
  check_aligned(call, p, bytes);
}

template <class T>
T load(Call call, const void* p) {
  check_aligned(call, p, sizeof(T));
  return *static_cast<const T*>(p);
}

inline Barrier& find_barrier(Call call, const uint64_t* p) {
  check_shared(call, p, 8);
  const uint64_t number = *p - INITIALISED;
  if (number >= machine->barriers.size() || machine->barriers[number].address != p)
    fail(call, "no mbarrier: not initialised, or written over");
  return machine->barriers[number];
}

inline void end_phase(Barrier& barrier) {
  for (const Copy& copy : barrier.copies) memcpy(copy.to, copy.from, 16);
  for (Thread* thread : barrier.waiting) wake(*thread);
  barrier.copies.clear();
  barrier.waiting.clear();
  barrier.arrived = 0;
  ++barrier.phase;
}

struct Fragments {
  float* c;
  const uint32_t* a;
  uint32_t b0, b1;
};

typedef float Row __attribute__((vector_size(32)));  // 8 columns

template <class E>
bool multiply(int, void* const* arguments) {
  float a[16][16];
  Row b[16], c[16];
  for (int lane = 0; lane < WARP; ++lane) {
    const Fragments& of = *static_cast<const Fragments*>(arguments[lane]);
    const int g = lane / 4, t = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const float2 two = E::unpack(of.a[i]);
      a[g + i % 2 * 8][t + i / 2 * 8] = two.x, a[g + i % 2 * 8][t + i / 2 * 8 + 1] = two.y;
      c[g + i / 2 * 8][t + i % 2] = of.c[i];
    }
    const float2 upper = E::unpack(of.b0), lower = E::unpack(of.b1);
    b[t][g] = upper.x, b[t + 1][g] = upper.y, b[t + 8][g] = lower.x, b[t + 9][g] = lower.y;
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k) c[row] += a[row][k] * b[k];
  for (int lane = 0; lane < WARP; ++lane)
    for (int i = 0; i < 4; ++i)
      static_cast<const Fragments*>(arguments[lane])->c[i] = c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  return true;
}

struct Matrices {
  uint32_t* r;
  const void* row;
};

template <bool TRANS>
bool load_matrices(int, void* const* arguments) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t x[8][8];
    for (int i = 0; i < 8; ++i) memcpy(x[i], static_cast<const Matrices*>(arguments[matrix * 8 + i])->row, 16);
    for (int lane = 0; lane < WARP; ++lane) {
      const int g = lane / 4, t = lane % 4 * 2;
      const uint32_t low = TRANS ? x[t][g] : x[g][t], high = TRANS ? x[t + 1][g] : x[g][t + 1];
      static_cast<const Matrices*>(arguments[lane])->r[matrix] = low | high << 16;
    }
  }
  return true;
}

template <bool TRANS>
void ldmatrix(Call call, uint32_t* r, const void* shared) {
  check_shared(call, shared, 16);
  Matrices arguments{r, shared};
  collective(call, load_matrices<TRANS>, &arguments);
}

inline bool exchange(int, void* const* arguments) {
  float x[WARP];
  const auto of = [&](int lane) { return static_cast<std::pair<float, int>*>(arguments[lane]); };
  for (int lane = 0; lane < WARP; ++lane) x[lane] = of((lane ^ of(lane)->second) % WARP)->first;
  for (int lane = 0; lane < WARP; ++lane) of(lane)->first = x[lane];
  return true;
}

// An element type of which `E` has round(float) and number(16 bits).
template <class E>
struct Element {
  static uint32_t pack(float low, float high) { return E::round(low) | E::round(high) << 16; }
  static float2 unpack(uint32_t two) { return {E::number(two & 0xffff), E::number(two >> 16)}; }
  static void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, BERT_FAST_CALL("mma")) {
    Fragments arguments{c, a, b0, b1};
    collective(call, multiply<E>, &arguments);
  }
};

// The lanes of one warp, once each. Their order is drawn as well: a missing __syncwarp shows too.
inline void run_round(int warp) {
  Machine& m = *machine;
  m.first = warp * WARP, m.start = m.random() % WARP, m.step = m.random() % WARP | 1, m.turn = 0;
  advance();
  Warp& w = m.warps[warp];
  if (!m.error.empty() || w.arrived < WARP) return;
  w.arrived = 0;
  if (w.operation(warp, w.arguments))
    for (int lane = 0; lane < WARP; ++lane) wake(m.all[m.first + lane]);
}

inline void run() {
  Machine& m = *machine;
  std::vector<int> ready;
  while (m.error.empty()) {
    ready.clear();
    for (size_t i = 0; i < m.warps.size(); ++i)
      if (m.warps[i].ready) ready.push_back(i);
    if (ready.empty()) break;
    const int warp = ready[m.random() % ready.size()];
    // Of very different length, so that some warps keep step and some are far ahead.
    for (int rounds = 1 << m.random() % 10; rounds && m.warps[warp].ready && m.error.empty(); --rounds) run_round(warp);
  }
  if (!m.error.empty()) return;
  std::map<std::string, int> places;
  for (const Thread& thread : m.all) ++places[thread.state == Thread::ENDED ? "the end" : thread.call.text()];
  if (places["the end"] < int(m.all.size())) {
    m.error = "deadlock";
    for (const auto& [place, count] : places) m.error += ", " + std::to_string(count) + " threads at " + place;
    return;
  }
  for (int block = 0; block < m.blocks; ++block)
    if (std::any_of(m.memory(block) + m.shared_bytes, m.memory(block + 1), [](char c) { return c != '\xff'; }))
      m.error = "written beyond the shared memory of block " + std::to_string(block);
}

}  // namespace emulator

// Runs function() in every thread of a launch of `blocks` blocks, all resident, and returns what went wrong, or "".
// clusters: every `group_size` neighbouring blocks are a cluster.
[[nodiscard]] inline std::string emulate(int blocks, int threads, int group_size, int64_t shared_bytes, unsigned seed,
                                         bool clusters, const std::function<void()>& function) {
  if (threads % WARP || (clusters && blocks % group_size)) return "not whole warps, or not whole groups";
  emulator::Machine m({blocks, threads, group_size, shared_bytes, clusters, function}, seed);
  blockDim.x = threads, gridDim.x = blocks;
  emulator::machine = &m;
  emulator::current = &m.scheduler;
  emulator::run();
  return m.error;
}

}  // namespace bert_fast
