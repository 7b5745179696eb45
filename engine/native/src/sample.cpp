#include "sample.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cfloat>
#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "error.h"
#include "isa.h"
#include "philox.h"
#include "sample_kernels.h"
#include "team.h"

namespace baton {

const SampleKernels& sample_kernels(BatonIsa isa) {
#if BATON_X86
  if (isa >= BATON_AVX512) return sample_avx512;
  if (isa >= BATON_AVX2) return sample_avx2;
#endif
  static_cast<void>(isa);
  return sample_portable;
}

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Scores this far below the best are never drawn: the noise of two tokens differs by less than 27.
constexpr double kHopeless = 64;
constexpr int64_t kFew = 32;  // candidates that are sorted

int64_t padded(int64_t n) { return (n + kBlock - 1) / kBlock * kBlock; }

// Integers in the order of the floats, and back.
int32_t key_of(float value) {
  int32_t bits = std::bit_cast<int32_t>(value);
  return bits < 0 ? std::numeric_limits<int32_t>::min() - bits : bits;
}

float float_of_key(int32_t key) {
  return std::bit_cast<float>(key < 0 ? std::numeric_limits<int32_t>::min() - key : key);
}

// What a thread needs to work on one row after another.
struct Space {
  explicit Space(int64_t vocabulary) : blocks(padded(vocabulary) / kBlock) {
    int64_t numbers = blocks * kBlock, words = std::max<int64_t>(blocks, kBlock) + 4;
    int64_t floats = 2 * numbers + 2 * (numbers + kSlack) + 3 * blocks + words;
    float* next = static_cast<float*>(scratch(static_cast<size_t>(floats) * sizeof(float)));
    auto take = [&](int64_t count) { return std::exchange(next, next + count); };
    row = take(numbers), weights = take(numbers);
    list_x = take(numbers + kSlack), list_w = take(numbers + kSlack);
    maxima = take(blocks), sums = take(blocks), order = take(blocks);
    noise = reinterpret_cast<uint32_t*>(take(words));
  }

  int64_t blocks;
  float *row;               // the last block of the logits, or all of them where some are broken
  float *weights;           // exp of the scores, of the blocks that were weighed
  float *list_x, *list_w;   // candidates
  float *maxima, *sums, *order;  // [blocks]
  uint32_t* noise;
};

// One row of logits on its way to a token. The scores of engine/model/logits.py are
// (x - most) / temperature; rounding keeps their order, so that every cut is a floor for x.
class Row {
 public:
  Row(const SampleKernels& kernels, Space& space, const float* x, int64_t vocabulary)
      : kernels_(kernels), space_(space), x_(x), vocabulary_(vocabulary), whole_(vocabulary / kBlock) {
    std::fill_n(last_block(), kBlock, -kInfinity);
    std::copy(x + whole_ * kBlock, x + vocabulary, last_block());
    if (!measure()) {
      clean();
      measure();
    }
  }

  float most() const { return most_; }

  int64_t best() const {
    int64_t b = std::find(space_.maxima, space_.maxima + space_.blocks, most_) - space_.maxima;
    return b * kBlock + (std::find(block(b), block(b) + kBlock, most_) - block(b));
  }

  // Log probabilities: `add` is called with the likeliest tokens, best first, and theirs.
  template <typename Add>
  void report(int64_t target, int64_t count, float* share, int64_t* rank, Add add) {
    double total = log_of_sum();
    float chosen = at(target);
    *share = share_of(chosen, total);
    *rank = 1 + larger_than(chosen);
    for (auto [value, token] : likeliest(count)) add(token, share_of(value, total));
  }

  // For most() > -inf.
  int64_t draw(float temperature, int64_t top_k, float top_p, double min_p, const Philox& philox) {
    temperature_ = temperature;
    floor_ = clamped(most_ - kHopeless * temperature);
    if (top_k > 0 && top_k < vocabulary_) cut_ranks(top_k);
    if (min_p > 0 && top_p >= 1) cut_scores(min_p);
    weigh();
    if (top_p < 1) {
      cut_mass(top_p);
      if (min_p > 0) cut_scores(min_p);
      cut();
    }
    return chosen(philox);
  }

 private:
  float* last_block() const { return space_.row + whole_ * kBlock; }
  const float* block(int64_t b) const { return b < whole_ ? x_ + b * kBlock : last_block(); }
  static float clamped(double value) { return static_cast<float>(std::max<double>(value, -FLT_MAX)); }
  float score(float x) const { return (x - most_) / temperature_; }

  // The largest logit of each block and of the row. False if some number cannot be compared.
  bool measure() {
    most_ = -kInfinity;
    for (int64_t b = 0; b < space_.blocks; b++) {
      float largest = space_.maxima[b] = kernels_.largest(block(b));
      if (!(largest < kInfinity)) return false;
      most_ = std::max(most_, largest);
    }
    return true;
  }

  void clean() {
    auto cleaned = [](float x) { return std::isnan(x) ? -kInfinity : std::min(x, FLT_MAX); };
    std::transform(x_, x_ + vocabulary_, space_.row, cleaned);
    x_ = space_.row;
  }

  float at(int64_t token) const { return block(token / kBlock)[token % kBlock]; }

  // Of the exponentials of all logits.
  double log_of_sum() {
    if (most_ == -kInfinity) return most_;
    floor_ = -FLT_MAX;
    weigh();
    double total = 0;
    for (int64_t b = 0; b < space_.blocks; b++) total += space_.sums[b];
    return most_ + std::log(total);
  }

  static float share_of(float x, double log_total) {
    return x == -kInfinity ? x : static_cast<float>(x - log_total);
  }

  int64_t larger_than(float x) const {
    int64_t count = 0;
    for (int64_t b = 0; b < space_.blocks; b++) {
      if (!(space_.maxima[b] > x)) continue;
      const float* values = block(b);
      int32_t here = 0;
      for (int i = 0; i < kBlock; i++) here += values[i] > x;
      count += here;
    }
    return count;
  }

  // The k-th largest is no less than the k-th largest of the blocks' maxima.
  float floor_of_ranks(int64_t k) const {
    if (k < 1 || k > space_.blocks) return -kInfinity;
    float* order = space_.order;
    std::copy_n(space_.maxima, space_.blocks, order);
    std::nth_element(order, order + (k - 1), order + space_.blocks, std::greater<>());
    return order[k - 1];
  }

  // Values and tokens of the `count` largest logits, the lowest token first where they tie.
  std::vector<std::pair<float, int64_t>> likeliest(int64_t count) const {
    std::vector<std::pair<float, int64_t>> found;
    if (count < 1) return found;
    float low = floor_of_ranks(count);
    for (int64_t b = 0; b < space_.blocks; b++) {
      if (space_.maxima[b] < low) continue;
      const float* values = block(b);
      int64_t end = std::min<int64_t>(kBlock, vocabulary_ - b * kBlock);
      for (int64_t i = 0; i < end; i++)
        if (values[i] >= low) found.emplace_back(values[i], b * kBlock + i);
    }
    auto before = [](const auto& a, const auto& b) {
      return a.first != b.first ? a.first > b.first : a.second < b.second;
    };
    auto end = found.begin() + std::min<int64_t>(count, static_cast<int64_t>(found.size()));
    std::partial_sort(found.begin(), end, found.end(), before);
    found.erase(end, found.end());
    return found;
  }

  // Keep what scores no less than `edge`, at most 0.
  void keep_from(float edge) {
    int64_t low = key_of(-FLT_MAX) - int64_t{1}, high = key_of(most_);  // high is kept
    while (high - low > 1) {
      int64_t middle = low + (high - low) / 2;
      (score(float_of_key(static_cast<int32_t>(middle))) >= edge ? high : low) = middle;
    }
    floor_ = std::max(floor_, float_of_key(static_cast<int32_t>(high)));
  }

  void cut_scores(double min_p) { keep_from(std::min(static_cast<float>(std::log(min_p)), 0.0f)); }

  void cut_ranks(int64_t top_k) {
    float low = std::max(floor_, floor_of_ranks(top_k));
    for (int64_t b = 0; b < space_.blocks; b++)
      if (space_.maxima[b] >= low) std::fill_n(space_.weights + b * kBlock, kBlock, 1.0f);
    int64_t count = collect(low);
    if (count >= top_k) keep_from(score(last_before(static_cast<double>(top_k), count, low)));
  }

  // Holtzman et al. (2020), section 3.1. What is below `low` has less than half of the mass to cut.
  void cut_mass(float top_p) {
    double total = 0;
    for (int64_t b = 0; b < space_.blocks; b++) total += space_.sums[b];
    double share = (1.0 - top_p) * total / (2.0 * static_cast<double>(vocabulary_));
    float low = std::max(floor_, clamped(most_ + temperature_ * std::log(share)));
    keep_from(score(last_before(top_p * total, collect(low), low)));
  }

  // All of at least `low`, with their weights, as candidates.
  int64_t collect(float low) {
    int64_t count = 0;
    for (int64_t b = 0; b < space_.blocks; b++)
      if (space_.maxima[b] >= low)
        count += kernels_.collect(block(b), space_.weights + b * kBlock, kBlock, low, kInfinity,
                                  space_.list_x + count, space_.list_w + count);
    return count;
  }

  // Of the candidates from the largest down, the last one before which there is less weight than
  // `target`. All are at least `low`. Narrows the list by comparing all of it with a few values.
  float last_before(double target, int64_t count, float low) {
    float high = std::min(std::nextafter(most_, kInfinity), FLT_MAX), cuts[kCuts];
    double above = 0;  // weight of those of at least `high`, less than the target
    while (count > kFew && spread(low, high, cuts)) {
      double sums[kCuts] = {};
      int64_t end = (count + kSlack - 1) / kSlack * kSlack;
      std::fill(space_.list_x + count, space_.list_x + end, -kInfinity);
      for (int64_t i = 0; i < end; i += kChunk)
        kernels_.masses(space_.list_x + i, space_.list_w + i, std::min<int64_t>(kChunk, end - i), cuts, sums);
      int j = 0;
      while (j < kCuts && above + sums[j] < target) j++;
      if (j > 0) high = cuts[j - 1], above += sums[j - 1];
      if (j < kCuts) low = cuts[j];
      count = kernels_.collect(space_.list_x, space_.list_w, end, low, high, space_.list_x, space_.list_w);
    }
    return last_of_sorted(target, above, count, std::min(high, most_));
  }

  // Values that part [low, high), in descending order. False if there is none between them.
  static bool spread(float low, float high, float* cuts) {
    double width = (static_cast<double>(high) - low) / (kCuts + 1);
    bool parted = false;
    for (int j = 0; j < kCuts; j++) {
      cuts[j] = static_cast<float>(high - width * (j + 1));
      parted |= cuts[j] > low && cuts[j] < high;
    }
    return parted;
  }

  // `otherwise` if there is none.
  float last_of_sorted(double target, double above, int64_t count, float otherwise) const {
    std::pair<float, float> few[kFew];
    if (count > kFew) return *std::min_element(space_.list_x, space_.list_x + count);  // neighbours
    for (int64_t i = 0; i < count; i++) few[i] = {space_.list_x[i], space_.list_w[i]};
    std::sort(few, few + count, std::greater<>());
    float last = count > 0 ? few[0].first : otherwise;
    for (int64_t i = 0; i < count && above < target; i++) {
      last = few[i].first;
      above += few[i].second;
    }
    return last;
  }

  void weigh() {
    float factor = static_cast<float>(1.4426950408889634 / temperature_);
    for (int64_t b = 0; b < space_.blocks; b++)
      space_.sums[b] = space_.maxima[b] < floor_ ? 0 :
          kernels_.weigh(block(b), most_, factor, floor_, space_.weights + b * kBlock);
  }

  void cut() {
    for (int64_t b = 0; b < space_.blocks; b++)
      space_.sums[b] = space_.maxima[b] < floor_ ? 0 :
          kernels_.cut(block(b), floor_, space_.weights + b * kBlock);
  }

  // The two stages of sampler._draw: a block, then a token of it.
  int64_t chosen(const Philox& philox) const {
    constexpr uint32_t kLanes = kBlock / 4;
    philox.fill(kLanes, static_cast<uint32_t>((space_.blocks + 3) / 4), space_.noise);
    int64_t b = first_to_ring(space_.sums, space_.blocks);
    philox.fill(0, kLanes, space_.noise);
    return b * kBlock + first_to_ring(space_.weights + b * kBlock, kBlock);
  }

  // The index with the largest log(w) - log(-log(u)), which is that with the least -log(u) / w. As
  // -log(u) is at least 1 - u, few logarithms are needed.
  int64_t first_to_ring(const float* w, int64_t n) const {
    double least = std::numeric_limits<double>::infinity();
    int64_t first = 0;
    for (int64_t i = 0; i < n; i++) {
      if (!(w[i] > 0)) continue;
      double u = (space_.noise[i] + 0.5) * 0x1p-32;
      if (1 - u >= least * w[i]) continue;
      double time = -std::log(u) / w[i];
      if (time < least) least = time, first = i;
    }
    return first;
  }

  const SampleKernels& kernels_;
  Space& space_;
  const float* x_;
  int64_t vocabulary_, whole_;
  float most_ = 0, temperature_ = 1, floor_ = 0;
};

int64_t token_of(const SampleKernels& kernels, Space& space, const BatonDraws& draws, int r) {
  Row row(kernels, space, draws.logits + int64_t{r} * draws.vocabulary, draws.vocabulary);
  if (row.most() == -kInfinity) return -1;
  if (draws.temperatures[r] <= 0) return row.best();
  Philox philox(draws.seeds[r], draws.streams[r], draws.positions[r]);
  return row.draw(draws.temperatures[r], draws.top_ks[r], draws.top_ps[r], draws.min_ps[r], philox);
}

void report_row(const SampleKernels& kernels, Space& space, const BatonReports& reports, int r) {
  const float* x = reports.logits + reports.places[r] * reports.vocabulary;
  int64_t next = int64_t{r} * reports.width;
  Row(kernels, space, x, reports.vocabulary)
      .report(reports.targets[r], reports.counts[r], reports.shares + r, reports.ranks + r,
              [&](int64_t token, float share) {
                reports.top_tokens[next] = token;
                reports.top_shares[next++] = share;
              });
}

// Calls work(space, row) for every row, on the threads of the team.
template <typename Work>
int32_t for_rows(Team& team, int rows, int64_t vocabulary, int32_t isa, Work work) {
  if (isa < BATON_PORTABLE || isa > best_isa())
    return fail("this machine lacks the instruction set " + std::string(baton_isa_name(isa)));
  if (vocabulary <= 0) return fail("nothing to choose from");
  std::atomic<bool> failed{false};
  auto some = [&](auto next) {
    try {
      Space space(vocabulary);
      for (int row; (row = next()) >= 0;) work(space, row);
    } catch (const std::exception&) {
      failed = true;
    }
  };
  if (rows == 1)  // not worth waking anyone
    some([row = 0]() mutable { return row-- == 0 ? 0 : -1; });
  else
    team.run([&](int) { some([&] { return team.next(rows); }); });
  return failed ? fail("not enough memory to sample") : 0;
}

}  // namespace
}  // namespace baton

int32_t baton_sample(BatonTeam* team, int32_t isa, const BatonDraws* draws) {
  using namespace baton;
  const SampleKernels& kernels = sample_kernels(static_cast<BatonIsa>(isa));
  return for_rows(team->team, draws->rows, draws->vocabulary, isa, [&](Space& space, int row) {
    draws->tokens[row] = token_of(kernels, space, *draws, row);
  });
}

int32_t baton_report(BatonTeam* team, int32_t isa, const BatonReports* reports) {
  using namespace baton;
  for (int r = 0; r < reports->rows; r++) {
    if (reports->targets[r] < 0 || reports->targets[r] >= reports->vocabulary)
      return fail("a token that is not in the vocabulary");
    if (reports->counts[r] > std::min(reports->width, reports->vocabulary))
      return fail("more tokens wanted than there is room for");
  }
  const SampleKernels& kernels = sample_kernels(static_cast<BatonIsa>(isa));
  return for_rows(team->team, reports->rows, reports->vocabulary, isa,
                  [&](Space& space, int row) { report_row(kernels, space, *reports, row); });
}
