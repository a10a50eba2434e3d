// Launches a kernel: checks its arguments and runs its blocks one after another. CUSIM_EXPORT makes the
// function that Python calls.
#pragma once
#include <cstdlib>
#include <link.h>
#include <tuple>
#include <type_traits>
#include <utility>

#include "description.h"
#include "faults.h"
#include "scheduler.h"

namespace cusim {

// ---- shared memory ----

// All __shared__ variables are thread_local, and so lie in one piece of memory: the shared object's
// thread-local segment. (A section of their own would do, but for g++ ignoring the attribute in templates.)
// This variable is in there too, to find the segment by.
__attribute__((used)) static thread_local char shared_memory_anchor[16];
inline ptrdiff_t anchor_offset;  // of the variable in the segment
inline size_t segment_bytes;

inline int find_segment(dl_phdr_info* object, size_t, void*) {
  const char* start = static_cast<const char*>(object->dlpi_tls_data);
  for (int i = 0; i < object->dlpi_phnum; ++i) {
    const auto& header = object->dlpi_phdr[i];
    const ptrdiff_t offset = shared_memory_anchor - start;
    if (header.p_type != PT_TLS || !start || offset < 0 || size_t(offset) >= header.p_memsz) continue;
    anchor_offset = offset;
    segment_bytes = header.p_memsz;
    return 1;
  }
  return 0;
}

// All ones: NaN as a float, -1 as an integer.
inline void poison_shared_memory() {
  if (!segment_bytes) dl_iterate_phdr(find_segment, nullptr);
  std::memset(shared_memory_anchor - anchor_offset, 0xff, segment_bytes);
}

// ---- blocks ----

inline void (*kernel_body)(void*);
inline void* kernel_arguments;

inline void run_thread() {
  kernel_body(kernel_arguments);
  end_thread();
}

inline void run_block(const Launch& launch) {
  poison_shared_memory();
  ready_warps = 0;
  arrived = 0;
  for (unsigned w = 0; w < warp_count; ++w) {
    const unsigned left = thread_count - w * warp_lanes;
    warps[w] = Warp{};
    warps[w].all = warps[w].ready = left < warp_lanes ? (1u << left) - 1 : ~0u;
    note_ready(w);
  }
  for (unsigned t = 0; t < thread_count; ++t) {
    // The stacks start at different distances from a page's end, or all would share a few cache lines.
    const size_t usable = launch.stack_bytes - t % 32 * 320;
    threads[t].fibre.prepare(launch.stacks + t * launch.stack_bytes, usable, run_thread);
  }
  current = nullptr;
  reschedule();
  for (unsigned w = 0; w < warp_count; ++w)
    if (warps[w].at_barrier || warps[w].meeting) report_deadlock();
}

inline void run_blocks(const Launch& launch) {
  thread_count = block_size.x * block_size.y * block_size.z;
  warp_count = (thread_count + warp_lanes - 1) / warp_lanes;
  for (unsigned t = 0; t < thread_count; ++t) {
    const dim3& b = block_size;
    threads[t].index = {t % b.x, t / b.x % b.y, t / b.x / b.y};
    threads[t].id = t;
  }
  const uint64_t count = uint64_t(grid_size.x) * grid_size.y * grid_size.z;
  static uint64_t* sequence;  // the shuffled order of the blocks
  if (order == shuffled) {
    sequence = static_cast<uint64_t*>(std::realloc(sequence, count * sizeof *sequence));
    for (uint64_t i = 0; i < count; ++i) {
      const uint64_t j = random_below(unsigned(i + 1));
      sequence[i] = sequence[j];
      sequence[j] = i;
    }
  }
  for (uint64_t i = 0; i < count; ++i) {
    const uint64_t b = order == ascending ? i : order == descending ? count - 1 - i : sequence[i];
    block_index = {unsigned(b % grid_size.x), unsigned(b / grid_size.x % grid_size.y),
                   unsigned(b / grid_size.x / grid_size.y)};
    run_block(launch);
  }
}

// ---- the call from Python ----

// Run all blocks; whether that went well. If not, the message says what happened.
inline bool run(const char* name, const Launch& launch, void (*body)(void*), void* arguments) {
  kernel_name = name;
  grid_size = {launch.grid[0], launch.grid[1], launch.grid[2]};
  block_size = {launch.block[0], launch.block[1], launch.block[2]};
  block_index = {};
  order = launch.order;
  random_state = launch.seed * 0x9e3779b97f4a7c15u + 1;
  kernel_body = body;
  kernel_arguments = arguments;
  catch_faults(launch);
  const bool gone_well = sigsetjmp(escape, 1) == 0 ? (run_blocks(launch), true) : false;
  current = nullptr;
  stop_catching_faults();
  return gone_well;
}

template <class T>
constexpr char kind_of = std::is_pointer_v<T>          ? 'p'
                         : std::is_floating_point_v<T> ? 'f'
                         : std::is_integral_v<T>       ? 'i'
                                                       : 's';

// Whether an argument may be passed as a T; if not, the message says why. An integer may be an address.
template <class T>
bool fits(const char* name, unsigned position, const Argument& given) {
  constexpr char wanted = kind_of<T>;
  const bool kind_fits = given.kind == wanted || given.kind == 's' || wanted == 's' ||
                         (given.kind == 'i' && wanted == 'p');
  if (kind_fits && given.bytes == sizeof(T)) return true;
  say("kernel %s: argument %u is %c of %u bytes, its parameter is %c of %u bytes", name, position, given.kind,
      given.bytes, wanted, unsigned(sizeof(T)));
  say(" (i: integer, f: floating point, p: pointer, s: struct)");
  return false;
}

template <class... T, size_t... position>
bool launch_with(void (*kernel)(T...), const char* name, const Launch& launch,
                 std::index_sequence<position...>) {
  fault_address = nullptr;
  message[0] = '\0';
  if (launch.argument_count != sizeof...(T)) {
    say("kernel %s: %u arguments for %u parameters", name, launch.argument_count, unsigned(sizeof...(T)));
    return false;
  }
  if (!(fits<std::decay_t<T>>(name, position, launch.arguments[position]) && ...)) return false;
  struct Call {
    void (*kernel)(T...);
    std::tuple<std::decay_t<T>...> arguments;
  } call{kernel, {*static_cast<const std::decay_t<T>*>(launch.arguments[position].data)...}};
  auto body = [](void* data) {
    const auto& c = *static_cast<const Call*>(data);
    std::apply(c.kernel, c.arguments);
  };
  return run(name, launch, body, &call);
}

template <class... T>
bool launch(void (*kernel)(T...), const char* name, const Launch& launch) {
  return launch_with(kernel, name, launch, std::index_sequence_for<T...>{});
}

}  // namespace cusim

#define CUSIM_VISIBLE extern "C" __attribute__((visibility("default")))
#define CUSIM_EXPORT(name)                                                 \
  CUSIM_VISIBLE int cusim_launch_##name(const cusim::Launch* description) { \
    return cusim::launch(cusim_device::name, #name, *description);         \
  }

CUSIM_VISIBLE const char* cusim_message() { return cusim::message; }
CUSIM_VISIBLE void* cusim_fault_address() { return cusim::fault_address; }
