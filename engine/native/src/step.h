// One pass of a model over a batch, on all threads of a team.
//
// The threads go through all layers together. Between two phases they meet; within a phase they share
// tokens (norms, rope), panels (products) or tiles (attention).
#pragma once

#include <cstdint>
#include <vector>

#include "attention.h"
#include "baton.h"
#include "gemm.h"
#include "memory.h"
#include "model.h"
#include "rows.h"
#include "team.h"

namespace baton {

class Step {
 public:
  // Scratch for passes of up to shape.max_tokens. Throws std::bad_alloc.
  Step(const Model& model, Team& team, BatonIsa isa);

  // baton_step. 0, or what `fail` returns; then nothing was read or written.
  int run(const BatonBatch& batch, BatonTimes* times);

 private:
  // Rows as the input of a product.
  struct RowBuffer {
    RowBuffer() = default;
    RowBuffer(Arena& arena, int64_t count, int64_t depth, BatonFormat format);
    char* row(int64_t index) const { return data.as<char>() + index * stride; }
    Rows rows(int count) const;

    Memory data, scales;
    int64_t stride = 0;
    BatonFormat format = BATON_F32;
  };
  // Rows of few tokens, one of each kind for every thread.
  struct Few {
    RowBuffer normed, attended, gated;
  };
  struct Worker;  // one thread in one pass

  int check(const BatonBatch& batch) const;
  int check_sequences(const BatonBatch& batch) const;
  void choose(const BatonBatch& batch) const;

  const Model& model_;
  const BatonShape& shape_;
  Team& team_;
  const RowKernels& rows_;
  const GemmKernels& gemm_;
  Attention attention_;
  int64_t qkv_stride_, queries_;
  Arena memory_;
  Memory residual_;     // [tokens, hidden]
  Memory qkv_;          // [tokens, qkv_stride_]
  RowBuffer normed_;    // [tokens, hidden]
  RowBuffer attended_;  // [tokens, heads * head_dim]
  RowBuffer gated_;     // [tokens, intermediate]
  RowBuffer wanted_;    // [rows, hidden], for the head
  // INT8: rows that are quantized when they are whole.
  Memory attended_floats_, gated_floats_;
  std::vector<Few> few_;
  Memory row_;  // [threads, hidden]
  // The best token of each row among those whose panels a thread has had.
  Memory best_logits_, best_;  // [threads, rows]
};

}  // namespace baton
