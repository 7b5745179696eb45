// Row kernels for AVX-512 with BF16.
#include "numbers.h"
#include "rows_kernels.h"

#if BATON_X86_NEW

#include <immintrin.h>

#define BATON_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"
#include "target_begin.inc"

#define WIDTH 16
#define BATON_NATIVE_BF16 1

namespace baton {
namespace {

#include "rows_vectors.inc"

#include "rows.inc"

}  // namespace

const RowKernels rows_avx512_bf16 = {widen, norm, narrow, keep, rotate, add, copy, gate, largest};

}  // namespace baton

#include "target_end.inc"

#endif  // BATON_X86_NEW
