#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <new>
#include <utility>

namespace baton {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kPage = size_t{4} << 10;
constexpr size_t kChunk = size_t{64} << 20;  // of an arena; what nobody takes is never touched

size_t rounded(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

void* map(size_t bytes) {
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) throw std::bad_alloc();
  return data;
}

// A mapping that starts at a huge page: one that is a page too long, with its ends given back.
void* map_huge(size_t bytes) {
  char* wide = static_cast<char*>(map(bytes + kHugePage));
  size_t before = rounded(reinterpret_cast<uintptr_t>(wide), kHugePage) - reinterpret_cast<uintptr_t>(wide);
  if (before > 0) munmap(wide, before);
  munmap(wide + before + bytes, kHugePage - before);
#ifdef MADV_HUGEPAGE
  madvise(wide + before, bytes, MADV_HUGEPAGE);  // where it is refused, small pages serve as well
#endif
  return wide + before;
}

}  // namespace

Memory::Memory(size_t bytes) {
  if (bytes == 0) return;
  bool huge = bytes >= kHugePage;
  bytes_ = rounded(bytes, huge ? kHugePage : kPage);
  data_ = huge ? map_huge(bytes_) : map(bytes_);
}

Memory::Memory(Memory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      owned_(std::exchange(other.owned_, true)) {}

Memory& Memory::operator=(Memory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(owned_, other.owned_);
  return *this;
}

Memory::~Memory() {
  if (data_ != nullptr && owned_) munmap(data_, bytes_);
}

Memory Arena::take(size_t bytes) {
  Memory piece;
  piece.bytes_ = rounded(bytes, kPage);
  piece.owned_ = false;
  if (chunks_.empty() || chunks_.back().bytes() - taken_ < piece.bytes_) {
    chunks_.emplace_back(std::max(piece.bytes_, kChunk));
    taken_ = 0;
  }
  piece.data_ = chunks_.back().as<char>() + taken_;
  taken_ += piece.bytes_;
  return piece;
}

}  // namespace baton
