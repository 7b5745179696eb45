#include "gemm.h"

#include "gemm_kernels.h"
#include "memory.h"
#include "team.h"

namespace baton {
namespace {

BatonFormat widened(BatonFormat weights) {
  return weights == BATON_INT8 || weights == BATON_INT4 ? BATON_INT8 : BATON_F32;
}

BatonFormat as_weights(BatonFormat weights) { return weights == BATON_INT4 ? BATON_INT8 : weights; }

void nothing() {}

template <PanelsKernel f32, PanelsKernel bf16, PanelsKernel int8, PanelsKernel int4>
void panels_of(const Packed& w, const Rows& x, int first, int count, const Sink& sink) {
  switch (w.format) {
    case BATON_BF16: return bf16(w, x, first, count, sink);
    case BATON_INT8: return int8(w, x, first, count, sink);
    case BATON_INT4: return int4(w, x, first, count, sink);
    default: return f32(w, x, first, count, sink);
  }
}

template <PanelsKernel f32, PanelsKernel bf16, PanelsKernel int8, PanelsKernel int4>
constexpr GemmKernels kernels_of(BatonFormat (*rows_format)(BatonFormat), void (*begin)() = nothing,
                                 void (*end)() = nothing) {
  return {rows_format, panels_of<f32, bf16, int8, int4>, begin, end};
}

constexpr GemmKernels kPortable =
    kernels_of<f32_portable, bf16_portable, int8_portable, int4_portable>(widened);
#if defined(BATON_X86)
constexpr GemmKernels kAvx2 = kernels_of<f32_avx2, bf16_avx2, int8_avx2, int4_avx2>(widened);
constexpr GemmKernels kAvx512 =
    kernels_of<f32_avx512, bf16_avx512, int8_avx512, int4_avx512>(widened);
#endif
#if defined(BATON_X86_NEW)
constexpr GemmKernels kAvx512Bf16 =
    kernels_of<f32_avx512, bf16_avx512_bf16, int8_avx512_vnni, int4_avx512_vnni>(as_weights);
constexpr GemmKernels kAmx =
    kernels_of<f32_avx512, bf16_amx, int8_amx, int4_amx>(as_weights, begin_amx, end_amx);
#endif

}  // namespace

BatonIsa compiled_isa() {
#if defined(BATON_X86_NEW)
  return BATON_AMX;
#elif defined(BATON_X86)
  return BATON_AVX512;
#else
  return BATON_PORTABLE;
#endif
}

const GemmKernels& gemm_kernels(BatonIsa isa) {
  switch (isa) {
#if defined(BATON_X86_NEW)
    case BATON_AMX: return kAmx;
    case BATON_AVX512_BF16: return kAvx512Bf16;
#endif
#if defined(BATON_X86)
    case BATON_AVX512: return kAvx512;
    case BATON_AVX2: return kAvx2;
#endif
    default: return kPortable;
  }
}

// Panels are handed out in pieces that shrink: long ones first, which memory streams best, single
// ones at the end, so that nobody waits for long. Between them pairs, which kernels like to take.
Panels next_panels(Team& team, int panels, int unit) {
  int units = (panels + unit - 1) / unit, threads = team.threads();
  int index = team.next(units);
  if (index < 0) return {panels, 0};
  if (threads == 1) return index == 0 ? Panels{0, panels} : Panels{panels, 0};
  int first = 0, count = 0;
  for (int i = 0; i <= index; i++) {
    first += count;
    int left = units - first;
    count = left / (2 * threads);
    if (unit == 1) count = left > 2 * threads && count < 2 ? 2 : count / 2 * 2;
    if (count < 1) count = 1;
  }
  if (first >= units) return {panels, 0};  // there are fewer pieces than units
  int end = (first + count) * unit;
  return {first * unit, (end < panels ? end : panels) - first * unit};
}

void multiply(const GemmKernels& kernels, const Packed& w, const Rows& x, Team& team, const Sink& sink) {
  for (Panels mine; (mine = next_panels(team, w.panels_count())).count > 0;)
    kernels.panels(w, x, mine.first, mine.count, sink);
}

int64_t row_stride(int64_t depth, BatonFormat rows) {
  int64_t bytes = depth * (rows == BATON_F32 ? 4 : rows == BATON_INT8 ? 1 : 2);
  return bytes % 512 == 0 ? bytes + 64 : bytes;
}

void* scratch(size_t bytes) {
  thread_local Memory memory;
  if (memory.bytes() < bytes) memory = Memory(bytes);
  return memory.as<void>();
}

}  // namespace baton
