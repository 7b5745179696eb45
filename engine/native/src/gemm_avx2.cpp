// AVX2 with FMA: float32, bfloat16 weights that are widened in registers, and exact int8.
#include "gemm_kernels.h"

#if defined(BATON_X86)

#include <immintrin.h>

#include <cstdint>

#define BATON_TARGET "avx2,fma"
#include "target_begin.inc"

namespace baton {
namespace {

#include "rows_in_tiles.inc"
#include "scale_avx2.inc"

template <int R>
inline void store(const __m256 (&sums)[R][4], float* y) {
  BATON_UNROLL
  for (int r = 0; r < R; r++)
    BATON_UNROLL
    for (int c = 0; c < 4; c++) _mm256_storeu_ps(y + r * kPanel + 8 * c, sums[r][c]);
}

struct F32 {
  static constexpr int kRows = 3;

  template <int R>
  static void tile(const Packed& w, const Rows& x, int panel, int first, float* y) {
    const float* weights = panel_of<float>(w, panel);
    const char* rows = row_of(x, first);
    __m256 sums[R][4];
    BATON_UNROLL
    for (int r = 0; r < R; r++)
      BATON_UNROLL
      for (int c = 0; c < 4; c++) sums[r][c] = _mm256_setzero_ps();
    for (int64_t k = 0; k < w.depth; k++, weights += kPanel, rows += 4) {
      __m256 a[R];
      BATON_UNROLL
      for (int r = 0; r < R; r++) a[r] = _mm256_set1_ps(one_float(rows + r * x.stride));
      BATON_UNROLL
      for (int c = 0; c < 4; c++) {
        __m256 b = _mm256_loadu_ps(weights + 8 * c);
        BATON_UNROLL
        for (int r = 0; r < R; r++) sums[r][c] = _mm256_fmadd_ps(a[r], b, sums[r][c]);
      }
    }
    store(sums, y);
  }
};

struct Bf16 {
  static constexpr int kRows = 3;

  // The even inputs are the lower halves of 32 bits, the odd ones the upper halves.
  template <int R>
  static void tile(const Packed& w, const Rows& x, int panel, int first, float* y) {
    const char* weights = panel_of<char>(w, panel);
    const char* rows = row_of(x, first);
    const __m256i upper = _mm256_set1_epi32(-65536);
    __m256 sums[R][4];
    BATON_UNROLL
    for (int r = 0; r < R; r++)
      BATON_UNROLL
      for (int c = 0; c < 4; c++) sums[r][c] = _mm256_setzero_ps();
    for (int64_t k = 0; k < w.depth; k += 2, weights += 4 * kPanel, rows += 8) {
      BATON_UNROLL
      for (int c = 0; c < 4; c++) {
        __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights + 32 * c));
        __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
        __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, upper));
        BATON_UNROLL
        for (int r = 0; r < R; r++) {
          const char* row = rows + r * x.stride;
          sums[r][c] = _mm256_fmadd_ps(_mm256_set1_ps(one_float(row)), even, sums[r][c]);
          sums[r][c] = _mm256_fmadd_ps(_mm256_set1_ps(one_float(row + 4)), odd, sums[r][c]);
        }
      }
    }
    store(sums, y);
  }
};

// Adds up the two halves that a column's sums are in.
inline __m256i pairs_added(__m256i left, __m256i right) {
  return _mm256_permute4x64_epi64(_mm256_hadd_epi32(left, right), _MM_SHUFFLE(3, 1, 2, 0));
}

// A product of uint8 and int8 fits into 16 bits and the sum of two into 32 (vpmaddwd). The shorter
// vpmaddubsw saturates at 16 bits.
struct Int8 {
  static constexpr int kRows = 3;

  template <int R>
  static void tile(const Packed& w, const Rows& x, int panel, int first, float* y) {
    half<R>(w, x, panel, first, y, 0);
    half<R>(w, x, panel, first, y, kPanel / 2);
  }

  // 16 columns: the registers do not suffice for more.
  template <int R>
  static void half(const Packed& w, const Rows& x, int panel, int first, float* y, int column) {
    const char* weights = panel_of<char>(w, panel) + 4 * column;
    const char* rows = row_of(x, first);
    __m256i sums[R][4];  // 4 columns each, two sums per column
    BATON_UNROLL
    for (int r = 0; r < R; r++)
      BATON_UNROLL
      for (int c = 0; c < 4; c++) sums[r][c] = _mm256_setzero_si256();
    for (int64_t k = 0; k < w.depth; k += 4, weights += 4 * kPanel, rows += 4) {
      __m256i a[R];
      BATON_UNROLL
      for (int r = 0; r < R; r++)
        a[r] = _mm256_cvtepu8_epi16(_mm_set1_epi32(four_bytes(rows + r * x.stride)));
      BATON_UNROLL
      for (int c = 0; c < 4; c++) {
        __m256i wide = _mm256_cvtepi8_epi16(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(weights + 16 * c)));
        BATON_UNROLL
        for (int r = 0; r < R; r++)
          sums[r][c] = _mm256_add_epi32(sums[r][c], _mm256_madd_epi16(a[r], wide));
      }
    }
    BATON_UNROLL
    for (int r = 0; r < R; r++)
      BATON_UNROLL
      for (int c = 0; c < 2; c++)
        scale(w, panel * kPanel + column + 8 * c, x.scales[first + r],
              pairs_added(sums[r][2 * c], sums[r][2 * c + 1]), y + r * kPanel + column + 8 * c);
  }
};

}  // namespace

void f32_avx2(const Packed& w, const Rows& x, int first, int count, const Sink& sink) {
  rows_in_tiles<F32>(w, x, first, count, sink);
}

void bf16_avx2(const Packed& w, const Rows& x, int first, int count, const Sink& sink) {
  rows_in_tiles<Bf16>(w, x, first, count, sink);
}

void int8_avx2(const Packed& w, const Rows& x, int first, int count, const Sink& sink) {
  rows_in_tiles<Int8>(w, x, first, count, sink);
}

}  // namespace baton

#include "target_end.inc"

#endif
