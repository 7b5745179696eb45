// A fixed team of threads that run one function together and meet at barriers.
//
// A step is one `run`: its threads live in one function for all layers and meet a few hundred times,
// so a meeting spins first and yields the processor only when the others are late. Between runs
// the team sleeps: workers that share a machine must not burn each other's cores.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "baton.h"

namespace baton {

class Team {
 public:
  // cpus: one per thread, or null. The caller of `run` is thread 0 and is never pinned. Without cpus
  // the other threads keep off the processor that the caller is on, if there are enough.
  Team(int threads, const int32_t* cpus);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  // How many take part in a run: all of them, until `use` says otherwise.
  int threads() const;

  // Between runs: the first `threads` of them take part in what follows, at least one and at most all.
  // The others sleep.
  void use(int threads);

  // Call work(thread) on every thread, and return when all are done. Not from inside itself.
  // Exceptions must not leave `work`.
  void run(const std::function<void(int thread)>& work);

  // Inside `run`: return when all threads are here; what they wrote before is seen after.
  void meet();

  // Inside `run`: the next piece of `count` that nobody has taken since the last `meet`, or -1.
  // Before the meeting every piece must have been drawn.
  int next(int count);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace baton

// What `baton_team_new` hands out.
struct BatonTeam {
  BatonTeam(int threads, const int32_t* cpus) : team(threads, cpus) {}
  baton::Team team;
};
