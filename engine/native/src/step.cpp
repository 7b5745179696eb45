#include "step.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "error.h"
#include "step_worker.h"

namespace baton {
namespace {

Memory floats(Arena& arena, int64_t count) {
  return arena.take(static_cast<size_t>(count) * sizeof(float));
}

}  // namespace

Step::RowBuffer::RowBuffer(Arena& arena, int64_t count, int64_t depth, BatonFormat format)
    : data(arena.take(static_cast<size_t>(count * row_stride(depth, format)))),
      scales(floats(arena, count)),
      stride(row_stride(depth, format)),
      format(format) {}

Rows Step::RowBuffer::rows(int count) const {
  return {data.as<void>(), stride, scales.as<float>(), count};
}

Step::Step(const Model& model, Team& team, BatonIsa isa)
    : model_(model),
      shape_(model.shape),
      team_(team),
      rows_(row_kernels(isa)),
      gemm_(gemm_kernels(isa)),
      attention_(model.shape, isa, team.threads()),
      queries_(int64_t{model.shape.heads} * model.shape.head_dim) {
  int64_t tokens = shape_.max_tokens, threads = team.threads();
  auto depth = [&](BatonMatrix matrix) { return model.layers[0].matrices[matrix].view().depth; };
  int64_t qkv = queries_ + 2 * int64_t{shape_.kv_heads} * shape_.head_dim;
  qkv_stride_ = (qkv + kPanel - 1) / kPanel * kPanel;
  BatonFormat format = gemm_.rows_format(static_cast<BatonFormat>(shape_.weights));
  residual_ = floats(memory_, tokens * shape_.hidden);
  qkv_ = floats(memory_, tokens * qkv_stride_);
  normed_ = RowBuffer(memory_, tokens, depth(BATON_QKV), format);
  attended_ = RowBuffer(memory_, tokens, depth(BATON_OUTPUT), format);
  gated_ = RowBuffer(memory_, tokens, depth(BATON_DOWN), format);
  wanted_ = RowBuffer(memory_, tokens, model.head.view().depth,
                      gemm_.rows_format(static_cast<BatonFormat>(shape_.head)));
  int64_t few = std::min<int64_t>(tokens, kFewTokens);
  for (int64_t thread = 0; thread < threads; thread++)
    few_.push_back({RowBuffer(memory_, few, depth(BATON_QKV), format), RowBuffer(memory_, few, depth(BATON_OUTPUT), format),
                    RowBuffer(memory_, few, depth(BATON_DOWN), format)});
  if (format == BATON_INT8) {
    attended_floats_ = floats(memory_, tokens * queries_);
    gated_floats_ = floats(memory_, tokens * shape_.intermediate);
  }
  row_ = floats(memory_, threads * shape_.hidden);
  best_logits_ = floats(memory_, threads * tokens);
  best_ = memory_.take(static_cast<size_t>(threads * tokens) * sizeof(int64_t));
}

int Step::run(const BatonBatch& batch, BatonTimes* times) {
  if (int error = model_.check()) return error;
  if (int error = check(batch)) return error;
  if (batch.tokens == 0) return 0;
  attention_.plan(batch, model_.layers);
  if (times != nullptr) *times = {};
  team_.run([&](int thread) { Worker(*this, thread, batch, times).go(); });
  choose(batch);
  return 0;
}

void Step::choose(const BatonBatch& batch) const {
  for (int i = 0; i < batch.rows; i++) {
    batch.best[i] = -1;
    batch.best_logits[i] = -INFINITY;
    for (int thread = 0; thread < team_.threads(); thread++) {
      int64_t at = int64_t{thread} * shape_.max_tokens + i, token = best_.as<int64_t>()[at];
      float logit = best_logits_.as<float>()[at];
      bool better = batch.best[i] < 0 || logit > batch.best_logits[i] ||
                    (logit == batch.best_logits[i] && token < batch.best[i]);
      if (token < 0 || !better) continue;
      batch.best[i] = token;
      batch.best_logits[i] = logit;
    }
  }
}

int Step::check(const BatonBatch& batch) const {
  if (batch.tokens < 0 || batch.tokens > shape_.max_tokens)
    return fail("a pass of " + std::to_string(batch.tokens) + " tokens; scratch is for " +
                std::to_string(shape_.max_tokens));
  if (batch.rows < 0 || batch.rows > shape_.max_tokens) return fail("too many rows of logits");
  for (int i = 0; i < batch.tokens; i++) {
    if (batch.token_ids[i] < 0 || batch.token_ids[i] >= shape_.vocabulary)
      return fail("token " + std::to_string(batch.token_ids[i]) + " is not in the vocabulary");
    if (batch.slots[i] < 0 || batch.rotation_rows[i] < 0) return fail("a negative slot or rotation");
  }
  for (int i = 0; i < batch.rows; i++) {
    if (batch.logit_rows[i] < 0 || batch.logit_rows[i] >= batch.tokens)
      return fail("logits of a row that the pass lacks");
    if (batch.logit_targets[i] >= 0 && batch.logits == nullptr) return fail("nowhere to write logits to");
  }
  return check_sequences(batch);
}

int Step::check_sequences(const BatonBatch& batch) const {
  int64_t tokens = 0;
  for (int s = 0; s < batch.sequences; s++) {
    if (batch.starts[s] < 0 || batch.lengths[s] < 1) return fail("an empty or negative chunk");
    tokens += batch.lengths[s];
    int64_t blocks = (int64_t{batch.starts[s]} + batch.lengths[s] - 1) / shape_.block_size + 1;
    if (blocks > batch.width) return fail("a block table that is too short");
    for (int64_t i = 0; i < blocks; i++)
      if (batch.tables[s * int64_t{batch.width} + i] < 0) return fail("a negative block");
  }
  return tokens == batch.tokens ? 0 : fail("chunks that do not make up the pass");
}

}  // namespace baton
