// Large, aligned, zeroed memory, on huge pages where the kernel gives them: a step streams all weights, and
// small pages cost a translation miss every 4 KiB.
#pragma once

#include <cstddef>

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
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace baton
