#include "step.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <string>

#include "error.h"

namespace baton {
namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

int64_t bytes_of(BatonFormat format) {
  return format == BATON_F32 ? 4 : format == BATON_BF16 ? 2 : 1;
}

// From so many tokens per thread on, each takes its own through the products, too. Each reads all
// weights then, but a token's numbers stay in the caches of one core: lines that another core wrote
// cost more than weights that many rows share.
constexpr int kOwnTokens = 128;

Memory floats(int64_t count) { return Memory(static_cast<size_t>(count) * sizeof(float)); }

}  // namespace

Step::RowBuffer::RowBuffer(int64_t count, int64_t depth, BatonFormat format)
    : data(static_cast<size_t>(count * depth * bytes_of(format))),
      scales(floats(count)),
      stride(depth * bytes_of(format)),
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
  residual_ = floats(tokens * shape_.hidden);
  qkv_ = floats(tokens * qkv_stride_);
  normed_ = RowBuffer(tokens, depth(BATON_QKV), format);
  attended_ = RowBuffer(tokens, depth(BATON_OUTPUT), format);
  gated_ = RowBuffer(tokens, depth(BATON_DOWN), format);
  wanted_ = RowBuffer(tokens, model.head.view().depth,
                      gemm_.rows_format(static_cast<BatonFormat>(shape_.head)));
  if (format == BATON_INT8) {
    attended_floats_ = floats(tokens * queries_);
    gated_floats_ = floats(tokens * shape_.intermediate);
  }
  row_ = floats(threads * shape_.hidden);
  best_logits_ = floats(threads * tokens);
  best_ = Memory(static_cast<size_t>(threads * tokens) * sizeof(int64_t));
}

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
    if (this->times != nullptr) last = now();
  }

  void go() {
    share(batch.tokens, [&](int64_t token) { embed(token); });
    lap(&BatonTimes::embed);
    for (int i = 0; i < shape.layers; i++) {
      index = i;
      layer = &step.model_.layers[static_cast<size_t>(i)];
      attend();
      feed_forward();
    }
    find_best();
  }

 private:
  void attend() {
    norm(BATON_INPUT_NORM);
    multiply(layer->matrices[BATON_QKV], step.normed_, take_qkv);
    meet_for_rows(&BatonTimes::qkv);
    share(batch.tokens, [&](int64_t token) { rotate_and_keep(token); });
    meet(&BatonTimes::rope);
    int64_t plane = Attention::plane_bytes(shape);
    LayerKv kv{pool_plane(0, 0), 2 * plane * shape.layers};
    step.attention_.run(step.team_, thread, batch, layer->window, kv, step.qkv_.as<float>(),
                        step.qkv_stride_, {take_attended, this});
    meet(&BatonTimes::attention);
    quantize(step.attended_, step.attended_floats_, step.queries_, &BatonTimes::attention);
    multiply(layer->matrices[BATON_OUTPUT], step.attended_, take_output);
    meet_for_rows(&BatonTimes::output);
  }

  void feed_forward() {
    norm(BATON_MLP_NORM);
    multiply(layer->matrices[BATON_GATE_UP], step.normed_, take_gate_up);
    meet_for_rows(&BatonTimes::gate_up);
    quantize(step.gated_, step.gated_floats_, shape.intermediate, &BatonTimes::gate_up);
    multiply(layer->matrices[BATON_DOWN], step.gated_, take_down);
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

  // All tokens times a matrix of this layer.
  void multiply(const PackedMatrix& matrix, const RowBuffer& from,
                void (*take)(void*, const float*, int, int, int)) {
    Packed packed = matrix.view();
    Rows x = from.rows(batch.tokens);
    step.gemm_.begin();
    if (own_rows) {
      int64_t threads = step.team_.threads(), count = batch.tokens;
      first_row = static_cast<int>(count * thread / threads);
      x.data = from.row(first_row);
      x.scales += first_row;
      x.count = static_cast<int>(count * (thread + 1) / threads) - first_row;
      step.gemm_.panels(packed, x, 0, packed.panels_count(), {take, this});
    } else {
      baton::multiply(step.gemm_, packed, x, step.team_, {take, this});
    }
    step.gemm_.end();
  }

  float* residual(int64_t token) { return step.residual_.as<float>() + token * shape.hidden; }

  void embed(int64_t token) {
    int64_t width = step.model_.embedding_format == BATON_F32 ? 4 : 2;
    const char* table = static_cast<const char*>(step.model_.embedding);
    rows.widen(table + batch.token_ids[token] * shape.hidden * width, step.model_.embedding_format,
               shape.hidden, residual(token));
  }

  void norm(BatonVector weight) {
    share(batch.tokens, [&](int64_t token) {
      norm_row(residual(token), layer->vector(weight), step.normed_, token);
    });
    meet_for_rows(&BatonTimes::norm);
  }

  void norm_row(const float* from, const float* weight, const RowBuffer& to, int64_t index) {
    rows.norm(from, weight, shape.eps, shape.hidden, row);
    rows.narrow(row, shape.hidden, to.format, to.row(index), to.scales.as<float>() + index);
  }

  // Whole rows of floats into the INT8 rows of a product; the other formats were written already.
  void quantize(const RowBuffer& to, const Memory& from, int64_t width, double BatonTimes::*part) {
    if (to.format != BATON_INT8) return;
    share(batch.tokens, [&](int64_t token) {
      rows.narrow(from.as<float>() + token * width, static_cast<int>(width), BATON_INT8, to.row(token),
                  to.scales.as<float>() + token);
    });
    meet_for_rows(part);
  }

  char* pool_plane(int64_t block, int which) {
    int64_t plane = Attention::plane_bytes(shape);
    return static_cast<char*>(batch.kv) + ((block * shape.layers + index) * 2 + which) * plane;
  }

  void rotate_and_keep(int64_t token) {
    const float* rotation = batch.rotations + int64_t{batch.rotation_rows[token]} * shape.head_dim;
    float* at = step.qkv_.as<float>() + token * step.qkv_stride_;
    for (int head = 0; head < shape.heads + shape.kv_heads; head++, at += shape.head_dim) {
      const float* weight = layer->vector(head < shape.heads ? BATON_Q_NORM : BATON_K_NORM);
      if (weight != nullptr) rows.norm(at, weight, shape.eps, shape.head_dim, at);
      rows.rotate(at, rotation, shape.head_dim);
      if (head >= shape.heads) keep(at, token, head - shape.heads, 0);
    }
    for (int head = 0; head < shape.kv_heads; head++, at += shape.head_dim) keep(at, token, head, 1);
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
  bool own_rows;
  int first_row = 0;  // of the rows that this thread multiplies
  float* const row;  // of floats, before they are narrowed
  float* const best_logits;
  int64_t* const best;
};

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
