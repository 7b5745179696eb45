// int4 weights as int8 ones: some panels are unpacked into a buffer that stays in the cache, and the int8
// kernels take them from there. Sums of integers are exact, so this and the kernels that multiply four bits
// at a time give the same bits.
#include "gemm_int4.h"

#include <algorithm>

#include "int4.h"
#include "memory.h"

namespace baton {
namespace {

constexpr int kManyRows = 128;                // of x: panels are used in groups then
constexpr int64_t kGroupBytes = 512 << 10;    // of int8 weights

char* buffer(int64_t bytes) {
  thread_local Memory memory;
  if (static_cast<int64_t>(memory.bytes()) < bytes) memory = Memory(static_cast<size_t>(bytes));
  return memory.as<char>();
}

}  // namespace

void through_int8(const Packed& w, const Rows& x, int first, int count, const Sink& sink,
                  UnpackPanel unpack, PanelsKernel int8) {
  Packed wide = w;
  wide.format = BATON_INT8;
  wide.panel_bytes = w.depth * kPanel;
  int64_t fit = x.count < kManyRows ? 1 : std::max<int64_t>(1, kGroupBytes / wide.panel_bytes);
  int size = static_cast<int>(std::min<int64_t>(fit, count));
  char* panels = buffer(size * wide.panel_bytes);
  for (int end = first + count; first < end; first += size) {
    int now = std::min(size, end - first);
    for (int i = 0; i < now; i++)
      unpack(static_cast<const char*>(w.panels) + (first + i) * w.panel_bytes, w.depth,
             panels + i * wide.panel_bytes);
    // Panels keep their numbers, by which sinks and scales know them.
    wide.panels = panels - first * wide.panel_bytes;
    int8(wide, x, first, now, sink);
  }
}

void unpack_portable(const char* panel, int64_t depth, char* to) {
  constexpr int kLine = 4 * kPanel;
  for (int64_t k = 0; k < depth; k += kBlockInputs, panel += kBlockBytes, to += kBlockInputs * kPanel) {
    const auto* groups = reinterpret_cast<const uint8_t*>(panel);
    const uint8_t* numbers = groups + 2 * kPanel;
    for (int half = 0; half < 2; half++)
      for (int i = 0; i < kGroup * kPanel; i++) {
        int group = groups[half * kPanel + i % kLine / 4];
        int number = half == 0 ? numbers[i] & 15 : numbers[i] >> 4;
        to[half * kGroup * kPanel + i] = static_cast<char>((number - (group >> 4)) * (group & 15));
      }
  }
}

void int4_portable(const Packed& w, const Rows& x, int first, int count, const Sink& sink) {
  through_int8(w, x, first, count, sink, unpack_portable, int8_portable);
}

#if defined(BATON_X86)

void int4_avx2(const Packed& w, const Rows& x, int first, int count, const Sink& sink) {
  if (x.count <= kFewRowsInt4Avx2) return int4_few_rows_avx2(w, x, first, count, sink);
  through_int8(w, x, first, count, sink, unpack_avx2, int8_avx2);
}

void int4_avx512(const Packed& w, const Rows& x, int first, int count, const Sink& sink) {
  if (x.count <= kFewRowsInt4Avx2) return int4_few_rows_avx2(w, x, first, count, sink);
  through_int8(w, x, first, count, sink, unpack_avx512, int8_avx512);
}

#endif
#if defined(BATON_X86_NEW)

void int4_avx512_vnni(const Packed& w, const Rows& x, int first, int count, const Sink& sink) {
  if (x.count <= kFewRowsInt4) return int4_few_rows_vnni(w, x, first, count, sink);
  through_int8(w, x, first, count, sink, unpack_avx512, int8_avx512_vnni);
}

void int4_amx(const Packed& w, const Rows& x, int first, int count, const Sink& sink) {
  if (x.count <= kFewRowsInt4) return int4_few_rows_vnni(w, x, first, count, sink);
  through_int8(w, x, first, count, sink, unpack_avx512, int8_amx);
}

#endif

}  // namespace baton
