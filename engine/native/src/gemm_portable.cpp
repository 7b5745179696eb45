// Kernels for any processor, in plain C++ that compilers vectorize.
#include <bit>

#include "gemm_kernels.h"

namespace baton {
namespace {

constexpr int kRows = 4;

// Adds R rows of x times a panel to y.
template <typename W, typename X, typename Y>
using Tile = void (*)(const W* w, const X* const* x, int64_t depth, Y (*y)[kPanel]);

template <int R>
void f32_tile(const float* w, const float* const* x, int64_t depth, float (*y)[kPanel]) {
  for (int64_t k = 0; k < depth; k++, w += kPanel)
    for (int r = 0; r < R; r++) {
      float a = x[r][k];
#pragma omp simd
      for (int c = 0; c < kPanel; c++) y[r][c] += a * w[c];
    }
}

template <int R>
void bf16_tile(const uint32_t* w, const float* const* x, int64_t depth, float (*y)[kPanel]) {
  for (int64_t k = 0; k < depth; k += 2, w += kPanel)
    for (int r = 0; r < R; r++) {
      float a = x[r][k], b = x[r][k + 1];
#pragma omp simd
      for (int c = 0; c < kPanel; c++) {
        y[r][c] += a * std::bit_cast<float>(w[c] << 16);
        y[r][c] += b * std::bit_cast<float>(w[c] & 0xffff0000u);
      }
    }
}

template <int R>
void int8_tile(const int8_t* w, const uint8_t* const* x, int64_t depth, int32_t (*y)[kPanel]) {
  for (int64_t k = 0; k < depth; k += 4, w += 4 * kPanel)
    for (int r = 0; r < R; r++) {
      const uint8_t* a = x[r] + k;
#pragma omp simd
      for (int c = 0; c < kPanel; c++)
        y[r][c] += a[0] * w[4 * c] + a[1] * w[4 * c + 1] + a[2] * w[4 * c + 2] + a[3] * w[4 * c + 3];
    }
}

// One panel: `full` takes kRows rows, `single` one, `finish` their sums.
template <typename W, typename X, typename Y, typename Finish>
void in_tiles(const Packed& w, const Rows& x, int panel, Tile<W, X, Y> full, Tile<W, X, Y> single,
              Finish finish) {
  const char* weights = static_cast<const char*>(w.panels) + panel * w.panel_bytes;
  for (int first = 0; first < x.count;) {
    int rows = x.count - first >= kRows ? kRows : 1;
    const X* from[kRows];
    for (int r = 0; r < rows; r++)
      from[r] = reinterpret_cast<const X*>(static_cast<const char*>(x.data) + (first + r) * x.stride);
    alignas(64) Y tile[kRows][kPanel] = {};
    (rows == kRows ? full : single)(reinterpret_cast<const W*>(weights), from, w.depth, tile);
    finish(tile, first, rows);
    first += rows;
  }
}

template <typename W>
void floats(const Packed& w, const Rows& x, int panel, const Sink& sink, Tile<W, float, float> full,
            Tile<W, float, float> single) {
  in_tiles<W, float, float>(w, x, panel, full, single,
                            [&](float (*tile)[kPanel], int first, int rows) {
                              sink.take(sink.self, tile[0], first, rows, panel);
                            });
}

void int8_panel(const Packed& w, const Rows& x, int panel, const Sink& sink) {
  const float* scales = w.scales + panel * kPanel;
  const int32_t* sums = w.sums + panel * kPanel;
  in_tiles<int8_t, uint8_t, int32_t>(
      w, x, panel, int8_tile<kRows>, int8_tile<1>,
      [&](int32_t (*tile)[kPanel], int first, int rows) {
        alignas(64) float scaled[kRows][kPanel];
        for (int r = 0; r < rows; r++)
          for (int c = 0; c < kPanel; c++)
            scaled[r][c] = static_cast<float>(tile[r][c] - sums[c]) * (scales[c] * x.scales[first + r]);
        sink.take(sink.self, scaled[0], first, rows, panel);
      });
}

}  // namespace

void f32_portable(const Packed& w, const Rows& x, int first, int count, const Sink& sink) {
  for (int panel = first; panel < first + count; panel++)
    floats<float>(w, x, panel, sink, f32_tile<kRows>, f32_tile<1>);
}

void bf16_portable(const Packed& w, const Rows& x, int first, int count, const Sink& sink) {
  for (int panel = first; panel < first + count; panel++)
    floats<uint32_t>(w, x, panel, sink, bf16_tile<kRows>, bf16_tile<1>);
}

void int8_portable(const Packed& w, const Rows& x, int first, int count, const Sink& sink) {
  for (int panel = first; panel < first + count; panel++) int8_panel(w, x, panel, sink);
}

}  // namespace baton
