// Attention's way into the pool: where a run's keys and values lie, and which memory comes next.
#include <algorithm>
#include <cstring>

#include "attention.h"

namespace baton {
namespace {

// Cache lines that memory is asked for ahead of the tile that reads them: half a run of three heads of
// 64. Nearer, they come too late; it is the second-level cache that holds them.
constexpr int kLinesAhead = 768;
constexpr int kAllLines = 1 << 30;

void hide(AttentionScratch& scratch, int position) {
  scratch.key_rows[position] = scratch.value_rows[position] = scratch.zeros;
  scratch.key_scales[position] = scratch.value_scales[position] = 0;
}

}  // namespace

// The positions of a run that some row of the item sees, from position `start` of the context on.
Attention::Seen Attention::seen_of(const Item& item, int run, int window) const {
  int start = run * kRun;
  return {start, std::max(seen_from(item.position, window) - start, 0),
          std::min(kRun, item.position + item.tokens - start)};
}

// Where the positions of a run lie, for the item's first key head. Those that no row sees are zeros: what
// the pool holds there may be anything.
void Attention::gather(const Item& item, const BatonBatch& batch, const LayerKv& kv, int run, int window,
                       AttentionScratch& scratch) const {
  Seen seen = seen_of(item, run, window);
  int start = seen.start, begin = scratch.begin = seen.begin, end = scratch.end = seen.end;
  scratch.count = (end + kStep - 1) / kStep * kStep;
  const int64_t* table = batch.tables + int64_t{item.sequence} * batch.width;
  bool scaled = shape_.kv == BATON_INT8;
  int64_t position_bytes = shape_.kv_heads * row_bytes_;
  for (int i = 0; i < begin; i++) hide(scratch, i);
  for (int i = end; i < scratch.count; i++) hide(scratch, i);
  for (int i = begin; i < end;) {
    int at = (start + i) & (shape_.block_size - 1), count = std::min(shape_.block_size - at, end - i);
    const char* plane = kv.keys + table[(start + i) >> block_shift_] * kv.block_bytes;
    const char* row = plane + at * position_bytes + item.kv_head * row_bytes_;
    const char* scales = plane + scales_at_ + (int64_t{at} * shape_.kv_heads + item.kv_head) * 4;
    for (int j = 0; j < count; j++, i++, row += position_bytes, scales += 4 * shape_.kv_heads) {
      scratch.key_rows[i] = row;
      scratch.value_rows[i] = row + plane_bytes_;
      if (!scaled) continue;
      scratch.key_scale_rows[i] = scales;
      std::memcpy(&scratch.key_scales[i], scales, 4);
      std::memcpy(&scratch.value_scales[i], scales + plane_bytes_, 4);
    }
  }
  for (int r = 0; r < item.tokens * group_; r++) {
    int position = item.position + r / group_;
    int from = std::clamp(seen_from(position, window) - start, 0, scratch.count);
    int to = std::clamp(position + 1 - start, 0, scratch.count);
    for (int head = 0; head < item.kv_heads; head++) {
      scratch.from[head * item.tokens * group_ + r] = from;
      scratch.to[head * item.tokens * group_ + r] = to;
    }
  }
}

// The same for all key heads of a single token.
void Attention::gather_groups(const Item& item, const BatonBatch& batch, const LayerKv& kv, int run, int window,
                              AttentionScratch& scratch) const {
  constexpr int kGroup = 16;  // positions
  Seen seen = seen_of(item, run, window);
  scratch.begin = seen.begin;
  scratch.end = seen.end;
  const int64_t* table = batch.tables + int64_t{item.sequence} * batch.width;
  for (int g = seen.begin / kGroup; g * kGroup < seen.end; g++) {
    int position = seen.start + g * kGroup, at = position & (shape_.block_size - 1);
    const char* plane = kv.keys + table[position >> block_shift_] * kv.block_bytes;
    scratch.groups[g] = plane + at * shape_.kv_heads * row_bytes_;
    scratch.scales[g] = plane + scales_at_ + int64_t{at} * shape_.kv_heads * 4;
  }
}

void Attention::next_head(AttentionScratch& scratch) const {
  for (int i = 0; i < scratch.count; i++) {
    scratch.key_rows[i] += row_bytes_;
    scratch.value_rows[i] += row_bytes_;
  }
  if (shape_.kv != BATON_INT8) return;
  for (int i = scratch.begin; i < scratch.end; i++) {
    scratch.key_scale_rows[i] += 4;
    std::memcpy(&scratch.key_scales[i], scratch.key_scale_rows[i], 4);
    std::memcpy(&scratch.value_scales[i], scratch.key_scale_rows[i] + plane_bytes_, 4);
  }
}

// Appends the lines [skip, most) of a run, in the order in which `decode` reads it: keys, then values.
void Attention::append_lines(const Seen& seen, const int64_t* table, const LayerKv& kv, int skip, int most,
                             Ahead& ahead) const {
  int64_t position_bytes = shape_.kv_heads * row_bytes_;
  for (int which = 0; which < 2; which++)
    for (int i = seen.begin, count; i < seen.end && most > 0; i += count) {
      int at = (seen.start + i) & (shape_.block_size - 1);
      count = std::min(shape_.block_size - at, seen.end - i);
      const char* plane =
          kv.keys + table[(seen.start + i) >> block_shift_] * kv.block_bytes + which * plane_bytes_;
      int lines = static_cast<int>((count * position_bytes + 63) / 64);
      int from = std::min(skip, lines), to = std::min(most, lines);
      if (to > from) {
        ahead.at[ahead.count] = plane + at * position_bytes + int64_t{from} * 64;
        ahead.lines[ahead.count++] = to - from;
        ahead.total += to - from;
      }
      skip -= from;
      most -= to;
    }
}

// What to ask memory for during a run. Only for single tokens, which read it once; tiles of a prompt read
// it again and again from the cache. `decode` reads in one order, and is followed in it; head by head the
// same lines are read many times, so there it is the whole next run.
void Attention::look_ahead(const Item& item, int run, const Item* next, int next_run, const BatonBatch& batch,
                           const LayerKv& kv, int window, Ahead& ahead) const {
  ahead.next = ahead.count = ahead.total = 0;
  if (item.kv_heads < shape_.kv_heads || item.tokens > 1) return;
  auto table = [&](const Item& of) { return batch.tables + int64_t{of.sequence} * batch.width; };
  Seen seen = seen_of(item, run, window);
  if (all_heads_) append_lines(seen, table(item), kv, kLinesAhead, kAllLines, ahead);
  if (next != nullptr && next->tokens == 1)
    append_lines(seen_of(*next, next_run, window), table(*next), kv, 0, all_heads_ ? kLinesAhead : kAllLines,
                 ahead);
  int tiles = 2 * ((seen.end + 15) / 16 - seen.begin / 16) * (shape_.head_dim / 32);
  ahead.share = ahead.total / (shape_.kv_heads * (all_heads_ ? tiles : 16)) + 1;
}

}  // namespace baton
