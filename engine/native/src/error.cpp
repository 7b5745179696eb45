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

#ifndef BATON_ABI
#define BATON_ABI ""
#endif

const char* baton_abi() { return BATON_ABI; }

const char* baton_error() { return baton::last_error.c_str(); }
