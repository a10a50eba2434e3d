// A fibre: a stack, and the place on it where its code was left. Switching takes a few nanoseconds on
// x86-64 (callee-saved registers only); other CPUs, or -DCUSIM_UCONTEXT, use the slower ucontext.
#pragma once
#include <cstddef>
#if !defined(__x86_64__) || defined(CUSIM_UCONTEXT)
#define CUSIM_USE_UCONTEXT 1
#include <ucontext.h>
#endif

namespace cusim {

#ifdef CUSIM_USE_UCONTEXT

struct Fibre {
  ucontext_t context;

  // Make the fibre ready to run entry() on the given stack. entry must never return.
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  // Leave this fibre, which is the running one, and go on where `to` was left.
  void switch_to(Fibre& to) { swapcontext(&context, &to.context); }
};

#else

extern "C" __attribute__((visibility("hidden"))) void cusim_switch(void** left, void* entered);

// System V ABI: rdi is where to keep the stack pointer left, rsi is the stack pointer to take on.
asm(R"(
    .text
    .type cusim_switch, @function
cusim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size cusim_switch, . - cusim_switch
)");

struct Fibre {
  void* stack_pointer;

  // Make the fibre ready to run entry() on the given stack. entry must never return.
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    // What cusim_switch pops: six registers, then the address to return to. The two words above keep
    // the stack aligned as a function's first instruction expects it.
    void** frame = reinterpret_cast<void**>(stack + bytes) - 8;
    frame[6] = reinterpret_cast<void*>(entry);
    frame[7] = nullptr;
    stack_pointer = frame;
  }
  // Leave this fibre, which is the running one, and go on where `to` was left.
  void switch_to(Fibre& to) { cusim_switch(&stack_pointer, to.stack_pointer); }
};

#endif

}  // namespace cusim
