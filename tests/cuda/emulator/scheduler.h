// Runs one block: which of its threads goes on, where threads wait for each other, and how a launch is
// given up with a message. One CPU thread runs it all; a thread is left only where it waits or ends.
#pragma once
#include <csetjmp>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "fibre.h"
#include "types.h"

namespace cusim {

constexpr unsigned max_threads = 1024;  // of a block, as on every GPU
constexpr unsigned warp_lanes = 32;

// A line of the kernel's source.
struct Place {
  const char* file;
  int line;
};

struct Thread;

// A warp primitive. The lane that arrives last calls finish() on behalf of all lanes in the mask.
struct Operation {
  const char* name;
  void (*finish)(Thread* lanes, unsigned mask);
};

struct Thread {
  Fibre fibre;
  uint3 index;
  unsigned id;  // within the block
  // The warp primitive that the thread waits in, or was last in:
  const Operation* operation;
  Place place;
  unsigned mask;
  unsigned source;  // the lane whose value the thread asked for
  uint64_t value;   // what the thread brought
  uint64_t result;  // what it takes home
};

// Masks of lanes. A lane that is in no mask but `all` has ended.
struct Warp {
  unsigned all;         // lanes that exist
  unsigned ready;       // may run
  unsigned at_barrier;  // wait in __syncthreads
  unsigned meeting;     // wait in a warp primitive
};

enum Order : unsigned { ascending = 0, descending = 1, shuffled = 2 };

// The launch and the block that run now.
inline const char* kernel_name = "";
inline dim3 grid_size, block_size;
inline uint3 block_index;
inline unsigned order;
inline uint64_t random_state;
inline Fibre main_fibre;
inline Thread threads[max_threads];
inline unsigned thread_count, warp_count;
inline Warp warps[max_threads / warp_lanes];
inline unsigned ready_warps;  // mask of the warps with a ready lane
inline unsigned arrived;      // threads in __syncthreads
inline Place barrier_place;   // where they are
inline Thread* current;       // the running thread; null outside of kernel code

// How a launch ends early: the message is written and the launching function longjmps back.
inline sigjmp_buf escape;
inline char message[4096];

// Append to the message, cutting what does not fit.
[[gnu::format(printf, 1, 2)]] inline void say(const char* format, ...) {
  const size_t used = std::strlen(message);
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message + used, sizeof message - used, format, arguments);
  va_end(arguments);
}

inline void say_where() {
  message[0] = '\0';
  say("kernel %s, block (%u,%u,%u)", kernel_name, block_index.x, block_index.y, block_index.z);
  if (current) say(", thread (%u,%u,%u)", current->index.x, current->index.y, current->index.z);
  say(": ");
}

[[noreturn]] inline void give_up() { siglongjmp(escape, 1); }

#define CUSIM_FAIL(...) (::cusim::say_where(), ::cusim::say(__VA_ARGS__), ::cusim::give_up())

inline unsigned lane_of(const Thread& thread) { return thread.id % warp_lanes; }
inline unsigned lowest(unsigned mask) { return __builtin_ctz(mask); }
inline unsigned highest(unsigned mask) { return 31 - __builtin_clz(mask); }

// A number below `bound` from a linear congruential generator's upper half.
inline unsigned random_below(unsigned bound) {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return unsigned((random_state >> 32) * bound >> 32);
}

// One of the mask's bits, as the launch's order has it.
inline unsigned pick(unsigned mask) {
  if (order == ascending) return lowest(mask);
  if (order == descending) return highest(mask);
  for (unsigned skip = random_below(__builtin_popcount(mask)); skip; --skip) mask &= mask - 1;
  return lowest(mask);
}

// Let the next ready thread run, or the launching function if there is none. Returns when the calling
// thread (or the launching function) is the next one again.
inline void reschedule() {
  Fibre& left = current ? current->fibre : main_fibre;
  Thread* next = nullptr;
  if (ready_warps) {
    const unsigned warp = pick(ready_warps);
    next = &threads[warp * warp_lanes + pick(warps[warp].ready)];
  }
  if (next == current) return;
  current = next;
  left.switch_to(next ? next->fibre : main_fibre);
}

// After the ready lanes of a warp have changed.
inline void note_ready(unsigned warp) {
  const unsigned bit = 1u << warp;
  ready_warps = warps[warp].ready ? ready_warps | bit : ready_warps & ~bit;
}

// __syncthreads: wait until every thread of the block is here. A thread that has ended never comes.
inline void barrier(Place place) {
  const unsigned warp = current->id / warp_lanes, bit = 1u << lane_of(*current);
  if (arrived && (barrier_place.line != place.line || barrier_place.file != place.file))
    CUSIM_FAIL("__syncthreads at %s:%d while other threads of the block wait in the one at %s:%d",
               place.file, place.line, barrier_place.file, barrier_place.line);
  barrier_place = place;
  warps[warp].ready &= ~bit;
  warps[warp].at_barrier |= bit;
  if (++arrived == thread_count) {
    arrived = 0;
    for (unsigned w = 0; w < warp_count; ++w) {
      warps[w].ready = warps[w].all;
      warps[w].at_barrier = 0;
      note_ready(w);
    }
  } else {
    note_ready(warp);
  }
  reschedule();
}

// Whether every lane of the mask waits in a primitive that names this very mask.
inline bool complete(const Warp& warp, const Thread* lanes, unsigned mask) {
  if ((warp.meeting & mask) != mask) return false;
  for (unsigned rest = mask; rest; rest &= rest - 1)
    if (lanes[lowest(rest)].mask != mask) return false;
  return true;
}

// A warp primitive: wait until all lanes of the mask are in it; return what it gives this lane.
inline uint64_t meet(const Operation& operation, Place place, unsigned mask, uint64_t value,
                     unsigned source = 0) {
  Thread& thread = *current;
  const unsigned w = thread.id / warp_lanes, bit = 1u << lane_of(thread);
  Warp& warp = warps[w];
  Thread* lanes = &threads[w * warp_lanes];
  if (!(mask & bit))
    CUSIM_FAIL("%s at %s:%d with mask %08x, which leaves out the calling lane %u", operation.name,
               place.file, place.line, mask, lane_of(thread));
  thread.operation = &operation;
  thread.place = place;
  thread.mask = mask;
  thread.source = source;
  thread.value = value;
  warp.ready &= ~bit;
  warp.meeting |= bit;
  if (complete(warp, lanes, mask)) {
    for (unsigned rest = mask; rest; rest &= rest - 1) {
      const Thread& other = lanes[lowest(rest)];
      if (other.operation != &operation || other.place.line != place.line || other.place.file != place.file)
        CUSIM_FAIL("%s at %s:%d (mask %08x) while lane %u of the mask waits in %s at %s:%d", operation.name,
                   place.file, place.line, mask, lowest(rest), other.operation->name, other.place.file,
                   other.place.line);
    }
    operation.finish(lanes, mask);
    warp.meeting &= ~mask;
    warp.ready |= mask;
  }
  note_ready(w);
  reschedule();
  return thread.result;
}

// A thread's end: its fibre is never entered again.
[[noreturn]] inline void end_thread() {
  const unsigned warp = current->id / warp_lanes;
  warps[warp].ready &= ~(1u << lane_of(*current));
  note_ready(warp);
  reschedule();
  __builtin_unreachable();
}

// Give up a block none of whose threads can go on, saying where its threads wait.
[[noreturn]] inline void report_deadlock() {
  current = nullptr;
  say_where();
  say("deadlock");
  if (arrived)
    say("; %u of %u threads wait in __syncthreads at %s:%d", arrived, thread_count, barrier_place.file,
        barrier_place.line);
  for (unsigned w = 0; w < warp_count; ++w) {
    const Warp& warp = warps[w];
    const unsigned ended = warp.all & ~warp.at_barrier & ~warp.meeting;
    if (!warp.meeting && !(arrived && ended)) continue;  // the barrier's place is said, or all is well
    say("; warp %u:", w);
    for (unsigned rest = warp.meeting; rest;) {  // the lanes that wait at one place, at a time
      const Thread& first = threads[w * warp_lanes + lowest(rest)];
      unsigned same = 0;
      for (unsigned lane = 0; lane < warp_lanes; ++lane) {
        const Thread& other = threads[w * warp_lanes + lane];
        const bool alike = (rest >> lane & 1) && other.operation == first.operation &&
                           other.place.line == first.place.line && other.mask == first.mask;
        same |= unsigned(alike) << lane;
      }
      say(" lanes %08x wait in %s (mask %08x) at %s:%d,", same, first.operation->name, first.mask,
          first.place.file, first.place.line);
      rest &= ~same;
    }
    if (warp.at_barrier) say(" lanes %08x wait in __syncthreads,", warp.at_barrier);
    say(ended ? " lanes %08x have ended" : " none has ended", ended);
  }
  give_up();
}

}  // namespace cusim
