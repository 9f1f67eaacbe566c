// Runs CUDA kernels on the CPU, for tests: every thread of a block is a fiber, blocks are shared out over OpenMP
// threads. A fiber gives way at barriers and warp operations only, in an order that VQFAST_EMULATED_ORDER chooses
// (forward, reverse, random): a missing barrier then shows as a wrong result. Shared memory starts as NaN and ends in a
// guard that must stay as it was. Not covered: races between two barriers that no order exposes, memory ordering,
// speed.
#pragma once
#if !defined(__x86_64__)
#error "the emulation switches stacks in x86-64 assembly"
#endif
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  int64_t count() const { return int64_t(x) * y * z; }
};

namespace emulation {

// Saves the stack pointer and the registers a call must keep, and continues on another stack.
extern "C" void vqfast_switch_stack(void** save, void* load);
asm(R"(
.text
.weak vqfast_switch_stack
.type vqfast_switch_stack,@function
vqfast_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.section .note.GNU-stack,"",@progbits
.text
)");

constexpr int kWarp = 32;
constexpr size_t kStack = 64 << 10, kGuard = 256, kSlot = 32;
constexpr unsigned char kNaN = 0xFF, kGuardByte = 0xA5;  // all ones is NaN in every floating-point format

enum class State { kReady, kBlockBarrier, kWarpBarrier, kDone };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  int group;
};

struct Fiber {
  void* stack_pointer;
  State state;
  dim3 index;
  int linear;
  std::vector<Copy> copies = {};  // asynchronous ones that have not arrived
  int group = 0;                  // of the next copy
};

struct Block {
  dim3 grid, size, index;
  std::vector<Fiber> fibers;
  std::vector<char> stacks, slots;  // a slot per thread: what it shows to its warp
  unsigned char* shared = nullptr;
  void* scheduler = nullptr;
  Fiber* current = nullptr;
  const std::function<void()>* body = nullptr;
  std::string error;
};
inline thread_local Block* block = nullptr;

inline void give_way(State state) {
  Fiber* self = block->current;
  self->state = state;
  vqfast_switch_stack(&self->stack_pointer, block->scheduler);
}

inline void enter_fiber() {
  try {
    (*block->body)();
  } catch (const std::exception& error) {
    block->error = error.what();
  }
  give_way(State::kDone);
  std::abort();
}

inline void reset(Block& b) {
  const int count = int(b.size.count());
  b.fibers.resize(count), b.slots.resize(count * kSlot), b.stacks.resize(count * kStack + 64);
  for (int i = 0; i < count; ++i) {
    auto top = reinterpret_cast<uintptr_t>(b.stacks.data() + (i + 1) * kStack) & ~uintptr_t(63);
    void** sp = reinterpret_cast<void**>(top);
    *--sp = nullptr;  // where the entry would return to; keeps the stack aligned
    *--sp = reinterpret_cast<void*>(&enter_fiber);
    for (int saved = 0; saved < 6; ++saved) *--sp = nullptr;
    const unsigned n = unsigned(i);
    b.fibers[i] = {sp, State::kReady, dim3(n % b.size.x, n / b.size.x % b.size.y, n / b.size.x / b.size.y), i};
  }
}

// Lets the fibers that wait go on. A warp goes on when all its threads wait for it, a block when all threads do.
inline void release(Block& b) {
  const int count = int(b.fibers.size());
  bool released = false;
  int done = 0, waiting = 0;
  for (int first = 0; first < count; first += kWarp) {
    const int last = std::min(count, first + kWarp);
    int in_warp = 0, others = 0;
    for (int i = first; i < last; ++i) {
      const State state = b.fibers[i].state;
      in_warp += state == State::kWarpBarrier, others += state != State::kWarpBarrier;
      done += state == State::kDone, waiting += state == State::kBlockBarrier;
    }
    if (!in_warp) continue;
    if (others) throw std::runtime_error("a warp operation that not all threads of the warp reach");
    for (int i = first; i < last; ++i) b.fibers[i].state = State::kReady;
    released = true;
  }
  if (released || done == count) return;
  if (waiting != count) throw std::runtime_error("a barrier that not all threads of the block reach");
  for (Fiber& fiber : b.fibers) fiber.state = State::kReady;
}

inline void run_block(Block& b, const std::string& order, std::mt19937& random) {
  reset(b);
  std::vector<int> sequence(b.fibers.size());
  for (size_t i = 0; i < sequence.size(); ++i) sequence[i] = int(order == "reverse" ? sequence.size() - 1 - i : i);
  const auto is_done = [](const Fiber& fiber) { return fiber.state == State::kDone; };
  while (!std::all_of(b.fibers.begin(), b.fibers.end(), is_done)) {
    if (order == "random") std::shuffle(sequence.begin(), sequence.end(), random);
    for (int i : sequence) {
      if (b.fibers[i].state != State::kReady) continue;
      b.current = &b.fibers[i];
      vqfast_switch_stack(&b.scheduler, b.current->stack_pointer);
      if (!b.error.empty()) throw std::runtime_error(b.error);
    }
    release(b);
  }
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 size, size_t shared_bytes, Arguments... arguments) {
  const char* given = std::getenv("VQFAST_EMULATED_ORDER");
  const std::string order = given ? given : "forward";
  if (order != "forward" && order != "reverse" && order != "random")
    throw std::runtime_error("VQFAST_EMULATED_ORDER must be forward, reverse or random; got " + order);
  const std::function<void()> body = [&] { kernel(arguments...); };
  const int64_t blocks = grid.count();
  std::string error;
#pragma omp parallel
  {
    Block b;
    std::vector<unsigned char> memory(shared_bytes + kGuard + 128);
    b.grid = grid, b.size = size, b.body = &body;
    b.shared = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(memory.data()) + 127) & ~uintptr_t(127));
    block = &b;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < blocks; ++i) {
      b.index = dim3(unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y));
      std::memset(b.shared, kNaN, shared_bytes);
      std::memset(b.shared + shared_bytes, kGuardByte, kGuard);
      std::mt19937 random(unsigned(i + 1));
      try {
        run_block(b, order, random);
        for (size_t j = 0; j < kGuard; ++j)
          if (b.shared[shared_bytes + j] != kGuardByte) throw std::runtime_error("a write beyond shared memory");
      } catch (const std::exception& caught) {
#pragma omp critical
        error = caught.what();
      }
    }
    block = nullptr;
  }
  if (!error.empty()) throw std::runtime_error("emulated kernel: " + error);
}

// Asynchronous copies arrive as late as they may: when waited for.
inline void copy_async(void* to, const void* from, size_t bytes) {
  Fiber& self = *block->current;
  self.copies.push_back({to, from, bytes, self.group});
}
inline void commit_copies() { ++block->current->group; }
inline void wait_for_copies(int pending) {
  Fiber& self = *block->current;
  std::erase_if(self.copies, [&](const Copy& copy) {
    const bool arrives = copy.group < self.group - pending;
    if (arrives) std::memcpy(copy.to, copy.from, copy.bytes);
    return arrives;
  });
}

inline int lane() { return block->current->linear % kWarp; }

template <class T>
T* slot(int lane_of_warp) {  // of a thread of the calling thread's warp
  static_assert(sizeof(T) <= kSlot);
  return reinterpret_cast<T*>(block->slots.data() +
                              size_t(block->current->linear / kWarp * kWarp + lane_of_warp) * kSlot);
}

// Every thread of the warp shows `value`; the result is that of `from`.
template <class T>
T exchange(T value, int from) {
  std::memcpy(slot<T>(lane()), &value, sizeof(T));
  give_way(State::kWarpBarrier);
  T result;
  std::memcpy(&result, slot<T>(from), sizeof(T));
  give_way(State::kWarpBarrier);
  return result;
}

// d += a b of one warp: mma.sync.m16n8k16 with two 16-bit values T in a register, fp32 sums, fragments as in PTX.
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Fragment {
    uint32_t a[4], b[2];
  };
  Fragment own;
  std::memcpy(own.a, a, sizeof own.a), std::memcpy(own.b, b, sizeof own.b);
  std::memcpy(slot<Fragment>(lane()), &own, sizeof own);
  give_way(State::kWarpBarrier);
  const auto half = [](uint32_t word, int which) {
    const uint16_t bits = uint16_t(word >> (16 * which));
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return static_cast<float>(value);
  };
  const int group = lane() / 4, in_group = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = group + 8 * (i / 2), column = 2 * in_group + i % 2;
    for (int k = 0; k < 16; ++k) {
      const Fragment* of_a = slot<Fragment>(row % 8 * 4 + k % 8 / 2);
      const Fragment* of_b = slot<Fragment>(column * 4 + k % 8 / 2);
      d[i] += half(of_a->a[row / 8 + 2 * (k / 8)], k % 2) * half(of_b->b[k / 8], k % 2);
    }
  }
  give_way(State::kWarpBarrier);
}

}  // namespace emulation

#define threadIdx (emulation::block->current->index)
#define blockIdx (emulation::block->index)
#define blockDim (emulation::block->size)
#define gridDim (emulation::block->grid)

inline void __syncthreads() { emulation::give_way(emulation::State::kBlockBarrier); }
inline void __syncwarp(unsigned = ~0u) { emulation::give_way(emulation::State::kWarpBarrier); }
template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return emulation::exchange(value, from % emulation::kWarp);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::exchange(value, emulation::lane() ^ mask);
}
