// Attention for any processor.
#include "attention_kernels.h"

#define WIDTH 4

namespace baton {
namespace {

#include "rows_vectors.inc"

#include "attention_softmax.inc"

#include "attention_float.inc"

void nothing() {}

}  // namespace

const AttentionKernels attention_portable = {queries, attend, merge, clear, finish, nothing, nothing,
                                         nullptr, nullptr};

}  // namespace baton
