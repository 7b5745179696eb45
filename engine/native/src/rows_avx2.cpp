// Row kernels for AVX2 with FMA.
#include "numbers.h"
#include "rows_kernels.h"

#if BATON_X86

#define BATON_TARGET "avx2,fma"
#include "target_begin.inc"

#define WIDTH 8

namespace baton {
namespace {

#include "rows_vectors.inc"

#include "rows.inc"

}  // namespace

const RowKernels rows_avx2 = {widen, norm, narrow, keep, rotate, add, copy, gate, largest};

}  // namespace baton

#include "target_end.inc"

#endif  // BATON_X86
