// Turns what would end or hang the process into a message: memory faults, integer division by zero, and
// kernels that do not end. The handlers are in place during a launch only.
#pragma once
#include <csignal>
#include <ctime>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "description.h"
#include "scheduler.h"

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

namespace cusim {

constexpr int fault_signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGVTALRM};  // the last is the timer's
constexpr int fault_count = sizeof fault_signals / sizeof *fault_signals;
inline struct sigaction handlers_before[fault_count];
inline stack_t signal_stack_before;
inline timer_t timer;
inline pthread_t launching_thread;
inline const Launch* launch_now;
inline void* fault_address;  // of the memory fault that ended the last launch; null if none did

inline void on_fault(int signal, siginfo_t* information, void*) {
  const bool in_kernel = current && pthread_equal(pthread_self(), launching_thread);
  if (!in_kernel && signal == SIGVTALRM) return;  // it comes again
  if (!in_kernel) {
    for (int i = 0; i < fault_count; ++i)  // not ours: it comes again, and the handler before gets it
      if (fault_signals[i] == signal) sigaction(signal, &handlers_before[i], nullptr);
    return;
  }
  say_where();
  char* address = static_cast<char*>(information->si_addr);
  const char* stacks_end = launch_now->stacks + launch_now->stack_bytes * max_threads;
  if (signal == SIGVTALRM) {
    say("the launch has not ended after %g s", launch_now->seconds);
  } else if (signal == SIGFPE) {
    say("integer division by zero, or with a quotient that does not fit");
  } else if (signal == SIGILL) {
    say("illegal instruction");
  } else if (address >= launch_now->stacks && address < stacks_end) {
    say("stack overflow: a thread has %llu bytes here", (unsigned long long)launch_now->stack_bytes);
  } else if (information->si_code == SI_KERNEL || information->si_code == BUS_ADRALN) {
    say("memory fault: a misaligned vector access, or an address that no memory can have");
  } else {
    fault_address = address;
    say("memory fault at address %p", static_cast<void*>(address));
  }
  give_up();
}

inline void catch_faults(const Launch& launch) {
  launch_now = &launch;
  launching_thread = pthread_self();
  static char stack[1 << 16];  // for the handler: the fault may be that a thread's own is used up
  stack_t own{};
  own.ss_sp = stack;
  own.ss_size = sizeof stack;
  sigaltstack(&own, &signal_stack_before);
  struct sigaction action {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (int i = 0; i < fault_count; ++i) sigaction(fault_signals[i], &action, &handlers_before[i]);

  sigevent event{};
  event.sigev_notify = SIGEV_THREAD_ID;
  event.sigev_signo = SIGVTALRM;
  event.sigev_notify_thread_id = pid_t(syscall(SYS_gettid));
  timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer);
  itimerspec times{};
  times.it_value.tv_sec = time_t(launch.seconds);
  times.it_value.tv_nsec = long((launch.seconds - double(time_t(launch.seconds))) * 1e9);
  times.it_interval.tv_nsec = 100000000;
  timer_settime(timer, 0, &times, nullptr);
}

inline void stop_catching_faults() {
  timer_delete(timer);
  for (int i = 0; i < fault_count; ++i) sigaction(fault_signals[i], &handlers_before[i], nullptr);
  sigaltstack(&signal_stack_before, nullptr);
}

}  // namespace cusim
