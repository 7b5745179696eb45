// AMX: a step multiplies two tiles of 16 rows by two tiles of 16 columns, 64 bytes deep (32 inputs
// in bfloat16, 64 in int8). A tile of weights is 16 lines of a panel, 128 bytes apart.
#include "gemm_kernels.h"

#if defined(BATON_X86_NEW)

#include <immintrin.h>

#include <cstdint>

#define BATON_TARGET "avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-bf16,amx-int8"
#include "target_begin.inc"

namespace baton {
namespace {

#include "scale_avx512.inc"

constexpr int64_t kStepBytes = 64 * kPanel;  // of a panel, in a step
constexpr int kRowBytes = kPanel * 4;        // of a row of sums
constexpr int kManyRows = 128;               // from here on weights are not what a product waits for
constexpr int kGroupPanels = 2;              // that rows meet together
constexpr int64_t kAhead = 4096;             // bytes by which up to 16 rows ask for weights
constexpr int64_t kPartSteps = 9;            // of rows that stay in the first-level cache
constexpr int64_t kRowsInCache = 2 << 20;    // bytes of x that come from it or the next one in time
constexpr int64_t kBlockBytes = 512 << 10;   // else: of x in a block, and of sums beside it
constexpr int kBlockRows = 512;

// Tiles 0 to 3 are sums, 4 rows of x, 5 rows of x or weights, 6 and 7 weights.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// The rows that this thread's tiles are configured for.
thread_local int configured_rows = 0;

void configure(int rows) {
  if (rows == configured_rows) return;
  TileConfig config;
  for (int tile = 0; tile < 8; tile++) config.row_bytes[tile] = 64;
  int upper = rows < 16 ? rows : 16;
  int lower = rows > 16 ? rows - 16 : rows;  // or the rows of a second panel
  config.rows[0] = config.rows[1] = config.rows[4] = static_cast<uint8_t>(upper);
  config.rows[2] = config.rows[3] = static_cast<uint8_t>(lower);
  config.rows[5] = static_cast<uint8_t>(rows > 16 ? lower : 16);
  config.rows[6] = config.rows[7] = 16;
  asm volatile("" : : "r"(&config) : "memory");  // GCC 12 believes that 8 bytes are read
  _tile_loadconfig(&config);
  configured_rows = rows;
}

// The intrinsics take the numbers of tiles as literals.
#define BATON_MULTIPLY(sum, rows, weights) \
  if constexpr (kInt8)                     \
    _tile_dpbusd(sum, rows, weights);      \
  else                                     \
    _tile_dpbf16ps(sum, rows, weights);

// A piece of work: `steps` steps of up to 32 rows and one panel.
//
struct Piece {
  const char* weights;
  const char* x;
  int64_t stride;
  int rows;
  int64_t steps;
  const char* ahead;  // weights that are wanted soon: `lines` lines of 64 bytes per step
  int lines, streams;  // so many of them at a time, in so many places
};

inline void ask_ahead(const Piece& piece, int64_t step) {
  int lines = piece.lines / piece.streams;
  int64_t stream_bytes = piece.steps * lines * 64;
  const char* stream = piece.ahead + step * lines * 64;
  for (int s = 0; s < piece.streams; s++, stream += stream_bytes)
    for (int i = 0; i < lines; i++) _mm_prefetch(stream + i * 64, _MM_HINT_T1);
}

template <bool kInt8>
void steps_of_16(const Piece& piece) {
  const char* w = piece.weights;
  for (int64_t step = 0; step < piece.steps; step++, w += kStepBytes) {
    _tile_loadd(6, w, 128);
    _tile_loadd(4, piece.x + step * 64, piece.stride);
    BATON_MULTIPLY(0, 4, 6)
    _tile_loadd(7, w + 64, 128);
    BATON_MULTIPLY(1, 4, 7)
  }
}

// Two panels, `panel_bytes` apart, asking ahead in both: 1.15 times as fast from memory as one by one.
template <bool kInt8>
void steps_of_two_panels(const Piece& piece, int64_t panel_bytes) {
  const char* w = piece.weights;
  for (int64_t step = 0; step < piece.steps; step++, w += kStepBytes) {
    const char* v = w + panel_bytes;
    for (int line = 0; line < kStepBytes; line += 64) {
      _mm_prefetch(w + kAhead + line, _MM_HINT_T0);
      _mm_prefetch(v + kAhead + line, _MM_HINT_T0);
    }
    _tile_loadd(6, w, 128);
    _tile_loadd(4, piece.x + step * 64, piece.stride);
    BATON_MULTIPLY(0, 4, 6)
    _tile_loadd(7, w + 64, 128);
    BATON_MULTIPLY(1, 4, 7)
    _tile_loadd(5, v, 128);
    BATON_MULTIPLY(2, 4, 5)
    _tile_loadd(6, v + 64, 128);
    BATON_MULTIPLY(3, 4, 6)
  }
}

template <bool kInt8>
void steps_of_32(const Piece& piece) {
  const char* w = piece.weights;
  const char* lower = piece.x + 16 * piece.stride;
  for (int64_t step = 0; step < piece.steps; step++, w += kStepBytes) {
    ask_ahead(piece, step);
    _tile_loadd(6, w, 128);
    _tile_loadd(4, piece.x + step * 64, piece.stride);
    _tile_loadd(7, w + 64, 128);
    BATON_MULTIPLY(0, 4, 6)
    BATON_MULTIPLY(1, 4, 7)
    _tile_loadd(5, lower + step * 64, piece.stride);
    BATON_MULTIPLY(2, 5, 6)
    BATON_MULTIPLY(3, 5, 7)
  }
}

void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

void load_sums(const char* upper, bool two) {
  _tile_loadd(0, upper, kRowBytes);
  _tile_loadd(1, upper + 64, kRowBytes);
  if (!two) return;
  const char* lower = upper + 16 * kRowBytes;
  _tile_loadd(2, lower, kRowBytes);
  _tile_loadd(3, lower + 64, kRowBytes);
}

void store_sums(char* upper, bool two) {
  _tile_stored(0, upper, kRowBytes);
  _tile_stored(1, upper + 64, kRowBytes);
  if (!two) return;
  char* lower = upper + 16 * kRowBytes;
  _tile_stored(2, lower, kRowBytes);
  _tile_stored(3, lower + 64, kRowBytes);
}

// Adds a piece to the sums in `tile` [rows][kPanel], or to nothing if it is the first.
template <bool kInt8>
void add(const Piece& piece, bool first, char* tile) {
  bool two = piece.rows > 16;
  configure(piece.rows);
  if (first)
    zero_sums();
  else
    load_sums(tile, two);
  if (two)
    steps_of_32<kInt8>(piece);
  else
    steps_of_16<kInt8>(piece);
  store_sums(tile, two);
}

void finish(const Packed& w, const Rows& x, char* sums, int first, int rows, int panel,
            const Sink& sink) {
  float* tile = reinterpret_cast<float*>(sums);
  if (w.format == BATON_INT8)
    for (int r = 0; r < rows; r++) {
      float* row = tile + r * kPanel;
      scale(w, panel, x.scales[first + r], _mm512_loadu_si512(row), _mm512_loadu_si512(row + 16), row);
    }
  sink.take(sink.self, tile, first, rows, panel);
}

int rows_from(int first, int end) { return end - first < kTileRows ? end - first : kTileRows; }

// While the rows from `first_row` to `end_row` meet a panel, they ask for the one that comes `next`
// panels later, each tile of rows for its part.
Piece piece_of(const Packed& w, const Rows& x, int panel, int64_t step, int64_t steps, int first,
               int rows, int first_row, int end_row, int next) {
  const char* weights = static_cast<const char*>(w.panels) + panel * w.panel_bytes + step * kStepBytes;
  int tiles = (end_row - first_row + kTileRows - 1) / kTileRows;
  // Where memory is waited for, asking in four places is 1.3 times as fast as in none (in one: 1.15).
  int streams = tiles < kManyRows / kTileRows ? 4 : 1;
  int lines = (32 / streams + tiles - 1) / tiles * streams;
  int64_t part = (first - first_row) / kTileRows;
  const char* ahead = weights + next * w.panel_bytes + part * steps * lines * 64;
  return {weights, static_cast<const char*>(x.data) + first * x.stride + step * 64, x.stride, rows,
          steps, ahead, lines, streams};
}

// Few rows: they stay in the cache while panels stream past them, in pairs if one tile holds them.
template <bool kInt8>
void few_rows(const Packed& w, const Rows& x, int first_panel, int end_panel, const Sink& sink) {
  alignas(64) char tile[kTileRows * kRowBytes];
  int64_t steps = w.panel_bytes / kStepBytes;
  int panel = first_panel;
  for (; x.count <= 16 && panel + 1 < end_panel; panel += 2) {
    configure(x.count);
    zero_sums();
    steps_of_two_panels<kInt8>(piece_of(w, x, panel, 0, steps, 0, x.count, 0, x.count, 1), w.panel_bytes);
    store_sums(tile, true);
    finish(w, x, tile, 0, x.count, panel, sink);
    finish(w, x, tile + 16 * kRowBytes, 0, x.count, panel + 1, sink);
  }
  for (; panel < end_panel; panel++)
    for (int first = 0; first < x.count; first += kTileRows) {
      int rows = rows_from(first, x.count);
      add<kInt8>(piece_of(w, x, panel, 0, steps, first, rows, 0, x.count, 1), true, tile);
      finish(w, x, tile, first, rows, panel, sink);
    }
}

// Where in x and in the panels a piece of a product lies.
struct Block {
  int first_row, end_row;    // of x, which all meet the panels one after another
  int first_panel, panels;   // at most kGroupPanels
  int64_t first_step, steps;
};

// A group of panels stays in the second-level cache while tile after tile of rows passes it, and asks for
// the next group. Part by part of its depth, a tile of rows stays in the first-level cache, with its
// sums, while the panels of the group pass it. So its outputs are neighbours in time as they are in
// memory: whole lines, written once. Of 1 to 28 panels and parts of 6 to 18 steps these were fastest, as
// were tiles of 32 rows among ones of 32 to 64. `sums`: of a panel's tiles of rows one after another if
// they wait there for more steps, `panel_sums` bytes from panel to panel; else of one tile.
template <bool kInt8>
void group(const Packed& w, const Rows& x, const Block& block, char* sums, int64_t panel_sums, bool waits,
           const Sink& sink) {
  int64_t all_steps = w.panel_bytes / kStepBytes, end = block.first_step + block.steps;
  int64_t parts = (block.steps + kPartSteps - 1) / kPartSteps, part = (block.steps + parts - 1) / parts;
  for (int first = block.first_row; first < block.end_row; first += kTileRows) {
    int rows = rows_from(first, block.end_row);
    for (int64_t step = block.first_step; step < end; step += part) {
      int64_t count = end - step < part ? end - step : part;
      for (int i = 0; i < block.panels; i++) {
        int panel = block.first_panel + i;
        Piece piece = piece_of(w, x, panel, step, count, first, rows, block.first_row, block.end_row,
                               kGroupPanels);
        add<kInt8>(piece, step == 0, sums + i * panel_sums);
        if (step + count == all_steps) finish(w, x, sums + i * panel_sums, first, rows, panel, sink);
      }
    }
    if (waits) sums += kTileRows * kRowBytes;
  }
}

template <bool kInt8>
void groups(const Packed& w, const Rows& x, int first_panel, int end_panel, const Sink& sink) {
  alignas(64) char sums[kGroupPanels * kTileRows * kRowBytes];
  int64_t steps = w.panel_bytes / kStepBytes;
  for (int panel = first_panel; panel < end_panel; panel += kGroupPanels) {
    int panels = end_panel - panel < kGroupPanels ? end_panel - panel : kGroupPanels;
    group<kInt8>(w, x, {0, x.count, panel, panels, 0, steps}, sums, kTileRows * kRowBytes, false, sink);
  }
}

// x is larger than the cache: a block of it, some rows and some of their depth, meets several groups of
// panels before the next one. Sums wait in memory meanwhile.
template <bool kInt8>
void blocks(const Packed& w, const Rows& x, int first_row, int end_row, int first_panel, int end_panel,
            const Sink& sink) {
  int64_t steps = w.panel_bytes / kStepBytes;
  int64_t row_count = end_row - first_row;
  int64_t steps_at_once = kBlockBytes / (row_count * 64);
  int64_t sums_bytes = (row_count + kTileRows) * kRowBytes;
  char* sums = static_cast<char*>(scratch(static_cast<size_t>((end_panel - first_panel) * sums_bytes)));
  for (int64_t step = 0; step < steps; step += steps_at_once) {
    int64_t count = steps - step < steps_at_once ? steps - step : steps_at_once;
    for (int panel = first_panel; panel < end_panel; panel += kGroupPanels) {
      int panels = end_panel - panel < kGroupPanels ? end_panel - panel : kGroupPanels;
      group<kInt8>(w, x, {first_row, end_row, panel, panels, step, count},
                   sums + (panel - first_panel) * sums_bytes, sums_bytes, true, sink);
    }
  }
}

template <bool kInt8>
void multiply(const Packed& w, const Rows& x, int first_panel, int count, const Sink& sink) {
  int end_panel = first_panel + count;
  if (x.count < kManyRows) return few_rows<kInt8>(w, x, first_panel, end_panel, sink);
  if (x.count * w.panel_bytes / kPanel <= kRowsInCache)
    return groups<kInt8>(w, x, first_panel, end_panel, sink);
  constexpr int kGroup = kBlockBytes / (kBlockRows * kRowBytes);
  for (int first_row = 0; first_row < x.count; first_row += kBlockRows) {
    int end_row = x.count - first_row < kBlockRows ? x.count : first_row + kBlockRows;
    for (int panel = first_panel; panel < end_panel; panel += kGroup) {
      int group_end = end_panel - panel < kGroup ? end_panel : panel + kGroup;
      blocks<kInt8>(w, x, first_row, end_row, panel, group_end, sink);
    }
  }
}

}  // namespace

void bf16_amx(const Packed& w, const Rows& x, int first, int count, const Sink& sink) {
  if (x.count <= kMostFewRows) return bf16_amx_few(w, x, first, count, sink);
  multiply<false>(w, x, first, count, sink);
}

void int8_amx(const Packed& w, const Rows& x, int first, int count, const Sink& sink) {
  if (x.count <= kMostFewRows) return int8_amx_few(w, x, first, count, sink);
  multiply<true>(w, x, first, count, sink);
}

void begin_amx() { configured_rows = 0; }

// Without its tiles a thread is switched faster.
void end_amx() {
  if (configured_rows != 0) _tile_release();
  configured_rows = 0;
}

}  // namespace baton

#include "target_end.inc"

#endif
