#include "rows.h"

#include "rows_kernels.h"

namespace baton {

const RowKernels& row_kernels(BatonIsa isa) {
#if BATON_X86_NEW
  if (isa >= BATON_AVX512_BF16) return rows_avx512_bf16;
#endif
#if BATON_X86
  if (isa >= BATON_AVX512) return rows_avx512;
  if (isa >= BATON_AVX2) return rows_avx2;
#endif
  static_cast<void>(isa);
  return rows_portable;
}

}  // namespace baton
