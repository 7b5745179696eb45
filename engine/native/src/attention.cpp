#include "attention.h"

#include <algorithm>
#include <cstring>

namespace baton {
namespace {

constexpr int kItemsPerThread = 4;  // with fewer, the runs of a tile are shared out

int64_t up_to(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

int bytes_of(BatonFormat format) { return format == BATON_F32 ? 4 : format == BATON_BF16 ? 2 : 1; }

int seen_from(int position, int window) { return window > 0 ? std::max(0, position + 1 - window) : 0; }

// Rows lie apart, where the processor does not foresee them: all are asked for at once. Prompts read
// them again and again from the cache.
void prefetch(const void* key, const void* value, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) {
    __builtin_prefetch(static_cast<const char*>(key) + i);
    __builtin_prefetch(static_cast<const char*>(value) + i);
  }
}

}  // namespace

AttentionScratch::AttentionScratch(int max_rows, int head_dim) {
  // Room for the widest that a kernel may want, on cache lines.
  int64_t rows = up_to(max_rows, 16), depth = up_to(head_dim, 32);
  int64_t row_floats = up_to(rows * 4, 64), mixed = rows * head_dim * 4;
  int64_t sizes[] = {rows * depth * 4,  kRun * depth * 4,     kRun * depth * 4, rows * kRun * 4,
                     rows * kRun * 2,   2 * row_floats + mixed, 2 * row_floats + mixed,
                     depth * 4,         row_floats,           row_floats};
  int64_t total_bytes = 0;
  for (int64_t size : sizes) total_bytes += up_to(size, 64);
  memory = Memory(static_cast<size_t>(total_bytes));
  char* at = memory.as<char>();
  auto take = [&, next = 0]() mutable {
    char* taken = at;
    at += up_to(sizes[next++], 64);
    return taken;
  };
  auto partial = [&](char* from) {
    return Partial{reinterpret_cast<float*>(from), reinterpret_cast<float*>(from + row_floats),
                   reinterpret_cast<float*>(from + 2 * row_floats)};
  };
  queries = take();
  keys = take();
  values = take();
  scores = reinterpret_cast<float*>(take());
  weights = take();
  run = partial(take());
  total = partial(take());
  zeros = take();
  from = reinterpret_cast<int*>(take());
  to = reinterpret_cast<int*>(take());
}

const AttentionKernels& attention_kernels(BatonIsa isa, BatonFormat format) {
#if BATON_X86_NEW
  if (isa >= BATON_AMX && format != BATON_F32) return attention_amx;
  if (isa >= BATON_AVX512_BF16 && format != BATON_F32) return attention_avx512_bf16;
#endif
#if BATON_X86
  if (isa >= BATON_AVX512) return attention_avx512;
  if (isa >= BATON_AVX2) return attention_avx2;
#endif
  static_cast<void>(isa), static_cast<void>(format);
  return attention_portable;
}

Attention::Attention(const BatonShape& shape, BatonIsa isa, int threads)
    : shape_(shape),
      kernels_(&attention_kernels(isa, static_cast<BatonFormat>(shape.kv))),
      threads_(threads),
      group_(shape.heads / shape.kv_heads),
      tile_tokens_(std::max(1, kMostRows / group_)),
      block_shift_(__builtin_ctz(static_cast<unsigned>(shape.block_size))),
      row_bytes_(int64_t{shape.head_dim} * bytes_of(static_cast<BatonFormat>(shape.kv))) {
  scales_at_ = int64_t{shape.block_size} * shape.kv_heads * row_bytes_;
  plane_bytes_ = plane_bytes(shape);
  for (int i = 0; i < threads; i++)
    scratch_.push_back(std::make_unique<AttentionScratch>(tile_tokens_ * group_, shape.head_dim));
}

int64_t Attention::plane_bytes(const BatonShape& shape) {
  auto format = static_cast<BatonFormat>(shape.kv);
  int64_t rows = int64_t{shape.block_size} * shape.kv_heads;
  return rows * (shape.head_dim * bytes_of(format) + (format == BATON_INT8 ? 4 : 0));
}

Attention::Plan* Attention::find_plan(int window) {
  for (Plan& plan : plans_)
    if (plan.window == window) return &plan;
  return nullptr;
}

void Attention::plan(const BatonBatch& batch, const std::vector<LayerWeights>& layers) {
  for (Plan& plan : plans_) plan.current = false;
  for (const LayerWeights& layer : layers) {
    Plan* plan = find_plan(layer.window);
    if (plan == nullptr) {
      plan = &plans_.emplace_back();
      plan->window = layer.window;
    }
    if (!plan->current) fill(*plan, batch);
    plan->current = true;
  }
}

void Attention::fill(Plan& plan, const BatonBatch& batch) {
  plan.items.clear();
  plan.groups.clear();
  plan.partial_floats = 0;
  int64_t tiles = 0;
  for (int s = 0; s < batch.sequences; s++) tiles += (batch.lengths[s] + tile_tokens_ - 1) / tile_tokens_;
  bool split = threads_ > 1 && tiles * shape_.kv_heads < int64_t{kItemsPerThread} * threads_;
  for (int s = 0, first = 0; s < batch.sequences; first += batch.lengths[s], s++)
    plan_chunk(plan, batch, s, first, split);
  if (plan.left_size < plan.groups.size()) {
    plan.left_size = 2 * plan.groups.size();
    plan.left = std::make_unique<std::atomic<int>[]>(plan.left_size);
  }
  for (size_t i = 0; i < plan.groups.size(); i++) plan.left[i] = plan.groups[i].runs;
  if (static_cast<int64_t>(partials_.size()) < plan.partial_floats)
    partials_.resize(static_cast<size_t>(2 * plan.partial_floats));
}

// The last tiles first: they see most.
void Attention::plan_chunk(Plan& plan, const BatonBatch& batch, int sequence, int first, bool split) {
  int length = batch.lengths[sequence];
  for (int tile = (length - 1) / tile_tokens_; tile >= 0; tile--) {
    int begin = tile * tile_tokens_, tokens = std::min(tile_tokens_, length - begin);
    int position = batch.starts[sequence] + begin;
    int first_run = seen_from(position, plan.window) / kRun, end_run = (position + tokens - 1) / kRun + 1;
    Item item{sequence, 0, first + begin, tokens, position, first_run, end_run, -1};
    bool shared = split && end_run - first_run > 1;
    for (item.kv_head = 0; item.kv_head < shape_.kv_heads; item.kv_head++) {
      if (!shared) {
        plan.items.push_back(item);
        continue;
      }
      Item run = item;
      run.group = static_cast<int>(plan.groups.size());
      plan.groups.push_back({end_run - first_run, plan.partial_floats});
      for (run.begin = first_run; run.begin < end_run; run.begin++) {
        run.end = run.begin + 1;
        plan.items.push_back(run);
      }
      plan.partial_floats += (end_run - first_run) * partial_floats(tokens * group_);
    }
  }
}

void Attention::run(Team& team, int thread, const BatonBatch& batch, int window, const LayerKv& kv,
                    const float* queries, int64_t stride, const Sink& sink) {
  Plan& plan = *find_plan(window);
  AttentionScratch& scratch = *scratch_[static_cast<size_t>(thread)];
  kernels_->begin();
  int count = static_cast<int>(plan.items.size());
  for (int i; (i = team.next(count)) >= 0;) {
    const Item& item = plan.items[static_cast<size_t>(i)];
    int rows = item.tokens * group_;
    attend(plan, item, batch, kv, queries, stride, scratch);
    if (item.group >= 0 && !merge_group(plan, item, scratch)) continue;
    kernels_->finish(scratch.total, rows, shape_.head_dim);
    for (int t = 0; t < item.tokens; t++)
      sink.take(sink.self, scratch.total.mixed + int64_t{t} * group_ * shape_.head_dim, item.first + t,
                item.kv_head);
  }
  kernels_->end();
}

void Attention::attend(const Plan& plan, const Item& item, const BatonBatch& batch, const LayerKv& kv,
                       const float* queries, int64_t stride, AttentionScratch& scratch) {
  int rows = item.tokens * group_, dim = shape_.head_dim;
  const float* from[kMostRows];
  for (int r = 0; r < rows; r++)
    from[r] = queries + (item.first + r / group_) * stride +
              int64_t{item.kv_head * group_ + r % group_} * dim;
  kernels_->queries(from, rows, dim, scratch);
  constexpr float kLog2E = 1.44269504088896341f;
  kernels_->clear(scratch.total, rows, dim);
  for (int run = item.begin; run < item.end; run++) {
    gather(item, batch, kv, run, plan.window, scratch);
    kernels_->attend(rows, dim, static_cast<BatonFormat>(shape_.kv), shape_.scale * kLog2E, scratch);
    if (item.group < 0) {
      kernels_->merge(scratch.total, scratch.run, rows, dim);
      continue;
    }
    Partial part = partial_of(plan, item, run);
    size_t row_bytes = static_cast<size_t>(rows) * sizeof(float);
    std::memcpy(part.largest, scratch.run.largest, row_bytes);
    std::memcpy(part.sums, scratch.run.sums, row_bytes);
    std::memcpy(part.mixed, scratch.run.mixed, row_bytes * static_cast<size_t>(dim));
  }
}

// Where the positions of a run lie. Those that no row sees are zeros: what the pool holds there may be
// anything.
void Attention::gather(const Item& item, const BatonBatch& batch, const LayerKv& kv, int run, int window,
                       AttentionScratch& scratch) const {
  int start = run * kRun, last = item.position + item.tokens - 1;
  int begin = std::max(seen_from(item.position, window) - start, 0);
  int end = std::min(kRun, last + 1 - start);
  scratch.count = static_cast<int>(up_to(end, kStep));
  const int64_t* table = batch.tables + int64_t{item.sequence} * batch.width;
  bool scaled = shape_.kv == BATON_INT8, single = item.tokens == 1;
  for (int i = 0; i < scratch.count; i++) {
    if (i < begin || i >= end) {
      scratch.key_rows[i] = scratch.value_rows[i] = scratch.zeros;
      scratch.key_scales[i] = scratch.value_scales[i] = 0;
      continue;
    }
    const char* plane = kv.keys + table[(start + i) >> block_shift_] * kv.block_bytes;
    int64_t row = int64_t{(start + i) & (shape_.block_size - 1)} * shape_.kv_heads + item.kv_head;
    scratch.key_rows[i] = plane + row * row_bytes_;
    scratch.value_rows[i] = plane + plane_bytes_ + row * row_bytes_;
    if (single) prefetch(scratch.key_rows[i], scratch.value_rows[i], row_bytes_);
    if (!scaled) continue;
    std::memcpy(&scratch.key_scales[i], plane + scales_at_ + row * 4, 4);
    std::memcpy(&scratch.value_scales[i], plane + plane_bytes_ + scales_at_ + row * 4, 4);
  }
  for (int r = 0; r < item.tokens * group_; r++) {
    int position = item.position + r / group_;
    scratch.from[r] = std::clamp(seen_from(position, window) - start, 0, scratch.count);
    scratch.to[r] = std::clamp(position + 1 - start, 0, scratch.count);
  }
}

Partial Attention::partial_of(const Plan& plan, const Item& item, int run) {
  const Group& group = plan.groups[static_cast<size_t>(item.group)];
  int rows = item.tokens * group_;
  int first = seen_from(item.position, plan.window) / kRun;
  float* at = partials_.data() + group.partial + (run - first) * partial_floats(rows);
  return {at, at + rows, at + 2 * rows};
}

// Whether this was the last run of its tile; then all of them are merged in scratch.total.
bool Attention::merge_group(Plan& plan, const Item& item, AttentionScratch& scratch) {
  const Group& group = plan.groups[static_cast<size_t>(item.group)];
  std::atomic<int>& left = plan.left[static_cast<size_t>(item.group)];
  if (left.fetch_sub(1, std::memory_order_acq_rel) > 1) return false;
  left.store(group.runs, std::memory_order_relaxed);
  int rows = item.tokens * group_;
  int first = seen_from(item.position, plan.window) / kRun;
  kernels_->clear(scratch.total, rows, shape_.head_dim);
  for (int i = 0; i < group.runs; i++)
    kernels_->merge(scratch.total, partial_of(plan, item, first + i), rows, shape_.head_dim);
  return true;
}

}  // namespace baton
