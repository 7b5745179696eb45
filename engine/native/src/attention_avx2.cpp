// Attention for AVX2 with FMA.
#include "attention_kernels.h"

#if BATON_X86

#define BATON_TARGET "avx2,fma"
#include "target_begin.inc"

#define WIDTH 8

namespace baton {
namespace {

#include "rows_vectors.inc"

#include "attention_softmax.inc"

#include "attention_float.inc"

void nothing() {}

}  // namespace

const AttentionKernels attention_avx2 = {queries, attend, merge, clear, finish, nothing, nothing,
                                         nullptr, nullptr};

}  // namespace baton

#include "target_end.inc"

#endif
