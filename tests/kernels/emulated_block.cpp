// Runs the kernel of csrc/sample_visible.cuh on the host, one block after another.
//
// Each thread of a block is a coroutine. It runs until it meets a barrier, or an instruction that its whole warp takes
// part in, and goes on when the others have come. Between two meetings threads run in an order that the caller chooses:
// where a barrier is missing, some order shows it. What a block leaves in shared memory, the next one finds there.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)

struct Index {
  unsigned x;
} threadIdx, blockIdx, blockDim;

namespace {

enum Order { kAscending, kDescending, kShuffled };

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  bool is_done = false;
};

std::vector<Thread> threads;
ucontext_t scheduler;
std::function<void()> kernel;
bool has_progressed;

// No thread leaves before all have come.
struct Meeting {
  unsigned num_arrived = 0, num_held = 0;

  void wait(unsigned num_members) {
    const unsigned held_before = num_held;
    if (++num_arrived == num_members) {
      num_arrived = 0;
      ++num_held;
      has_progressed = true;
    }
    while (num_held == held_before) swapcontext(&threads[threadIdx.x].context, &scheduler);
  }
};

Meeting of_block, of_warp[32];
uint32_t values[32][32];

// What `choose` makes of this lane's number and the values of its warp.
template <class T, class Choose>
T exchange(T value, const Choose& choose) {
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  memcpy(&values[warp][lane], &value, 4);
  of_warp[warp].wait(32);
  const uint32_t chosen = choose(lane, values[warp]);
  of_warp[warp].wait(32);  // before any lane writes the next value
  T result;
  memcpy(&result, &chosen, 4);
  return result;
}

void __syncthreads() { of_block.wait(blockDim.x); }

template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return exchange(value, [&](unsigned, const uint32_t* warp) { return warp[from]; });
}

template <class T>
T __shfl_up_sync(unsigned, T value, unsigned distance) {
  return exchange(value, [&](unsigned lane, const uint32_t* warp) { return warp[lane < distance ? lane : lane - distance]; });
}

template <class T>
T __shfl_xor_sync(unsigned, T value, unsigned mask) {
  return exchange(value, [&](unsigned lane, const uint32_t* warp) { return warp[lane ^ mask]; });
}

uint32_t __reduce_max_sync(unsigned, uint32_t value) {
  return exchange(value, [](unsigned, const uint32_t* warp) { return *std::max_element(warp, warp + 32); });
}

uint32_t __reduce_add_sync(unsigned, uint32_t value) {
  return exchange(value, [](unsigned, const uint32_t* warp) { return std::accumulate(warp, warp + 32, 0u); });
}

uint32_t __ballot_sync(unsigned, bool value) {
  return exchange(uint32_t{value}, [](unsigned, const uint32_t* warp) {
    uint32_t lanes = 0;
    for (int lane = 0; lane < 32; ++lane) lanes |= warp[lane] << lane;
    return lanes;
  });
}

int __ffs(uint32_t lanes) { return __builtin_ffs(static_cast<int>(lanes)); }

void atomicAdd(uint32_t* sum, uint32_t value) { *sum += value; }

void run_thread() {
  kernel();
  threads[threadIdx.x].is_done = true;
  has_progressed = true;
}  // the scheduler goes on: it is linked behind every thread

// Runs `kernel` in every thread of one block; false if some wait for others that never come.
bool run_block(Order order, std::mt19937& random) {
  std::vector<unsigned> turns(blockDim.x);
  std::iota(turns.begin(), turns.end(), 0);
  if (order == kDescending) std::reverse(turns.begin(), turns.end());
  of_block = {};
  std::fill(of_warp, of_warp + 32, Meeting{});
  threads = std::vector<Thread>(blockDim.x);
  for (Thread& thread : threads) {
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = &scheduler;
    makecontext(&thread.context, run_thread, 0);
  }
  do {
    has_progressed = false;
    if (order == kShuffled) std::shuffle(turns.begin(), turns.end(), random);
    for (const unsigned turn : turns) {
      threadIdx.x = turn;
      if (!threads[turn].is_done) swapcontext(&scheduler, &threads[turn].context);
    }
  } while (has_progressed);
  return std::all_of(threads.begin(), threads.end(), [](const Thread& thread) { return thread.is_done; });
}

}  // namespace

#include "sample_visible.cuh"

extern "C" bool sample_visible(const float* logits, const int64_t* seeds, int num_clips, int num_tokens,
                               int num_visible, int64_t* visible_ids, int64_t* masked_ids, int64_t* slots,
                               float* statistics, int order) {
  using namespace adamae;
  const auto chosen = tokens_of_thread(num_tokens) == 4 ? sample_visible_kernel<float, 4> : sample_visible_kernel<float, 8>;
  kernel = [=] { chosen(logits, seeds, num_tokens, num_visible, visible_ids, masked_ids, slots, statistics); };
  blockDim.x = threads_of_block(num_tokens);
  std::mt19937 random(0);
  for (blockIdx.x = 0; blockIdx.x < static_cast<unsigned>(num_clips); ++blockIdx.x) {
    if (!run_block(static_cast<Order>(order), random)) return false;
  }
  return true;
}
