// Large, aligned, zeroed memory, on huge pages where the kernel gives them: a step streams all weights, and
// small pages cost a translation miss every 4 KiB.
#pragma once

#include <cstddef>
#include <vector>

namespace baton {

class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t bytes);  // throws std::bad_alloc
  Memory(Memory&&) noexcept;
  Memory& operator=(Memory&&) noexcept;
  ~Memory();

  template <typename T>
  T* as() const { return static_cast<T*>(data_); }
  size_t bytes() const { return bytes_; }

 private:
  friend class Arena;

  void* data_ = nullptr;
  size_t bytes_ = 0;
  bool owned_ = true;  // else it is an arena's
};

// Hands out pieces of memory, neighbours in the order in which they are asked for, which end with
// it: pieces that are smaller than a huge page share some.
class Arena {
 public:
  Memory take(size_t bytes);  // throws std::bad_alloc

 private:
  std::vector<Memory> chunks_;
  size_t taken_ = 0;  // of the last one
};

}  // namespace baton
