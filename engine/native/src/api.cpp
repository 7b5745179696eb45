// The part of baton.h that is about models.
#include <exception>
#include <string>

#include "baton.h"
#include "error.h"
#include "isa.h"
#include "model.h"
#include "step.h"

struct BatonModel {
  BatonModel(const BatonShape& shape, baton::Team& team, BatonIsa isa)
      : model(shape), team(team), step(model, team, isa) {}
  baton::Model model;
  baton::Team& team;
  baton::Step step;
};

BatonModel* baton_model_new(const BatonShape* shape, BatonTeam* team, int32_t isa) {
  using namespace baton;
  if (isa < BATON_PORTABLE || isa > best_isa()) {
    fail("this machine lacks the instruction set " + std::string(baton_isa_name(isa)));
    return nullptr;
  }
  try {
    return new BatonModel(*shape, team->team, static_cast<BatonIsa>(isa));
  } catch (const std::bad_alloc&) {
    fail("not enough memory for the model");
  } catch (const std::exception& error) {
    fail(error.what());
  }
  return nullptr;
}

void baton_model_free(BatonModel* model) { delete model; }

namespace {

// What `call` returns, or a failure instead of an exception.
template <typename Call>
int32_t guarded(Call call) {
  try {
    return call();
  } catch (const std::exception& error) {
    return baton::fail(error.what());
  }
}

}  // namespace

int32_t baton_model_pack(BatonModel* model, int32_t layer, int32_t matrix, int64_t first, int64_t rows,
                         const void* source, int32_t format) {
  return guarded([&] {
    return model->model.pack(layer, matrix, first, rows, source, static_cast<BatonFormat>(format),
                             model->team);
  });
}

int32_t baton_model_vector(BatonModel* model, int32_t layer, int32_t vector, int64_t first,
                           int64_t count, const float* source) {
  return guarded([&] { return model->model.set(layer, vector, first, count, source); });
}

int32_t baton_model_embedding(BatonModel* model, const void* source, int32_t format) {
  return guarded([&] { return model->model.set_embedding(source, format); });
}

int32_t baton_model_window(BatonModel* model, int32_t layer, int32_t window) {
  return guarded([&] { return model->model.set_window(layer, window); });
}

int64_t baton_model_bytes(const BatonModel* model) { return model->model.bytes(); }

int32_t baton_step(BatonModel* model, const BatonBatch* batch, BatonTimes* times) {
  return guarded([&] { return model->step.run(*batch, times); });
}
