// A launch as Python describes it: module.py has the same fields in the same order, as _Argument and _Launch.
#pragma once
#include <cstdint>

namespace cusim {

// One argument. Its kind: i(nteger), f(loat), p(ointer), s(truct).
struct Argument {
  const void* data;
  uint32_t bytes;
  char kind;
};

struct Launch {
  uint32_t grid[3];
  uint32_t block[3];
  uint32_t order;
  uint32_t argument_count;
  uint64_t seed;
  const Argument* arguments;
  char* stacks;  // one after another, with a guard page at the lower end of each
  uint64_t stack_bytes;
  double seconds;  // of CPU time, before the launch is given up
};

}  // namespace cusim
