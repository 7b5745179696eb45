#include "attention.h"

#include <algorithm>
#include <cstring>

namespace baton {
namespace {

constexpr int kItemsPerThread = 4;  // with fewer, the runs of a tile are shared out
constexpr int kTilesPerThread = 8;  // of prompts, unless they get smaller than kLeastRows
constexpr int kLeastRows = 64;

int64_t up_to(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

int bytes_of(BatonFormat format) { return format == BATON_F32 ? 4 : format == BATON_BF16 ? 2 : 1; }

}  // namespace

AttentionScratch::AttentionScratch(int max_rows, const DecodeShape& shape) {
  int head_dim = shape.dim;
  // Room for the widest that a kernel may want, on cache lines: it may write 16 rows from any row on.
  int64_t rows = up_to(max_rows, 16) + 16, depth = up_to(head_dim, 32);
  int64_t row_floats = up_to(rows * 4, 64), mixed = rows * head_dim * 4;
  int64_t sizes[] = {rows * depth * 4,  kRun * depth * 4,     kRun * depth * 4, rows * kRun * 4,
                     rows * kRun * 2,   2 * row_floats + mixed, 2 * row_floats + mixed,
                     shape.kv_heads * depth * 4, row_floats,    row_floats,
                     shape.kv_heads * depth * 32, rows * 8,         48 * kRun * 4};
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
  decode_queries = take();
  query_rows = reinterpret_cast<const float**>(take());
  decode_weights = reinterpret_cast<int32_t*>(take());
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
      block_shift_(__builtin_ctz(static_cast<unsigned>(shape.block_size))),
      row_bytes_(int64_t{shape.head_dim} * bytes_of(static_cast<BatonFormat>(shape.kv))),
      decode_shape_{shape.kv_heads, group_, shape.head_dim, static_cast<BatonFormat>(shape.kv), row_bytes_,
                    plane_bytes(shape)} {
  scales_at_ = int64_t{shape.block_size} * shape.kv_heads * row_bytes_;
  plane_bytes_ = plane_bytes(shape);
  all_heads_ = kernels_->decode != nullptr && shape.head_dim % 32 == 0 && group_ <= 16 &&
               shape.block_size % 16 == 0;
  int rows = std::max({kMostRows, group_, shape.heads});
  for (int i = 0; i < threads; i++)
    scratch_.push_back(std::make_unique<AttentionScratch>(rows, decode_shape_));
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

// The more rows a tile has, the less often keys and values are packed; but every thread wants a few. A row
// gets the same bits in any.
int Attention::tile_tokens(const BatonBatch& batch) const {
  int64_t rows = 0, items = int64_t{kTilesPerThread} * threads_;
  for (int s = 0; s < batch.sequences; s++)
    if (batch.lengths[s] > 1) rows += int64_t{batch.lengths[s]} * shape_.heads;
  int64_t most = std::clamp<int64_t>(rows / items, kLeastRows, kMostRows);
  return std::max(1, static_cast<int>(most) / group_);
}

void Attention::fill(Plan& plan, const BatonBatch& batch) {
  plan.items.clear();
  plan.groups.clear();
  plan.partial_floats = 0;
  plan.tile_tokens = tile_tokens(batch);
  int64_t work = 0;  // runs, times key heads
  for (int s = 0; s < batch.sequences; s++)
    for (int begin = 0, length = batch.lengths[s]; begin < length; begin += plan.tile_tokens) {
      int position = batch.starts[s] + begin;
      int last = batch.starts[s] + std::min(begin + plan.tile_tokens, length) - 1;
      work += int64_t{shape_.kv_heads} * (last / kRun + 1 - seen_from(position, plan.window) / kRun);
    }
  int64_t most = threads_ > 1 ? std::max<int64_t>(1, work / (kItemsPerThread * threads_)) : work;
  for (int s = 0, first = 0; s < batch.sequences; first += batch.lengths[s], s++)
    plan_chunk(plan, batch, s, first, static_cast<int>(most));
  if (plan.left_size < plan.groups.size()) {
    plan.left_size = 2 * plan.groups.size();
    plan.left = std::make_unique<std::atomic<int>[]>(plan.left_size);
  }
  for (size_t i = 0; i < plan.groups.size(); i++) plan.left[i] = plan.groups[i].runs;
  if (static_cast<int64_t>(partials_.size()) < plan.partial_floats)
    partials_.resize(static_cast<size_t>(2 * plan.partial_floats));
}

// The last tiles first: they see most. A single token takes all key heads with it: then it reads whole
// blocks, one after another.
void Attention::plan_chunk(Plan& plan, const BatonBatch& batch, int sequence, int first, int most_work) {
  int length = batch.lengths[sequence];
  for (int tile = (length - 1) / plan.tile_tokens; tile >= 0; tile--) {
    int begin = tile * plan.tile_tokens, tokens = std::min(plan.tile_tokens, length - begin);
    int position = batch.starts[sequence] + begin;
    int first_run = seen_from(position, plan.window) / kRun, end_run = (position + tokens - 1) / kRun + 1;
    Item item{sequence, 0, length == 1 ? shape_.kv_heads : 1, first + begin, tokens, position, first_run,
              end_run,  -1};
    int most_runs = std::max(1, most_work / item.kv_heads);
    for (; item.kv_head < shape_.kv_heads; item.kv_head += item.kv_heads) plan_tile(plan, item, most_runs);
  }
}

// A tile in one item, or shared out in items of up to `most_runs`.
void Attention::plan_tile(Plan& plan, Item item, int most_runs) {
  int runs = item.end - item.begin, end = item.end;
  if (runs <= most_runs) return plan.items.push_back(item);
  item.group = static_cast<int>(plan.groups.size());
  plan.groups.push_back({runs, plan.partial_floats});
  plan.partial_floats += runs * partial_floats(rows_of(item));
  for (; item.begin < end; item.begin = item.end) {
    item.end = std::min(item.begin + most_runs, end);
    plan.items.push_back(item);
  }
}

// Every thread knows its next item before it is done with one, to ask for its memory.
void Attention::run(Team& team, int thread, const BatonBatch& batch, int window, const LayerKv& kv,
                    const float* queries, int64_t stride, const Sink& sink) {
  Plan& plan = *find_plan(window);
  AttentionScratch& scratch = *scratch_[static_cast<size_t>(thread)];
  kernels_->begin();
  int count = static_cast<int>(plan.items.size());
  for (int i = team.next(count); i >= 0;) {
    int next = team.next(count);
    const Item& item = plan.items[static_cast<size_t>(i)];
    const Item* following = next < 0 ? nullptr : &plan.items[static_cast<size_t>(next)];
    attend(plan, item, following, batch, kv, queries, stride, scratch);
    i = next;
    if (item.group >= 0 && !merge_group(plan, item, scratch)) continue;
    kernels_->finish(scratch.total, rows_of(item), shape_.head_dim);
    int64_t taken = int64_t{group_} * shape_.head_dim;
    const float* mixed = scratch.total.mixed;
    for (int t = 0; t < item.tokens; t++)
      for (int head = 0; head < item.kv_heads; head++, mixed += taken)
        sink.take(sink.self, mixed, item.first + t, item.kv_head + head);
  }
  kernels_->end();
}

void Attention::attend(const Plan& plan, const Item& item, const Item* next, const BatonBatch& batch,
                       const LayerKv& kv, const float* queries, int64_t stride, AttentionScratch& scratch) {
  int rows = rows_of(item), dim = shape_.head_dim;
  bool single = item.kv_heads == shape_.kv_heads && item.tokens == 1;
  const float* first = queries + item.first * stride + int64_t{item.kv_head} * group_ * dim;
  if (single && all_heads_) {
    kernels_->decode_queries(first, decode_shape_, scratch);
  } else {
    for (int r = 0, each = item.kv_heads * group_; r < rows; r++)
      scratch.query_rows[r] = first + r / each * stride + int64_t{r % each} * dim;
    kernels_->queries(scratch.query_rows, rows, dim, scratch);
  }
  kernels_->clear(scratch.total, rows, dim);
  for (int run = item.begin; run < item.end; run++) {
    if (single && all_heads_)
      gather_groups(item, batch, kv, run, plan.window, scratch);
    else
      gather(item, batch, kv, run, plan.window, scratch);
    bool last = run + 1 == item.end;
    look_ahead(item, run, last ? next : &item, last && next ? next->begin : run + 1, batch, kv, plan.window,
               scratch.ahead);
    attend_run(item, scratch);
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

// A run by all key heads of the item.
void Attention::attend_run(const Item& item, AttentionScratch& scratch) {
  constexpr float kLog2E = 1.44269504088896341f;
  float scale = shape_.scale * kLog2E;
  if (item.tokens == 1 && item.kv_heads == shape_.kv_heads && all_heads_)
    return kernels_->decode(decode_shape_, scale, scratch);
  int rows = item.tokens * group_;
  for (int head = 0; head < item.kv_heads; head++) {
    if (head > 0) next_head(scratch);
    kernels_->attend(head * rows, rows, shape_.head_dim, decode_shape_.format, scale, scratch);
  }
}

Partial Attention::partial_of(const Plan& plan, const Item& item, int run) {
  const Group& group = plan.groups[static_cast<size_t>(item.group)];
  int rows = rows_of(item);
  int first = seen_from(item.position, plan.window) / kRun;
  float* at = partials_.data() + group.partial + (run - first) * partial_floats(rows);
  return {at, at + rows, at + 2 * rows};
}

// Whether this was the last run of its tile; then all of them are merged in scratch.total.
bool Attention::merge_group(Plan& plan, const Item& item, AttentionScratch& scratch) {
  const Group& group = plan.groups[static_cast<size_t>(item.group)];
  std::atomic<int>& left = plan.left[static_cast<size_t>(item.group)];
  int done = item.end - item.begin;
  if (left.fetch_sub(done, std::memory_order_acq_rel) > done) return false;
  left.store(group.runs, std::memory_order_relaxed);
  int rows = rows_of(item);
  int first = seen_from(item.position, plan.window) / kRun;
  kernels_->clear(scratch.total, rows, shape_.head_dim);
  for (int i = 0; i < group.runs; i++)
    kernels_->merge(scratch.total, partial_of(plan, item, first + i), rows, shape_.head_dim);
  return true;
}

}  // namespace baton
