#include "error.h"

#include <utility>

#include "baton.h"

namespace baton {
namespace {

thread_local std::string last_error;

}  // namespace

int fail(std::string message) {
  last_error = std::move(message);
  return -1;
}

}  // namespace baton

const char* baton_error() { return baton::last_error.c_str(); }
