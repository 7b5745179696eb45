// Why the last call of this thread failed, for people.
#pragma once

#include <string>

namespace baton {

// Keeps `message` for `baton_error` and returns what a failed call returns.
int fail(std::string message);

}  // namespace baton
