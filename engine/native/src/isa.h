// What the processor can do.
#pragma once

#include "baton.h"

namespace baton {

// The best instruction set that this machine has and this library has kernels for. Asks the kernel
// for the right to use AMX tiles, once per process.
BatonIsa best_isa();

}  // namespace baton
