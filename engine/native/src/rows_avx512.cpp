// Row kernels for AVX-512.
#include "numbers.h"
#include "rows_kernels.h"

#if BATON_X86

#include <immintrin.h>

#define BATON_TARGET "avx512f,avx512bw,avx512dq,avx512vl"
#include "target_begin.inc"

#define WIDTH 16

namespace baton {
namespace {

#include "rows_vectors.inc"

#include "rows.inc"

}  // namespace

const RowKernels rows_avx512 = {widen, norm, narrow, keep, rotate, add, copy, gate, largest};

}  // namespace baton

#include "target_end.inc"

#endif  // BATON_X86
