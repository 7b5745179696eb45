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

  // The k-th largest is no less than the k-th largest of the blocks' maxima.
  void cut_ranks(int64_t top_k) {
    float low = floor_;
    if (top_k <= space_.blocks) {
      float* order = space_.order;
      std::copy_n(space_.maxima, space_.blocks, order);
      std::nth_element(order, order + (top_k - 1), order + space_.blocks, std::greater<>());
      low = std::max(low, order[top_k - 1]);
    }
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

}  // namespace
}  // namespace baton

int32_t baton_sample(BatonTeam* team, int32_t isa, const BatonDraws* draws) {
  using namespace baton;
  if (isa < BATON_PORTABLE || isa > best_isa())
    return fail("this machine lacks the instruction set " + std::string(baton_isa_name(isa)));
  if (draws->vocabulary <= 0) return fail("nothing to choose from");
  const SampleKernels& kernels = sample_kernels(static_cast<BatonIsa>(isa));
  std::atomic<bool> failed{false};
  auto work = [&](auto next) {
    try {
      Space space(draws->vocabulary);
      for (int row; (row = next()) >= 0;) draws->tokens[row] = token_of(kernels, space, *draws, row);
    } catch (const std::exception&) {
      failed = true;
    }
  };
  if (draws->rows == 1)  // not worth waking anyone
    work([row = 0]() mutable { return row-- == 0 ? 0 : -1; });
  else
    team->team.run([&](int) { work([&] { return team->team.next(draws->rows); }); });
  return failed ? fail("not enough memory to sample") : 0;
}
