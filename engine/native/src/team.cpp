#include "team.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#include "error.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace baton {
namespace {

// How long a meeting waits in a loop before it yields the processor, and how often it yields before
// it sleeps. Longer than the threads of a balanced step are apart, shorter than waking one up twice.
constexpr auto kSpin = std::chrono::microseconds(50);
constexpr int kPauses = 32;  // between two looks at the clock
constexpr int kYields = 64;
constexpr uint32_t kMostThreads = 0xfff;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int processors() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  return static_cast<int>(std::thread::hardware_concurrency());
}

void pin(std::thread& thread, int cpu) {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  if (cpu < 0 || cpu >= CPU_SETSIZE)
    throw std::system_error(EINVAL, std::generic_category(), "cpu " + std::to_string(cpu));
  CPU_SET(static_cast<size_t>(cpu), &set);
  int error = pthread_setaffinity_np(thread.native_handle(), sizeof set, &set);
  if (error != 0)
    throw std::system_error(error, std::generic_category(), "cannot use cpu " + std::to_string(cpu));
#else
  static_cast<void>(thread), static_cast<void>(cpu);
#endif
}

int processor_here() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// Waits until `value` is no longer `old`. True if it slept.
bool wait_for_change(const std::atomic<int>& value, int old, bool spin) {
  if (spin) {
    auto end = std::chrono::steady_clock::now() + kSpin;
    do {
      for (int i = 0; i < kPauses; i++) {
        if (value.load(std::memory_order_acquire) != old) return false;
        pause();
      }
    } while (std::chrono::steady_clock::now() < end);
  }
  for (int i = 0; i < kYields; i++) {
    if (value.load(std::memory_order_acquire) != old) return false;
    std::this_thread::yield();
  }
  value.wait(old, std::memory_order_acquire);
  return true;
}

thread_local bool serving = false;  // else this is a caller of `run`

}  // namespace

struct Team::State {
  State(int count, bool pinned)
      : count(count), pinned(pinned), spin(count <= processors()), active(count) {}

  const int count;
  const bool pinned;
  const bool spin;  // else the threads share processors, and waiting in a loop keeps others out
  int caller_processor = -1;  // which the other threads keep off
  const std::function<void(int)>* work = nullptr;
  int active;  // threads in a run; changes between runs
  std::vector<std::thread> threads;
  // Each on a cache line of its own: some are written while all look at others.
  // Changes when there is work: the number of the run, and in the lowest bits how many take part,
  // none of them to leave. One number, so that who looks late does not mistake one run for another.
  alignas(64) std::atomic<uint32_t> runs{0};
  alignas(64) std::atomic<int> meetings{0};  // changes when all have met
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<int> ticket{0};

  // Keeps the other threads off the caller's processor. Linux likes to wake a thread next to the one
  // that woke it and may leave them there for seconds: they never wait at the same time, so
  // that processor never looks too busy, while each step takes twice its time.
  void spread() {
#if defined(__linux__)
    if (pinned || !spin || active == 1) return;
    int here = processor_here();
    if (here == caller_processor || here < 0) return;
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) != 0 || CPU_COUNT(&set) < count) return;
    CPU_CLR(static_cast<size_t>(here), &set);
    for (std::thread& thread : threads)
      pthread_setaffinity_np(thread.native_handle(), sizeof set, &set);
    caller_processor = here;
#endif
  }

  void meet(bool caller) {
    if (active == 1) {
      ticket.store(0, std::memory_order_relaxed);
      return;
    }
    int meeting = meetings.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 < active) {
      if (wait_for_change(meetings, meeting, spin) && caller) spread();
      return;
    }
    arrived.store(0, std::memory_order_relaxed);
    ticket.store(0, std::memory_order_relaxed);
    meetings.store(meeting + 1, std::memory_order_release);
    meetings.notify_all();
  }

  void serve(int thread) {
    serving = true;
    for (uint32_t seen = 0;;) {
      runs.wait(seen, std::memory_order_acquire);
      seen = runs.load(std::memory_order_acquire);
      uint32_t taking_part = seen & kMostThreads;
      if (taking_part == 0) return;
      if (static_cast<uint32_t>(thread) >= taking_part) continue;
      (*work)(thread);
      meet(false);
    }
  }

  void wake(int taking_part) {
    uint32_t next = (runs.load(std::memory_order_relaxed) | kMostThreads) + 1;
    runs.store(next | static_cast<uint32_t>(taking_part), std::memory_order_release);
    runs.notify_all();
  }

  void leave() {
    wake(0);
    for (std::thread& thread : threads) thread.join();
  }
};

Team::Team(int threads, const int32_t* cpus) : state_(std::make_unique<State>(threads, cpus != nullptr)) {
  try {
    for (int i = 1; i < threads; i++) {
      state_->threads.emplace_back([state = state_.get(), i] { state->serve(i); });
      if (cpus != nullptr) pin(state_->threads.back(), cpus[i]);
    }
  } catch (...) {
    state_->leave();
    throw;
  }
}

Team::~Team() { state_->leave(); }

int Team::threads() const { return state_->active; }

void Team::use(int threads) { state_->active = std::clamp(threads, 1, state_->count); }

void Team::run(const std::function<void(int)>& work) {
  state_->work = &work;
  state_->spread();
  if (state_->active > 1) state_->wake(state_->active);
  work(0);
  state_->meet(true);
}

void Team::meet() { state_->meet(!serving); }

int Team::next(int count) {
  std::atomic<int>& ticket = state_->ticket;
  int mine;
  if (state_->active == 1) {
    mine = ticket.load(std::memory_order_relaxed);
    ticket.store(mine + 1, std::memory_order_relaxed);
  } else {
    mine = ticket.fetch_add(1, std::memory_order_relaxed);
  }
  return mine < count ? mine : -1;
}

}  // namespace baton

BatonTeam* baton_team_new(int32_t threads, const int32_t* cpus) {
  if (threads < 1 || static_cast<uint32_t>(threads) > baton::kMostThreads) {
    baton::fail("a team needs a thread, and not thousands");
    return nullptr;
  }
  try {
    return new BatonTeam(threads, cpus);
  } catch (const std::exception& error) {
    baton::fail(error.what());
    return nullptr;
  }
}

void baton_team_free(BatonTeam* team) { delete team; }

void baton_team_use(BatonTeam* team, int32_t threads) { team->team.use(threads); }
