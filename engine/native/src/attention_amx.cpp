// Attention for AMX tiles.
#include "attention_kernels.h"

#if BATON_X86_NEW

#include <immintrin.h>

#define BATON_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16"
#include "target_begin.inc"

#define WIDTH 16

namespace baton {
namespace {

#include "rows_vectors.inc"

#include "attention_softmax.inc"

#include "attention_bf16.inc"

struct alignas(64) Configuration {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Not a local one: compilers think that only its first bytes are read.
constexpr Configuration kConfiguration;

void begin() { _tile_loadconfig(&kConfiguration); }

void end() { _tile_release(); }

// Two blocks of 16 rows times two of 16 columns: tiles 0 to 3 are sums, 4 and 5 rows, 6 and 7 columns.
// Rows past the last one are read and written too: scratch has room for them.
void products(int rows, const uint16_t* x, int64_t x_stride, const uint16_t* w, int64_t w_step,
              int64_t w_block, int depth, int blocks, float* y, int64_t y_stride) {
  int64_t x_bytes = 2 * x_stride, w_bytes = 2 * w_step, y_bytes = 4 * y_stride;
  for (int b = 0; b < blocks; b += 2) {
    const uint16_t* columns = w + b * w_block;
    bool right = b + 1 < blocks;
    for (int r = 0; r < rows; r += 32) {
      const uint16_t* upper = x + r * x_stride;
      const uint16_t* lower = upper + 16 * x_stride;
      float* to = y + r * y_stride + b * 16;
      bool both = r + 16 < rows;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int k = 0; k < depth; k += 32) {
        const uint16_t* at = columns + k / 2 * w_step;
        _tile_loadd(6, at, w_bytes);
        _tile_loadd(4, upper + k, x_bytes);
        _tile_dpbf16ps(0, 4, 6);
        if (both) {
          _tile_loadd(5, lower + k, x_bytes);
          _tile_dpbf16ps(2, 5, 6);
        }
        if (right) {
          _tile_loadd(7, at + w_block, w_bytes);
          _tile_dpbf16ps(1, 4, 7);
          if (both) _tile_dpbf16ps(3, 5, 7);
        }
      }
      _tile_stored(0, to, y_bytes);
      if (right) _tile_stored(1, to + 16, y_bytes);
      if (both) _tile_stored(2, to + 16 * y_stride, y_bytes);
      if (both && right) _tile_stored(3, to + 16 * y_stride + 16, y_bytes);
    }
  }
}

#include "attention_decode_amx.inc"

}  // namespace

const AttentionKernels attention_amx = {queries, attend, merge, clear, finish, begin, end,
                                        decode_queries, decode};

}  // namespace baton

#include "target_end.inc"

#endif
