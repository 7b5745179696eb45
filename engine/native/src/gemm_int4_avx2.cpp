// int4 weights unpacked with AVX2, and products of few rows.
#include "gemm_int4.h"
#include "int4.h"

#if defined(BATON_X86)

#include <immintrin.h>

#define BATON_TARGET "avx2,fma"
#include "target_begin.inc"

namespace baton {
namespace {

#include "rows_in_tiles.inc"
#include "scale_avx2.inc"

constexpr int64_t kAhead = 2 * kBlockBytes;  // by which weights are prefetched

// See unpack_int4_avx512.inc; 8 columns.
struct Groups {
  __m256i step[2], offset[2];

  Groups(const char* block, int eighth) {
    const __m256i spread = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12));
    BATON_UNROLL
    for (int group = 0; group < 2; group++) {
      const char* from = block + group * kPanel + 8 * eighth;
      __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
      wide = _mm256_shuffle_epi8(wide, spread);
      step[group] = _mm256_and_si256(wide, _mm256_set1_epi16(15));
      offset[group] = _mm256_mullo_epi16(upper(wide), step[group]);
    }
  }

  static __m256i upper(__m256i bytes) {
    return _mm256_and_si256(_mm256_srli_epi16(bytes, 4), _mm256_set1_epi8(15));
  }

  __m256i first(__m256i bytes) const {
    __m256i numbers = _mm256_and_si256(bytes, _mm256_set1_epi8(15));
    return _mm256_sub_epi8(_mm256_mullo_epi16(numbers, step[0]), offset[0]);
  }
  __m256i second(__m256i bytes) const {
    return _mm256_sub_epi8(_mm256_mullo_epi16(upper(bytes), step[1]), offset[1]);
  }
};

inline __m256i load(const char* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

// The sum of 32 bytes in all places.
inline __m256i total_of(const char* bytes) {
  __m256i sums = _mm256_sad_epu8(load(bytes), _mm256_setzero_si256());
  sums = _mm256_add_epi32(sums, _mm256_permute4x64_epi64(sums, _MM_SHUFFLE(1, 0, 3, 2)));
  sums = _mm256_add_epi32(sums, _mm256_shuffle_epi32(sums, _MM_SHUFFLE(1, 0, 3, 2)));
  return _mm256_broadcastd_epi32(_mm256_castsi256_si128(sums));
}

// Numbers without their zero are so small that eight products of theirs fit into 16 bits. Steps come
// after those, and zeros are one product of a group, with the sum of its inputs.
struct Int4 {
  static constexpr int kRows = kFewRowsInt4Avx2;

  template <int R>
  static void tile(const Packed& w, const Rows& x, int panel, int first, float* y) {
    const char* block = panel_of<char>(w, panel);
    const char* rows = row_of(x, first);
    __m256i sums[4][R];  // of 8 columns each
    BATON_UNROLL
    for (int c = 0; c < 4; c++)
      BATON_UNROLL
      for (int r = 0; r < R; r++) sums[c][r] = _mm256_setzero_si256();
    for (int64_t k = 0; k < w.depth; k += kBlockInputs, block += kBlockBytes, rows += kBlockInputs) {
      __m256i totals[2][R];
      BATON_UNROLL
      for (int r = 0; r < R; r++) {
        totals[0][r] = total_of(rows + r * x.stride);
        totals[1][r] = total_of(rows + r * x.stride + kGroup);
      }
      for (int line = 0; line < kBlockBytes / 64; line++)
        _mm_prefetch(block + kAhead + 64 * line, _MM_HINT_T0);
      BATON_UNROLL
      for (int c = 0; c < 4; c++) add<R>(block, c, rows, x.stride, totals, sums[c]);
    }
    BATON_UNROLL
    for (int r = 0; r < R; r++)
      BATON_UNROLL
      for (int c = 0; c < 4; c++)
        scale(w, panel * kPanel + 8 * c, x.scales[first + r], sums[c][r], y + r * kPanel + 8 * c);
  }

  // A block of 8 columns.
  template <int R>
  static void add(const char* block, int eighth, const char* rows, int64_t stride,
                  const __m256i (&totals)[2][R], __m256i (&sums)[R]) {
    const Groups groups(block, eighth);
    const char* numbers = block + 2 * kPanel + 32 * eighth;
    BATON_UNROLL
    for (int half = 0; half < 2; half++) {
      __m256i products[2][R];
      BATON_UNROLL
      for (int r = 0; r < R; r++) products[0][r] = products[1][r] = _mm256_setzero_si256();
      BATON_UNROLL
      for (int line = 4 * half; line < 4 * half + 4; line++) {
        __m256i bytes = load(numbers + line * (4 * kPanel));
        __m256i lower = _mm256_and_si256(bytes, _mm256_set1_epi8(15)), upper = Groups::upper(bytes);
        BATON_UNROLL
        for (int r = 0; r < R; r++) {
          const char* at = rows + r * stride + 4 * line;
          __m256i a = _mm256_set1_epi32(four_bytes(at)), b = _mm256_set1_epi32(four_bytes(at + kGroup));
          products[0][r] = _mm256_add_epi16(products[0][r], _mm256_maddubs_epi16(a, lower));
          products[1][r] = _mm256_add_epi16(products[1][r], _mm256_maddubs_epi16(b, upper));
        }
      }
      BATON_UNROLL
      for (int r = 0; r < R; r++)
        BATON_UNROLL
        for (int g = 0; g < 2; g++)
          sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(products[g][r], groups.step[g]));
    }
    const __m256i byte = _mm256_set1_epi32(255);
    BATON_UNROLL
    for (int g = 0; g < 2; g++) {
      __m256i offset = _mm256_and_si256(groups.offset[g], byte);
      BATON_UNROLL
      for (int r = 0; r < R; r++)
        sums[r] = _mm256_sub_epi32(sums[r], _mm256_madd_epi16(offset, totals[g][r]));
    }
  }
};

}  // namespace

void int4_few_rows_avx2(const Packed& w, const Rows& x, int first, int count, const Sink& sink) {
  rows_in_tiles<Int4>(w, x, first, count, sink);
}

void unpack_avx2(const char* panel, int64_t depth, char* to) {
  constexpr int kLine = 4 * kPanel, kHalf = kGroup * kPanel;
  for (int64_t k = 0; k < depth; k += kBlockInputs, panel += kBlockBytes, to += 2 * kHalf)
    for (int eighth = 0; eighth < kPanel / 8; eighth++) {
      const Groups groups(panel, eighth);
      const char* from = panel + 2 * kPanel + 32 * eighth;
      char* at = to + 32 * eighth;
      for (int line = 0; line < kGroup / 4; line++, from += kLine, at += kLine) {
        __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), groups.first(bytes));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at + kHalf), groups.second(bytes));
      }
    }
}

}  // namespace baton

#include "target_end.inc"

#endif
