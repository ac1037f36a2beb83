// Runs a Metal kernel on the CPU.
//
// Every thread of a threadgroup is a fiber. A fiber runs until it comes to a simd
// function or a barrier, and a schedule decides which runs next: in order, reversed or
// at random. A simd function needs all 32 lanes, and a barrier all threads, at the same
// line of the source; otherwise the run fails. The compiler reports every load and
// store (-fsanitize-coverage=trace-loads,trace-stores), which must lie in a buffer, in
// threadgroup memory or on the thread's stack, and two threads must not touch the same
// byte of threadgroup memory between barriers if one of them writes.
//
// usage: kernel JOB RESULT SCHEDULE...
// JOB: grid (3), threads per threadgroup (3), whether subnormal numbers are zero, as on
// some devices (1), buffers (1), then for each the role (0 input, 1 output) and the
// size, all as 64-bit integers; then the inputs' bytes.
// RESULT receives the outputs' bytes, which must be the same under all schedules.

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

// Of C++'s library only what is in its headers is used, so that none has to be built.
void* operator new(size_t size) { return malloc(size); }
void operator delete(void* p) noexcept { free(p); }
void operator delete(void* p, size_t) noexcept { free(p); }
void* operator new[](size_t size) { return malloc(size); }
void operator delete[](void* p) noexcept { free(p); }
void operator delete[](void* p, size_t) noexcept { free(p); }

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMU_ASAN 1
#include <sanitizer/common_interface_defs.h>
#endif
#endif

extern "C" void emu_entry();
#ifdef __linux__
extern "C" char __executable_start, _end;  // from the linker
#endif

// ---- fibers ------------------------------------------------------------------------

extern "C" void emu_switch(void** save, void* to);
#if defined(__x86_64__)
__attribute__((naked)) void emu_switch(void**, void*) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
constexpr int SAVED = 6, ENTRY = 6;
#elif defined(__aarch64__)
__attribute__((naked)) void emu_switch(void**, void*) {
  asm("sub sp, sp, #160\n"
      "stp x19, x20, [sp]\n stp x21, x22, [sp, #16]\n stp x23, x24, [sp, #32]\n"
      "stp x25, x26, [sp, #48]\n stp x27, x28, [sp, #64]\n stp x29, x30, [sp, #80]\n"
      "stp d8, d9, [sp, #96]\n stp d10, d11, [sp, #112]\n stp d12, d13, [sp, #128]\n"
      "stp d14, d15, [sp, #144]\n mov x9, sp\n str x9, [x0]\n mov sp, x1\n"
      "ldp x19, x20, [sp]\n ldp x21, x22, [sp, #16]\n ldp x23, x24, [sp, #32]\n"
      "ldp x25, x26, [sp, #48]\n ldp x27, x28, [sp, #64]\n ldp x29, x30, [sp, #80]\n"
      "ldp d8, d9, [sp, #96]\n ldp d10, d11, [sp, #112]\n ldp d12, d13, [sp, #128]\n"
      "ldp d14, d15, [sp, #144]\n add sp, sp, #160\n ret\n");
}
constexpr int SAVED = 20, ENTRY = 11;
#else
#error "fibers are written for x86-64 and aarch64"
#endif

namespace {

constexpr size_t STACK = 128 << 10;
constexpr int LANES = 32;

enum State { READY, EXCHANGE, BARRIER, SIMD_BARRIER, DONE };
const char* const STATES[] = {
    "running", "a simd function", "a threadgroup barrier", "a simdgroup barrier",
    "its end"};

struct Fiber {
  std::unique_ptr<char[]> stack{new char[STACK]};
  void* sp = nullptr;
  State state = READY;
  unsigned line = 0;
  unsigned parity = 0;
};

struct Simdgroup {
  uint64_t slots[2][LANES];  // a lane may be one exchange ahead of another
  unsigned epoch = 0;        // counts simdgroup barriers
};

// Who touched a byte last. Threads count from 1.
struct Access {
  unsigned thread = 0, epoch = 0, simd_epoch = 0;
};
struct Shadow {
  Access write, add, read[2];
};

struct Memory {
  char* data = nullptr;
  size_t size = 0;
  bool output = false;
  std::vector<Shadow> shadow;      // of threadgroup memory
  std::vector<unsigned> writers;   // of outputs: global thread
};

uint64_t grid[3], group_size[3], group_at[3], group_threads[3];
std::vector<Memory> buffers;
std::vector<Memory> shared(4096);  // by slot
std::vector<unsigned> slots_in_use;
std::vector<Fiber> fibers;
std::vector<Simdgroup> simdgroups;
void* scheduler_sp;
unsigned current, n_threads, n_done, epoch;
uint64_t group_number;
const char* schedule;
std::mt19937 rng;

[[noreturn]] void fail(const char* format, ...) {
  va_list args;
  va_start(args, format);
  fprintf(stderr, "emulator: ");
  vfprintf(stderr, format, args);
  fprintf(stderr, " (schedule %s)\n", schedule);
  fflush(stderr);
  _Exit(3);
}

const void* scheduler_stack;
size_t scheduler_stack_size;
// AddressSanitizer wants to know of every switch of stacks.
#ifdef EMU_ASAN
void leave(void** fake, const void* stack, size_t size) {
  __sanitizer_start_switch_fiber(fake, stack, size);
}
void arrive(void* fake, const void** stack, size_t* size) {
  __sanitizer_finish_switch_fiber(fake, stack, size);
}
#else
void leave(void**, const void*, size_t) {}
void arrive(void*, const void**, size_t*) {}
#endif

void to_scheduler() {
  void* fake = nullptr;
  bool done = fibers[current].state == DONE;
  leave(done ? nullptr : &fake, scheduler_stack, scheduler_stack_size);
  emu_switch(&fibers[current].sp, scheduler_sp);
  arrive(fake, &scheduler_stack, &scheduler_stack_size);
}

void fiber_main() {
  arrive(nullptr, &scheduler_stack, &scheduler_stack_size);
  emu_entry();
  fibers[current].state = DONE;
  n_done++;
  to_scheduler();
  abort();
}

void to_fiber(unsigned i) {
  current = i;
  void* fake = nullptr;
  leave(&fake, fibers[i].stack.get(), STACK);
  emu_switch(&scheduler_sp, fibers[i].sp);
  arrive(fake, nullptr, nullptr);
}

void prepare(Fiber& fiber) {
  auto top = uintptr_t(fiber.stack.get() + STACK) & ~uintptr_t(63);
  auto sp = (void**)top - SAVED - 2;
  memset(sp, 0, (SAVED + 2) * sizeof(void*));
  sp[ENTRY] = (void*)fiber_main;
#if defined(__x86_64__)
  // A function expects the stack 8 bytes off 16 at its entry.
  if ((uintptr_t(sp + ENTRY) & 15) != 0) {
    sp--;
    memset(sp, 0, SAVED * sizeof(void*));
    sp[ENTRY] = (void*)fiber_main;
  }
#endif
  fiber.sp = sp;
  fiber.state = READY;
  fiber.parity = 0;
}

void wait(State state, unsigned line) {
  fibers[current].state = state;
  fibers[current].line = line;
  to_scheduler();
}

// Lets go the waiting threads first .. first + n if all of them are there.
bool release(unsigned first, unsigned n, State state) {
  for (unsigned i = first; i < first + n; i++) {
    if (fibers[i].state != state) return false;
  }
  for (unsigned i = first; i < first + n; i++) {
    if (fibers[i].line != fibers[first].line) {
      fail("divergent: threads %u and %u are at %s in lines %u and %u", first, i,
           STATES[state], fibers[first].line, fibers[i].line);
    }
    fibers[i].state = READY;
  }
  return true;
}

void run_group() {
  n_done = 0;
  epoch = 1;
  for (auto slot : slots_in_use) {
    free(shared[slot].data);
    shared[slot].data = nullptr;
  }
  slots_in_use.clear();
  for (unsigned i = 0; i < n_threads; i++) prepare(fibers[i]);
  simdgroups.assign((n_threads + LANES - 1) / LANES, Simdgroup());
  std::vector<unsigned> order(n_threads);
  for (unsigned i = 0; i < n_threads; i++) {
    order[i] = strcmp(schedule, "reversed") ? i : n_threads - 1 - i;
  }
  bool random = strncmp(schedule, "random", 6) == 0;
  while (n_done < n_threads) {
    bool any = false;
    if (random) std::shuffle(order.begin(), order.end(), rng);
    for (unsigned i : order) {
      // A random schedule leaves some threads behind.
      if (fibers[i].state != READY || (random && rng() % 4 == 0)) {
        any |= fibers[i].state == READY;
        continue;
      }
      any = true;
      to_fiber(i);
      if (fibers[i].state == EXCHANGE || fibers[i].state == SIMD_BARRIER) {
        unsigned first = i / LANES * LANES;
        unsigned n = std::min<unsigned>(LANES, n_threads - first);
        if (release(first, n, EXCHANGE)) any = true;
        if (release(first, n, SIMD_BARRIER)) simdgroups[i / LANES].epoch++;
      }
    }
    if (release(0, n_threads, BARRIER)) any = true;
    if (!any) {
      char what[600] = "divergent: threads wait for each other:";
      State last = READY;
      unsigned line = 0;
      for (unsigned i = 0; i < n_threads; i++) {
        if (fibers[i].state != last || fibers[i].line != line) {
          last = fibers[i].state;
          line = fibers[i].line;
          size_t n = strlen(what);
          snprintf(what + n, sizeof(what) - n, " thread %u at %s in line %u;", i,
                   STATES[last], line);
        }
      }
      fail("%s", what);
    }
  }
}

// ---- memory ------------------------------------------------------------------------

// From now on this process reads subnormal numbers as zero and writes zero for them.
void flush_subnormals() {
#if defined(__x86_64__)
  unsigned control;
  asm volatile("stmxcsr %0" : "=m"(control));
  control |= 0x8040;
  asm volatile("ldmxcsr %0" : : "m"(control));
#else
  uint64_t control;
  asm volatile("mrs %0, fpcr" : "=r"(control));
  control |= 1 << 24;
  asm volatile("msr fpcr, %0" : : "r"(control));
#endif
}

unsigned global_thread() { return unsigned(group_number * 4096 + current + 1); }

bool ordered(const Access& before) {
  unsigned thread = current + 1;
  if (!before.thread || before.thread == thread || before.epoch != epoch) return true;
  unsigned simdgroup = current / LANES;
  return (before.thread - 1) / LANES == simdgroup &&
      before.simd_epoch != simdgroups[simdgroup].epoch;
}

enum Kind { LOAD, STORE, ADD };

void touch_shared(Memory& memory, size_t at, size_t size, Kind kind) {
  Access now{current + 1, epoch, simdgroups[current / LANES].epoch};
  for (size_t i = at; i < at + size; i++) {
    Shadow& s = memory.shadow[i];
    const Access* race = nullptr;
    if (!ordered(s.write)) race = &s.write;
    // Additions commute with each other, and with nothing else.
    if (kind != ADD && !ordered(s.add)) race = &s.add;
    if (kind != LOAD) {
      for (auto& read : s.read) {
        if (!ordered(read)) race = &read;
      }
    }
    if (race) {
      fail("data race on threadgroup memory (line %u of the kernel, byte %zu): thread "
           "%u %s what thread %u touched since the last barrier",
           unsigned(&memory - shared.data()), i, current,
           kind == LOAD ? "reads" : "writes", race->thread - 1);
    }
    if (kind != STORE && !s.write.thread) {
      fail("threadgroup memory (line %u of the kernel, byte %zu) is read by thread %u "
           "before it is written",
           unsigned(&memory - shared.data()), i, current);
    }
    if (kind == LOAD) {
      // Two different readers are enough: a writer differs from one of them.
      if (s.read[0].thread != now.thread) s.read[1] = s.read[0];
      s.read[0] = now;
    } else {
      (kind == ADD ? s.add : s.write) = now;
    }
  }
}

void touch(const void* address, size_t size, Kind kind) {
  auto p = (const char*)address;
  auto within = [&](const char* data, size_t n) {
    return p >= data && size_t(p - data) + size <= n;
  };
  if (within(fibers[current].stack.get(), STACK)) return;
  for (auto slot : slots_in_use) {
    Memory& memory = shared[slot];
    if (within(memory.data, memory.size)) {
      return touch_shared(memory, p - memory.data, size, kind);
    }
  }
  for (auto& memory : buffers) {
    if (!within(memory.data, memory.size)) continue;
    if (!memory.output) {
      if (kind != LOAD) fail("thread %u writes to an input", current);
      return;
    }
    for (size_t i = p - memory.data; i < size_t(p - memory.data) + size; i++) {
      unsigned& writer = memory.writers[i];
      if (writer && writer != global_thread()) {
        fail("data race on an output: byte %zu is touched by two threads", i);
      }
      if (!writer && kind == LOAD) fail("output byte %zu is read before written", i);
      writer = global_thread();
    }
    return;
  }
  // What the lanes exchanged, and constants of the program.
  auto groups = (const char*)simdgroups.data();
  if (within(groups, simdgroups.size() * sizeof(Simdgroup))) return;
#ifdef __linux__
  if (kind == LOAD && within(&__executable_start, &_end - &__executable_start)) return;
#endif
  fail("out of range: thread %u of threadgroup %llu %s %zu bytes outside of all buffers",
       current, (unsigned long long)group_number, kind == LOAD ? "reads" : "writes",
       size);
}

}  // namespace

// ---- what the kernel calls ---------------------------------------------------------

extern "C" {

const void* emu_exchange(const void* value, size_t size, unsigned line) {
  Fiber& fiber = fibers[current];
  auto& slots = simdgroups[current / LANES].slots[fiber.parity];
  fiber.parity ^= 1;
  memcpy(&slots[current % LANES], value, size);
  wait(EXCHANGE, line);
  return slots;
}

void emu_barrier(unsigned flags, unsigned line) {
  unsigned before = epoch;
  wait(BARRIER, line);
  // The first to go on opens the new epoch. A barrier orders what it names.
  if ((flags & 2) && epoch == before) epoch = before + 1;
}

void emu_simdgroup_barrier(unsigned line) { wait(SIMD_BARRIER, line); }

unsigned emu_lane() { return current % LANES; }

void* emu_shared(size_t size, unsigned slot) {
  Memory& memory = shared.at(slot);
  if (!memory.data) {
    memory.data = (char*)malloc(size);
    memory.size = size;
    for (size_t i = 0; i < size; i++) memory.data[i] = char(rng());
    memory.shadow.assign(size, Shadow());
    slots_in_use.push_back(slot);
  }
  return memory.data;
}

uintptr_t emu_buffer(unsigned index) { return uintptr_t(buffers.at(index).data); }

unsigned emu_position(unsigned what, unsigned axis) {
  uint64_t at = current;
  if (axis > 0) at /= group_threads[0];
  if (axis > 1) at /= group_threads[1];
  if (axis < 2) at %= group_threads[axis];
  switch (what) {
    case 0: return unsigned(at);                                      // in threadgroup
    case 1: return unsigned(group_at[axis]);                          // threadgroup
    case 2: return unsigned(group_at[axis] * group_size[axis] + at);  // in grid
    case 3: return unsigned(group_threads[axis]);   // threads per threadgroup
    default: return unsigned(grid[axis]);           // threads per grid
  }
}

unsigned emu_atomic(unsigned* p, unsigned value, unsigned operation) {
  constexpr unsigned OR = 3;  // to the watch over races like ADD: any order will do
  touch(p, 4, operation == OR ? ADD : Kind(operation));
  unsigned before = *p;
  if (operation == STORE) *p = value;
  if (operation == ADD) *p = before + value;
  if (operation == OR) *p = before | value;
  return before;
}

#define HOOK(N)                                                                    \
  void __sanitizer_cov_load##N(void* p) { touch(p, N, LOAD); }                     \
  void __sanitizer_cov_store##N(void* p) { touch(p, N, STORE); }
HOOK(1)
HOOK(2)
HOOK(4)
HOOK(8)
HOOK(16)

}  // extern "C"

int main(int argc, char** argv) {
  FILE* job = argc < 4 ? nullptr : fopen(argv[1], "rb");
  if (!job) fail("usage: %s JOB RESULT SCHEDULE...", argv[0]);
  auto read = [&](void* to, size_t size) {
    if (size && fread(to, 1, size, job) != size) fail("the job file is too short");
  };
  uint64_t n_buffers, flush;
  read(grid, sizeof(grid));
  read(group_size, sizeof(group_size));
  read(&flush, sizeof(flush));
  if (flush) flush_subnormals();
  read(&n_buffers, sizeof(n_buffers));
  buffers.resize(n_buffers);
  std::vector<std::vector<char>> inputs(n_buffers);
  for (auto& memory : buffers) {
    uint64_t header[2];
    read(header, sizeof(header));
    memory.output = header[0];
    memory.size = header[1];
  }
  for (size_t i = 0; i < n_buffers; i++) {
    if (buffers[i].output) continue;
    inputs[i].resize(buffers[i].size);
    read(inputs[i].data(), inputs[i].size());
  }
  fclose(job);

  std::vector<std::vector<char>> results;
  fibers.resize(group_size[0] * group_size[1] * group_size[2]);
  for (int run = 3; run < argc; run++) {
    schedule = argv[run];
    rng.seed(run * 7919);
    for (size_t i = 0; i < n_buffers; i++) {
      Memory& memory = buffers[i];
      memory.data = (char*)malloc(memory.size);  // exactly: the sanitizer guards it
      if (!memory.output) memcpy(memory.data, inputs[i].data(), memory.size);
      memory.writers.assign(memory.output ? memory.size : 0, 0);
    }
    group_number = 0;
    uint64_t n_groups[3];
    for (int a = 0; a < 3; a++) n_groups[a] = (grid[a] + group_size[a] - 1) / group_size[a];
    for (group_at[2] = 0; group_at[2] < n_groups[2]; group_at[2]++) {
      for (group_at[1] = 0; group_at[1] < n_groups[1]; group_at[1]++) {
        for (group_at[0] = 0; group_at[0] < n_groups[0]; group_at[0]++) {
          n_threads = 1;
          for (int a = 0; a < 3; a++) {
            uint64_t left = grid[a] - group_at[a] * group_size[a];
            group_threads[a] = left < group_size[a] ? left : group_size[a];
            n_threads *= group_threads[a];
          }
          run_group();
          group_number++;
        }
      }
    }
    size_t output = 0;
    for (auto& memory : buffers) {
      if (memory.output) {
        for (size_t i = 0; i < memory.size; i++) {
          if (!memory.writers[i]) fail("output %zu: byte %zu is never written", output, i);
        }
        std::vector<char> result(memory.data, memory.data + memory.size);
        if (run == 3) {
          results.push_back(result);
        } else if (result != results[output]) {
          fail("output %zu depends on the schedule", output);
        }
        output++;
      }
      free(memory.data);
      memory.data = nullptr;
    }
  }
  FILE* file = fopen(argv[2], "wb");
  for (auto& result : results) fwrite(result.data(), 1, result.size(), file);
  fclose(file);
  return 0;
}
