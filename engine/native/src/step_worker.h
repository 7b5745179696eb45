// One thread in one pass, for step.cpp alone.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <numeric>
#include <utility>

#include "step.h"

namespace baton {

// From so many tokens per thread on, each takes its own through the products, too. Each reads all
// weights then, but a token's numbers stay in the caches of one core: lines that another core wrote
// cost more than weights that many rows share.
inline constexpr int kOwnTokens = 128;

// Up to so many tokens, each thread prepares the rows of a product for itself: that is shorter than
// sharing them out and meeting.
inline constexpr int kFewTokens = 4;

// A thread's way through a pass. Its sinks are called by the kernels, with `this` as `self`.
struct Step::Worker {
  Worker(Step& step, int thread, const BatonBatch& batch, BatonTimes* times)
      : step(step),
        shape(step.shape_),
        rows(step.rows_),
        batch(batch),
        thread(thread),
        times(thread == 0 ? times : nullptr),
        row(step.row_.as<float>() + int64_t{thread} * shape.hidden),
        best_logits(step.best_logits_.as<float>() + int64_t{thread} * shape.max_tokens),
        best(step.best_.as<int64_t>() + int64_t{thread} * shape.max_tokens) {
    int64_t threads = step.team_.threads();
    own_rows = threads > 1 && batch.tokens >= kOwnTokens * threads;
    few = threads > 1 && batch.tokens <= kFewTokens;
    if (this->times != nullptr) last = now();
  }

  void go() {
    share(batch.tokens, [&](int64_t token) { embed(token); });
    lap(&BatonTimes::embed);
    if (few) meet(&BatonTimes::embed);
    for (int i = 0; i < shape.layers; i++) {
      index = i;
      layer = &step.model_.layers[static_cast<size_t>(i)];
      attend();
      feed_forward();
    }
    find_best();
  }

 private:
  static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  }

  static int64_t bytes_of(BatonFormat format) {
    return format == BATON_F32 ? 4 : format == BATON_BF16 ? 2 : 1;
  }

  void attend() {
    multiply_qkv(norm(BATON_INPUT_NORM));
    meet(&BatonTimes::rope);
    int64_t plane = Attention::plane_bytes(shape);
    LayerKv kv{pool_plane(0, 0), 2 * plane * shape.layers};
    step.attention_.run(step.team_, thread, batch, layer->window, kv, step.qkv_.as<float>(),
                        step.qkv_stride_, {take_attended, this});
    meet(&BatonTimes::attention);
    const RowBuffer& attended = quantized(step.attended_, own().attended, step.attended_floats_,
                                          step.queries_, &BatonTimes::attention);
    multiply(layer->matrices[BATON_OUTPUT], attended, take_output);
    meet_for_rows(&BatonTimes::output);
  }

  void feed_forward() {
    multiply(layer->matrices[BATON_GATE_UP], norm(BATON_MLP_NORM), take_gate_up);
    meet_for_rows(&BatonTimes::gate_up);
    const RowBuffer& gated = quantized(step.gated_, own().gated, step.gated_floats_, shape.intermediate,
                                       &BatonTimes::gate_up);
    multiply(layer->matrices[BATON_DOWN], gated, take_down);
    meet_for_rows(&BatonTimes::down);
  }

  void find_best() {
    std::fill(best, best + batch.rows, -1);
    std::fill(best_logits, best_logits + batch.rows, -INFINITY);
    if (batch.rows == 0) return;
    if (own_rows) meet(&BatonTimes::norm);  // wanted rows are anyone's
    share(batch.rows, [&](int64_t i) {
      norm_row(residual(batch.logit_rows[i]), step.model_.final_norm.data(), step.wanted_, i);
    });
    meet(&BatonTimes::norm);
    step.gemm_.begin();
    baton::multiply(step.gemm_, step.model_.head.view(), step.wanted_.rows(batch.rows), step.team_,
                    {take_logits, this});
    step.gemm_.end();
    meet(&BatonTimes::head);
  }

  // Calls `work` for this thread's share of [0, count), the same in every phase.
  template <typename Work>
  void share(int64_t count, Work work) {
    int threads = step.team_.threads();
    for (int64_t i = count * thread / threads; i < count * (thread + 1) / threads; i++) work(i);
  }

  void lap(double BatonTimes::*part) {
    if (times == nullptr) return;
    double time = now();
    times->*part += time - last;
    last = time;
  }

  void meet(double BatonTimes::*part) {
    lap(part);
    step.team_.meet();
    lap(&BatonTimes::sync);
  }

  // Between phases that share tokens in the same way, products among them if each thread has its own.
  void meet_for_rows(double BatonTimes::*part) { own_rows ? lap(part) : meet(part); }

  // Prepares the tokens' rows for a product: each thread its share, or with few tokens all of them.
  template <typename Work>
  void prepare(double BatonTimes::*part, Work work) {
    if (!few) {
      share(batch.tokens, work);
      return meet_for_rows(part);
    }
    for (int64_t token = 0; token < batch.tokens; token++) work(token);
    lap(part);
  }

  // All tokens times a matrix of this layer, by `unit` panels. Calls `then` after each piece of it.
  template <typename Then>
  void multiply(const PackedMatrix& matrix, const RowBuffer& from,
                void (*take)(void*, const float*, int, int, int), int unit, Then then) {
    Packed packed = matrix.view();
    Rows x = from.rows(batch.tokens);
    step.gemm_.begin();
    if (own_rows) {
      int64_t threads = step.team_.threads(), count = batch.tokens;
      first_row = static_cast<int>(count * thread / threads);
      x.data = from.row(first_row);
      x.scales += first_row;
      x.count = static_cast<int>(count * (thread + 1) / threads) - first_row;
    }
    auto next = [&, all = Panels{0, packed.panels_count()}]() mutable {
      return own_rows ? std::exchange(all, {0, 0}) : next_panels(step.team_, packed.panels_count(), unit);
    };
    for (Panels mine; (mine = next()).count > 0;) {
      step.gemm_.panels(packed, x, mine.first, mine.count, {take, this});
      then(mine, first_row, first_row + x.count);
    }
    step.gemm_.end();
  }

  void multiply(const PackedMatrix& matrix, const RowBuffer& from,
                void (*take)(void*, const float*, int, int, int)) {
    multiply(matrix, from, take, 1, [](Panels, int, int) {});
  }

  // Whole heads at a time, which are then rotated and kept by the thread that has them in its cache.
  void multiply_qkv(const RowBuffer& from) {
    int unit = std::lcm(shape.head_dim, kPanel) / kPanel;
    multiply(layer->matrices[BATON_QKV], from, take_qkv, unit, [&](Panels panels, int first, int end) {
      lap(&BatonTimes::qkv);
      int heads = shape.heads + 2 * shape.kv_heads, begin = panels.first * kPanel / shape.head_dim;
      int behind = std::min(heads, (panels.first + panels.count) * kPanel / shape.head_dim);
      for (int token = first; token < end; token++) rotate_and_keep(token, begin, behind);
      lap(&BatonTimes::rope);
    });
  }

  float* residual(int64_t token) { return step.residual_.as<float>() + token * shape.hidden; }

  void embed(int64_t token) {
    int64_t width = step.model_.embedding_format == BATON_F32 ? 4 : 2;
    const char* table = static_cast<const char*>(step.model_.embedding);
    rows.widen(table + batch.token_ids[token] * shape.hidden * width, step.model_.embedding_format,
               shape.hidden, residual(token));
  }

  // The buffers of this thread, for few tokens.
  const Few& own() const { return step.few_[static_cast<size_t>(thread)]; }

  const RowBuffer& norm(BatonVector weight) {
    const RowBuffer& to = few ? own().normed : step.normed_;
    prepare(&BatonTimes::norm,
            [&](int64_t token) { norm_row(residual(token), layer->vector(weight), to, token); });
    return to;
  }

  void norm_row(const float* from, const float* weight, const RowBuffer& to, int64_t index) {
    rows.norm(from, weight, shape.eps, shape.hidden, row);
    rows.narrow(row, shape.hidden, to.format, to.row(index), to.scales.as<float>() + index);
  }

  // Whole rows of floats as the INT8 rows of a product; the other formats are in `all` already.
  const RowBuffer& quantized(const RowBuffer& all, const RowBuffer& own, const Memory& from, int64_t width,
                             double BatonTimes::*part) {
    if (all.format != BATON_INT8) return all;
    const RowBuffer& to = few ? own : all;
    prepare(part, [&](int64_t token) {
      rows.narrow(from.as<float>() + token * width, static_cast<int>(width), BATON_INT8, to.row(token),
                  to.scales.as<float>() + token);
    });
    return to;
  }

  char* pool_plane(int64_t block, int which) {
    int64_t plane = Attention::plane_bytes(shape);
    return static_cast<char*>(batch.kv) + ((block * shape.layers + index) * 2 + which) * plane;
  }

  // Heads from `begin` to `end`: queries come first, then keys, then values.
  void rotate_and_keep(int64_t token, int begin, int end) {
    const float* rotation = batch.rotations + int64_t{batch.rotation_rows[token]} * shape.head_dim;
    float* at = step.qkv_.as<float>() + token * step.qkv_stride_ + int64_t{begin} * shape.head_dim;
    int values = shape.heads + shape.kv_heads;
    for (int head = begin; head < end; head++, at += shape.head_dim) {
      if (head >= values) {
        keep(at, token, head - values, 1);
        continue;
      }
      const float* weight = layer->vector(head < shape.heads ? BATON_Q_NORM : BATON_K_NORM);
      if (weight != nullptr) rows.norm(at, weight, shape.eps, shape.head_dim, at);
      rows.rotate(at, rotation, shape.head_dim);
      if (head >= shape.heads) keep(at, token, head - shape.heads, 0);
    }
  }

  // Keys (0) or values (1) of one head into the pool.
  void keep(const float* from, int64_t token, int head, int which) {
    int64_t slot = batch.slots[token], rows_of_plane = int64_t{shape.block_size} * shape.kv_heads;
    char* plane = pool_plane(slot / shape.block_size, which);
    int64_t at = slot % shape.block_size * shape.kv_heads + head;
    auto format = static_cast<BatonFormat>(shape.kv);
    int64_t bytes = shape.head_dim * bytes_of(format);
    float* scale = reinterpret_cast<float*>(plane + rows_of_plane * bytes) + at;
    rows.keep(from, shape.head_dim, format, plane + at * bytes, scale);
  }

  static void take_attended(void* self, const float* mixed, int token, int kv_head) {
    Worker& worker = *static_cast<Worker*>(self);
    int64_t width = worker.step.queries_ / worker.shape.kv_heads, column = width * kv_head;
    const RowBuffer& to = worker.step.attended_;
    if (to.format == BATON_INT8)
      std::memcpy(worker.step.attended_floats_.as<float>() + token * worker.step.queries_ + column, mixed,
                  static_cast<size_t>(width) * sizeof(float));
    else
      worker.rows.narrow(mixed, static_cast<int>(width), to.format,
                         to.row(token) + column * bytes_of(to.format), nullptr);
  }

  static void take_qkv(void* self, const float* tile, int first, int count, int panel) {
    Worker& worker = *static_cast<Worker*>(self);
    first += worker.first_row;
    int64_t width = worker.step.queries_ + 2 * int64_t{worker.shape.kv_heads} * worker.shape.head_dim;
    int64_t column = int64_t{panel} * kPanel, stride = worker.step.qkv_stride_;
    const float* bias = worker.layer->vector(BATON_QKV_BIAS);
    worker.rows.copy(tile, count, columns_of(width, column), bias ? bias + column : nullptr,
                     worker.step.qkv_.as<float>() + first * stride + column, stride);
  }

  void add_to_residual(const float* tile, int first, int count, int panel, const float* bias) {
    int64_t column = int64_t{panel} * kPanel;
    rows.add(tile, count, columns_of(shape.hidden, column), bias ? bias + column : nullptr,
             residual(first) + column, shape.hidden);
  }

  static void take_output(void* self, const float* tile, int first, int count, int panel) {
    Worker& worker = *static_cast<Worker*>(self);
    first += worker.first_row;
    worker.add_to_residual(tile, first, count, panel, worker.layer->vector(BATON_OUTPUT_BIAS));
  }

  static void take_down(void* self, const float* tile, int first, int count, int panel) {
    Worker& worker = *static_cast<Worker*>(self);
    first += worker.first_row;
    worker.add_to_residual(tile, first, count, panel, worker.layer->vector(BATON_DOWN_BIAS));
  }

  static void take_gate_up(void* self, const float* tile, int first, int count, int panel) {
    Worker& worker = *static_cast<Worker*>(self);
    first += worker.first_row;
    const BatonShape& shape = worker.shape;
    int64_t column = int64_t{panel} * (kPanel / 2);
    const float* bias = worker.layer->vector(BATON_GATE_UP_BIAS);
    const RowBuffer& rows = worker.step.gated_;
    bool later = rows.format == BATON_INT8;
    BatonFormat format = later ? BATON_F32 : rows.format;
    int64_t stride = later ? int64_t{shape.intermediate} * 4 : rows.stride;
    char* to = later ? worker.step.gated_floats_.as<char>() : rows.data.as<char>();
    worker.rows.gate(static_cast<BatonActivation>(shape.activation), tile, count,
                     bias ? bias + column : nullptr, bias ? bias + shape.intermediate + column : nullptr,
                     format, to + first * stride + column * bytes_of(format), stride);
  }

  // Panels come in rising order, so the lowest of equal tokens is seen first.
  static void take_logits(void* self, const float* tile, int first, int count, int panel) {
    Worker& worker = *static_cast<Worker*>(self);
    int64_t column = int64_t{panel} * kPanel;
    int columns = columns_of(worker.shape.vocabulary, column);
    float largest[kTileRows];
    worker.rows.largest(tile, count, largest);
    for (int r = 0; r < count; r++, tile += kPanel) {
      int i = first + r, target = worker.batch.logit_targets[i];
      if (target >= 0)
        std::memcpy(worker.batch.logits + int64_t{target} * worker.shape.vocabulary + column, tile,
                    static_cast<size_t>(columns) * sizeof(float));
      if (largest[r] > worker.best_logits[i] || worker.best[i] < 0)
        for (int c = 0; c < columns; c++) worker.consider(i, column + c, tile[c]);
    }
  }

  void consider(int i, int64_t token, float logit) {
    if (!(logit > best_logits[i]) && (best[i] >= 0 || std::isnan(logit))) return;
    best[i] = token;
    best_logits[i] = logit;
  }

  static int columns_of(int64_t width, int64_t column) {
    return static_cast<int>(std::min<int64_t>(kPanel, width - column));
  }

  Step& step;
  const BatonShape& shape;
  const RowKernels& rows;
  const BatonBatch& batch;
  const int thread;
  BatonTimes* const times;
  double last = 0;
  const LayerWeights* layer = nullptr;
  int index = 0;  // of the layer
  bool own_rows, few;
  int first_row = 0;  // of the rows that this thread multiplies
  float* const row;  // of floats, before they are narrowed
  float* const best_logits;
  int64_t* const best;
};

}  // namespace baton
