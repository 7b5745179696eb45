// y = x wᵀ over weights that were packed once, panel by panel.
//
// A panel is 32 output columns with all of their inputs, contiguous, so that one thread streams
// it from memory once however many rows x has:
//   F32   [k][32]            BF16  [k / 2][32][2]
//   INT8  [k / 4][32][4]         INT4  see int4.h
// k is padded with zeros to a multiple of 64, n to a multiple of 32. The order in which a row's
// products are added never depends on how many rows there are: a token's numbers are the same in
// every batch.
#pragma once

#include <cstdint>

#include "baton.h"

namespace baton {

constexpr int kPanel = 32;     // output columns of a panel
constexpr int kTileRows = 32;  // most rows of a tile that a sink receives
constexpr int kDepth = 64;     // k is padded to a multiple of it

class Team;

struct Packed {
  BatonFormat format = BATON_F32;
  int64_t n = 0, k = 0;           // as they were, without padding
  int64_t depth = 0;              // k with padding
  const void* panels = nullptr;
  int64_t panel_bytes = 0;
  const float* scales = nullptr;  // [n padded], INT8 and INT4: of each output column
  const int32_t* sums = nullptr;  // [n padded], INT8 and INT4: 128 times the sum of a column's integers
  int panels_count() const { return static_cast<int>((n + kPanel - 1) / kPanel); }
};

// What the kernels of an instruction set want rows of x to be, for a format of weights.
// INT8 means uint8 with an offset of 128 and one scale per row: x = scale * (byte - 128).
struct Rows {
  const void* data = nullptr;
  int64_t stride = 0;             // bytes from one row to the next; rows are zero up to `depth`
  const float* scales = nullptr;  // [count], INT8
  int count = 0;
};

// Takes finished tiles: tile [rows][kPanel] float32 of columns [32 panel, 32 panel + 32). Runs on
// the thread that computed it, while the tile is in its first-level cache.
struct Sink {
  void (*take)(void* self, const float* tile, int first_row, int rows, int panel);
  void* self;
};

struct GemmKernels {
  // What `x` must be for these weights.
  BatonFormat (*rows_format)(BatonFormat weights);
  // All rows of `count` panels from panel `first` on.
  void (*panels)(const Packed& w, const Rows& x, int first, int count, const Sink& sink);
  // Once per thread before its first `panels`, and after its last (AMX: tile configuration).
  void (*begin)();
  void (*end)();
};

const GemmKernels& gemm_kernels(BatonIsa isa);

// A share of a product's panels; no more are left where count is 0.
struct Panels {
  int first, count;
};

// Inside `team.run`: the panels of `panels` that this thread takes next, multiples of `unit` but for the
// last ones. Draws from `team.next`, so there must have been a meeting since others drew.
Panels next_panels(Team& team, int panels, int unit = 1);

// Inside `team.run`, called by all threads between `begin` and `end`: the whole product, by
// `next_panels`; ends without a meeting.
void multiply(const GemmKernels& kernels, const Packed& w, const Rows& x, Team& team, const Sink& sink);

// A stride for rows of `depth` numbers that does not put all rows into the same few lines of a cache,
// as multiples of a large power of two do.
int64_t row_stride(int64_t depth, BatonFormat rows);

}  // namespace baton
