// Matrices in the layout that the kernels read (gemm.h).
//
// INT8 is symmetric per output channel: scale = max |w| / 127 of a row of the source, weights rounded
// to the nearest, ties to even. INT4: see int4.h.
#pragma once

#include <cstdint>

#include "baton.h"
#include "gemm.h"
#include "memory.h"
#include "team.h"

namespace baton {

// Where the rows of a source matrix [n, k] become columns of the packed one.
enum class Columns {
  kInOrder,  // row r is column r
  kPaired,   // rows r and n / 2 + r share a panel: 16 of the upper half, then their 16 of the lower
};

class PackedMatrix {
 public:
  PackedMatrix() = default;
  // Zeros, until packed. Throws std::bad_alloc, and std::invalid_argument where `format` has no
  // kernels, or where n is not a multiple of 32 and columns are paired. The arena must outlive it.
  PackedMatrix(BatonFormat format, int64_t n, int64_t k, Columns columns = Columns::kInOrder,
               Arena* arena = nullptr);

  // Pack `rows` rows from row `first` on. source: [rows, k] of F32, BF16 or F16. Outside of
  // `team.run`. 0, or what `fail` returns: rows out of range, or weights for INT8 or INT4 that are not finite.
  int pack(int64_t first, int64_t rows, const void* source, BatonFormat source_format, Team& team);

  Packed view() const;
  int64_t bytes() const { return static_cast<int64_t>(panels_.bytes() + columns_data_.bytes()); }

 private:
  int64_t row_of(int64_t column) const;

  BatonFormat format_ = BATON_F32;
  int64_t n_ = 0, k_ = 0, depth_ = 0, panel_bytes_ = 0;
  Columns columns_ = Columns::kInOrder;
  Memory panels_;
  Memory columns_data_;  // INT8 and INT4: scales, then sums
};

}  // namespace baton
