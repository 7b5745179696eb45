// Attention for AVX-512.
#include "attention_kernels.h"

#if BATON_X86

#include <immintrin.h>

#define BATON_TARGET "avx512f,avx512bw,avx512dq,avx512vl"
#include "target_begin.inc"

#define WIDTH 16

namespace baton {
namespace {

#include "rows_vectors.inc"

#include "attention_softmax.inc"

#include "attention_float.inc"

void nothing() {}

}  // namespace

const AttentionKernels attention_avx512 = {queries, attend, merge, clear, finish, nothing, nothing,
                                         nullptr, nullptr};

}  // namespace baton

#include "target_end.inc"

#endif
