// Stack switching for the emulator: a hand-written switch on x86-64, ucontext elsewhere
// (swapcontext makes two system calls per switch: about 260 ns against 5).
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_FAST_SWITCH 1
#else
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

#ifdef SIMT_FAST_SWITCH
extern "C" void simt_switch(void** save_stack, void* load_stack);
asm(R"(
.text
.local simt_switch
.type simt_switch,@function
simt_switch:
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
.size simt_switch,.-simt_switch
)");
#endif

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 * 1024;
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif

// One context: the scheduler's own, or a fiber's with its stack.
struct Context {
#ifdef SIMT_FAST_SWITCH
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* stack = nullptr;  // lowest address, nullptr for the scheduler
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's

  void prepare(void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
    // A launch that failed leaves the frames of its fibers behind.
    __asan_unpoison_memory_region(stack, stack_bytes);
#endif
#ifdef SIMT_FAST_SWITCH
    // entry() must find the stack as after a call: 8 bytes off a 16-byte boundary.
    void** top = reinterpret_cast<void**>(static_cast<char*>(stack) + stack_bytes - 16);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_pointer = top;
#else
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = stack_bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
#endif
  }
};

// `last`: `from` never runs again.
inline void switch_context(Context& from, Context& to, bool last = false) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
#ifdef SIMT_FAST_SWITCH
  simt_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
  (void)last;
}

// First statement of a fiber's entry: tells the sanitizer where the switch came from.
inline void entered_from(Context& scheduler) {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  scheduler.stack = const_cast<void*>(bottom);
  scheduler.stack_bytes = bytes;
#endif
  (void)scheduler;
}

// Stacks are mapped once and reused; the page below each is a guard.
class StackPool {
 public:
  void* get(size_t index) {
    while (stacks_.size() <= index) {
      const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
      void* area = mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (area == MAP_FAILED) return nullptr;
      mprotect(area, page, PROT_NONE);
      stacks_.push_back(static_cast<char*>(area) + page);
    }
    return stacks_[index];
  }

 private:
  std::vector<void*> stacks_;
};

}  // namespace simt
