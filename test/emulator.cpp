// emulator.cpp - the machine behind emulator.h: threads as fibers, barriers, shared memory, races,
// streams. Never compiled with -fsanitize=thread.
#include "emulator.h"
#include <chrono>
#include <deque>
#include <functional>
#include <map>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
#include <vector>
#ifndef __has_feature
#define __has_feature(x) 0
#endif
#if defined __SANITIZE_ADDRESS__ || __has_feature(address_sanitizer)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define ASAN 1
#else
#define ASAN 0
#endif

enum {
    STACK = 256 << 10,       // bytes of a fiber's stack
    PAGE = 4096,             // below each stack, not accessible
    ARENA = 320 << 10,       // bytes for all shared arrays of a block and the gaps between them
    GAP = 1 << 10,           // bytes before and behind each shared array
    STATIC_LIMIT = 48 << 10, // of shared memory, as on a GPU, and without the attribute
    SHARED_LIMIT = 227 << 10 // with it
};

// A fiber's stack. The host's own is one of them.
struct stack {
    void *sp;
    char *bottom;
    size_t size;
    void *fake; // AddressSanitizer's
};

// A cp.async that has not been waited for.
struct copy {
    char *to;
    const char *from;
    int bytes, group, line;
};

struct alignas(64) thread {
    uint3 index;
    uint32_t mask;  // of the warp operation in which it waits
    stack *on;      // NULL until it begins
    const char *at; // what it waits in, and in which line
    int line;
    int group;  // of its next cp.async
    bool waits; // in a chained launch, until wait_for_previous
    std::vector<copy> copies;
};

// Lanes of a warp that wait in the same operation.
struct group {
    const char *at;
    uint32_t mask, arrived;
    void (*complete)(group *g);
};

struct warp {
    uint32_t live, ready; // lanes that have not returned; lanes that can run
    int group_count;      // used of groups
    group groups[32];
    void *argument[32];       // of the operation in which each lane waits
    uint32_t ordered[32][32]; // [j][i]: what lane i did before this time is known to lane j
};

emulator_coordinates emulator_at;
static thread threads[1024];
static thread *current; // NULL while the host runs
static thread *ended;   // the last that returned
static warp warps[32];
static uint32_t ready_warps; // warps with lanes that can run
static unsigned thread_count, ended_count;
static int order;      // EMULATOR_ORDER
static int burst_warp; // the warp that runs, in order 2
static uint64_t random_state;

static unsigned lane_of(const thread *t) { return (unsigned)(t - threads) % 32; }
static warp *warp_of(const thread *t) { return warps + (t - threads) / 32; }

// The first of some lanes of a warp.
static thread *thread_at(const warp *w, uint32_t lanes) {
    return threads + (w - warps) * 32 + __builtin_ctz(lanes);
}

// for (unsigned lane : lanes{mask}) runs over the bits of a mask that are 1, the lowest first.
struct lanes {
    struct iterator {
        uint32_t rest;
        unsigned operator*() const { return (unsigned)__builtin_ctz(rest); }
        bool operator!=(const iterator &) const { return rest != 0; }
        void operator++() { rest &= rest - 1; }
    };
    uint32_t mask;
    iterator begin() const { return {mask}; }
    iterator end() const { return {0}; }
};

// A short text. It stays as it is until four more have been made.
__attribute__((format(printf, 1, 2))) static const char *text(const char *format, ...) {
    static char texts[4][48];
    static unsigned next;
    char *s = texts[next++ % 4];
    va_list args;
    va_start(args, format);
    vsnprintf(s, sizeof texts[0], format, args);
    va_end(args);
    return s;
}

static const char *name_of(const thread *t) {
    return text("thread (%u,%u,%u)", t->index.x, t->index.y, t->index.z);
}

// Ends the process with a line about what the kernel, or the host, has done wrong.
__attribute__((format(printf, 1, 2), noreturn)) static void fail(const char *format, ...) {
    char what[1000];
    va_list args;
    va_start(args, format);
    vsnprintf(what, sizeof what, format, args);
    va_end(args);
    fflush(stdout);
    if (current) {
        fprintf(stderr, "emulator: block (%u,%u,%u) %s: %s\n", blockIdx.x, blockIdx.y, blockIdx.z,
                name_of(current), what);
    } else {
        fprintf(stderr, "emulator: %s\n", what);
    }
    _exit(70);
}

static uint32_t random_bits(void) { // xorshift64*
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return (uint32_t)(random_state * 0x2545f4914f6cdd1d >> 32);
}

static uint64_t environment(const char *name, uint64_t otherwise) {
    const char *value = getenv(name);
    return value ? strtoull(value, NULL, 0) : otherwise;
}

extern "C" void emulator_order(int kind, uint64_t seed) {
    order = kind;
    burst_warp = 0;
    random_state = (seed + 1) * 0x9e3779b97f4a7c15 | 1;
    for (int i = 0; i < 8; i++) random_bits();
}

__attribute__((constructor)) static void read_order(void) {
    emulator_order((int)environment("EMULATOR_ORDER", 0), environment("EMULATOR_SEED", 0));
}

// ---- Races -------------------------------------------------------------------------------------
// Time (`now`) passes with every block, barrier and __syncwarp. For every byte of memory a cell
// says who wrote it last and who has read it since. An access must be ordered behind those that it
// conflicts with: by a barrier, by __syncwarp, or because the same thread did both. The blocks of a
// launch are not ordered, but one that did an atomic operation may know what others wrote.
//
// Accesses are reported by a code: with the top bit a line of the .cu file, without it an address
// in the program, for addr2line.
static const uint32_t LINE_BIT = 1u << 31;
static const unsigned SEVERAL_WARPS = 254, OTHER_BLOCK = 255; // as read_warp

struct cell {
    uint32_t write_time, write_code;
    uint32_t read_time, read_code, readers; // readers: lanes of read_warp
    uint16_t writer;                        // index of the thread
    uint8_t read_warp;
    bool in_flight; // a cp.async fills it
};

// In shared memory.
struct array {
    const char *name;
    char *at;
    size_t bytes;
};

struct allocation {
    size_t bytes;
    bool on_device;
    cell *cells;
};

// One access to one byte.
struct touch {
    cell *c;
    bool shared, write;
    uint32_t code;
    const char *array;
    size_t byte; // of that array
};

// These, and the streams, are never destroyed: the host may use them until the program ends.
typedef std::map<const char *, allocation> allocation_map;
static allocation_map &allocations = *new allocation_map;

static std::vector<array> arrays;      // the dynamic one first
alignas(128) static char arena[ARENA]; // shared memory
static cell shared_cells[ARENA];
static bool watching; // the kernels are instrumented
static bool acquired; // this block did an atomic operation
static uint32_t now, launch_start, block_start, barrier_time;
static std::vector<char> call; // the kernel's arguments

static bool in_arena(const void *p) { return (char *)p >= arena && (char *)p < arena + ARENA; }

// The last allocation that begins at or before p.
static const std::pair<const char *const, allocation> *allocation_at(const void *p) {
    auto next = allocations.upper_bound((const char *)p);
    return next == allocations.begin() ? NULL : &*--next;
}

static uint32_t line_code(int line) { return LINE_BIT | (uint32_t)line; }
static const char *code_name(uint32_t code) {
    return code & LINE_BIT ? text("line %u", code & ~LINE_BIT) : text("+0x%x", code);
}

// Who did the earlier access of a race: the last write, or reads since.
static const char *racer(const cell *c, bool written) {
    uint32_t time = written ? c->write_time : c->read_time;
    if (time < block_start || (!written && c->read_warp == OTHER_BLOCK)) return "another block";
    if (written) return name_of(threads + c->writer);
    if (c->read_warp == SEVERAL_WARPS) return "threads of several warps";
    const warp *readers = warps + c->read_warp;
    uint32_t me = warp_of(current) == readers ? 1u << lane_of(current) : 0;
    return name_of(thread_at(readers, c->readers & ~me));
}

__attribute__((noreturn)) static void race(const touch &t, bool written) {
    uint32_t other = written ? t.c->write_code : t.c->read_code;
    fail("race: %s byte %zu of %s, %s by %s, and nothing orders them (code: %s and %s)",
         t.write ? "writes" : "reads", t.byte, t.array, written ? "written" : "read",
         racer(t.c, written), code_name(t.code), code_name(other));
}

// The access must be ordered behind the last write, and a read of shared memory needs one.
static void check_last_write(const touch &t, unsigned me) {
    const cell *c = t.c;
    if (c->write_time >= barrier_time) {
        const uint32_t *ordered = warps[me / 32].ordered[me % 32];
        bool same_warp = c->writer / 32 == me / 32;
        bool known = same_warp && c->write_time < ordered[c->writer % 32];
        if (c->writer != me && !known) race(t, true);
        return;
    }
    if (t.shared && c->write_time < block_start && !t.write)
        fail("reads byte %zu of %s, which nobody has written (code: %s)", t.byte, t.array,
             code_name(t.code));
    bool other_block = c->write_time >= launch_start && c->write_time < block_start;
    if (!t.shared && other_block && !acquired) race(t, true);
}

// A write must be ordered behind all reads since the last write. Of those only what may still race
// is kept: reads in other blocks, in several warps, or in lanes of one warp.
static void check_reads(const touch &t, unsigned me) {
    cell *c = t.c;
    bool other_block = !t.shared && !acquired && c->read_time >= launch_start &&
                       (c->read_time < block_start || c->read_warp == OTHER_BLOCK);
    bool since_barrier = c->read_time >= barrier_time;
    bool several = since_barrier && c->read_warp != me / 32;
    uint32_t unordered = 0; // other lanes of this warp that have read it
    if (since_barrier && !several) {
        const uint32_t *ordered = warps[me / 32].ordered[me % 32];
        for (unsigned lane : lanes{c->readers & ~(1u << me % 32)})
            if (c->read_time >= ordered[lane]) unordered |= 1u << lane;
    }
    if (t.write) {
        if (other_block || several || unordered) race(t, false);
        return;
    }
    c->read_warp = (uint8_t)(other_block ? OTHER_BLOCK : several ? SEVERAL_WARPS : me / 32);
    c->readers = unordered | 1u << me % 32;
    c->read_code = t.code;
    if (!other_block) c->read_time = now;
}

size_t emulator_bytes_read, emulator_bytes_written;

// A byte counts once in a launch, and not as read if the launch wrote it before.
static void count_byte(const touch &t) {
    if (t.shared || t.c->write_time >= launch_start) return;
    if (t.write) emulator_bytes_written++;
    else if (t.c->read_time < launch_start) emulator_bytes_read++;
}

static void touch_byte(const touch &t) {
    unsigned me = (unsigned)(current - threads);
    count_byte(t);
    if (t.c->in_flight)
        fail("touches byte %zu of %s, which a cp.async of %s still fills (code: %s)", t.byte,
             t.array, name_of(threads + t.c->writer), code_name(t.code));
    check_last_write(t, me);
    check_reads(t, me);
    if (!t.write) return;
    t.c->write_time = now;
    t.c->write_code = t.code;
    t.c->writer = (uint16_t)me;
}

// No other thread can touch a thread's stack, and nobody writes the arguments and the coordinates.
static bool is_private(const char *p) {
    const char *stack = current->on->bottom;
    if (p >= stack && p < stack + STACK) return true;
    if (p >= call.data() && p < call.data() + call.size()) return true;
    return p >= (char *)&emulator_at && p < (char *)(&emulator_at + 1);
}

// The array in which p … p + bytes - 1 are, and its cells, NULL for memory of the host that the GPU
// may use. false if they are in none.
static bool find_array(const char *p, size_t bytes, array *found, cell **cells) {
    for (const array &a : arrays) {
        if (p < a.at || p + bytes > a.at + a.bytes) continue;
        *found = a;
        *cells = shared_cells + (a.at - arena);
        return true;
    }
    auto allocated = allocation_at(p);
    if (!allocated || p + bytes > allocated->first + allocated->second.bytes) return false;
    *found = {"device memory", (char *)allocated->first, allocated->second.bytes};
    *cells = allocated->second.cells;
    return true;
}

static void access(const void *address, size_t bytes, bool write, uint32_t code) {
    const char *p = (const char *)address;
    if (!watching || !current || !bytes || is_private(p)) return;
    bool shared = in_arena(p);
    array a;
    cell *cells;
    if (!find_array(p, bytes, &a, &cells))
        fail("touches %zu bytes %s (code: %s)", bytes,
             shared ? "of shared memory in no array" : "of no memory of the GPU", code_name(code));
    if (!shared && current->waits)
        fail("touches memory of the GPU before wait_for_previous (code: %s)", code_name(code));
    if (!cells) return;
    size_t first = (size_t)(p - a.at);
    for (size_t i = first; i < first + bytes; i++)
        touch_byte({cells + i, shared, write, code, a.name, i});
}

// What -fsanitize=thread makes of loads and stores.
extern "C" char __executable_start;
#define HERE ((uint32_t)((char *)__builtin_return_address(0) - &__executable_start) & ~LINE_BIT)
#define HOOK(name, n, write) \
    void __tsan_##name##n(void *p) { access(p, n, write, HERE); }
#define HOOKS(n)                            \
    HOOK(read, n, false)                    \
    HOOK(unaligned_read, n, false)          \
    HOOK(volatile_read, n, false)           \
    HOOK(unaligned_volatile_read, n, false) \
    HOOK(write, n, true)                    \
    HOOK(unaligned_write, n, true)          \
    HOOK(volatile_write, n, true)           \
    HOOK(unaligned_volatile_write, n, true)
extern "C" {
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_init(void) { watching = true; }
void __tsan_func_entry(void *) {}
void __tsan_func_exit(void) {}
void __tsan_vptr_read(void *) {}
void __tsan_vptr_update(void *, void *) {}
void __tsan_read_range(void *p, size_t n) { access(p, n, false, HERE); }
void __tsan_write_range(void *p, size_t n) { access(p, n, true, HERE); }
void *__tsan_memset(void *p, int byte, size_t n) {
    access(p, n, true, HERE);
    return memset(p, byte, n);
}
void *__tsan_memmove(void *to, const void *from, size_t n) {
    access(from, n, false, HERE);
    access(to, n, true, HERE);
    return memmove(to, from, n);
}
void *__tsan_memcpy(void *to, const void *from, size_t n) {
    access(from, n, false, HERE);
    access(to, n, true, HERE);
    return memcpy(to, from, n);
}
// Of the guards of static variables.
uint8_t __tsan_atomic8_load(const volatile uint8_t *p, int) {
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}
}

// ---- Fibers ------------------------------------------------------------------------------------
static stack host, stacks[1024];
static stack *idle[1024]; // stacks whose threads have returned
static unsigned idle_count, stack_count;

// Saves the stack pointer in *from and goes on where `to` was saved.
extern "C" void emulator_switch(void **from, void *to);
#if defined __x86_64__ && !defined EMULATOR_UCONTEXT
// The jump at the end is predicted well, unlike ret.
__asm__(".text\n"
        ".globl emulator_switch\n"
        "emulator_switch:\n"
        "pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n"
        "movq %rsp, (%rdi)\n"
        "movq %rsi, %rsp\n"
        "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp\n"
        "popq %rcx; jmp *%rcx\n");

// What the first switch to a stack pops: six registers, where to begin, and above them a return
// address of 0 at rsp % 16 == 8.
static void *first_frame(char *top, void (*entry)(void)) {
    void **sp = (void **)top - 8;
    memset(sp, 0, 64);
    sp[6] = (void *)entry;
    return sp;
}
#else
extern "C" void emulator_switch(void **from, void *to) {
    ucontext_t here;
    *from = &here;
    swapcontext(&here, (ucontext_t *)to);
}

static void *first_frame(char *top, void (*entry)(void)) {
    ucontext_t *context = new ucontext_t;
    getcontext(context);
    context->uc_stack.ss_sp = top - STACK / 2;
    context->uc_stack.ss_size = STACK / 2;
    makecontext(context, entry, 0);
    return context;
}
#endif

// Tells AddressSanitizer that a switch is done.
static void arrive(void *fake) {
#if ASAN
    const void *bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(fake, &bottom, &size);
    if (!host.bottom) { // the first switch of all comes from the host
        host.bottom = (char *)bottom;
        host.size = size;
    }
#endif
    (void)fake;
}

static void switch_stack(stack *from, stack *to) {
#if ASAN
    __sanitizer_start_switch_fiber(&from->fake, to->bottom, to->size);
#endif
    emulator_switch(&from->sp, to->sp);
    arrive(from->fake);
}

static void fiber(void);
static stack *new_stack(void) {
    if (idle_count) return idle[--idle_count];
    char *base = (char *)mmap(NULL, STACK + PAGE, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED || mprotect(base, PAGE, PROT_NONE))
        fail("no memory for a thread's stack");
    // Tops of stacks lie in different sets of the cache.
    char *top = base + PAGE + STACK - stack_count * 13 % 64 * 64;
    stack *s = &stacks[stack_count++];
    *s = {first_frame(top, fiber), base + PAGE, STACK, NULL};
    return s;
}

// The first bit that is 1 at or behind a random place.
static unsigned random_bit_of(uint32_t mask) {
    uint32_t r = random_bits() % 32;
    uint32_t rotated = mask >> r | mask << (32 - r) % 32;
    return (r + (uint32_t)__builtin_ctz(rotated)) % 32;
}

__attribute__((noreturn)) static void deadlock(void) {
    for (warp *w = warps; w < warps + 32; w++)
        for (const group &g : w->groups) {
            if (!(w->live & g.arrived)) continue;
            const thread *missing = thread_at(w, g.mask & w->live & ~g.arrived);
            current = thread_at(w, g.arrived);
            fail("%s at line %d, mask 0x%08x, waits for %s, "
                 "which waits in %s at line %d, mask 0x%08x",
                 g.at, current->line, g.mask, name_of(missing), missing->at, missing->line,
                 missing->mask);
        }
    fail("no thread can go on");
}

static thread *next_thread(void) {
    if (!ready_warps) deadlock();
    if (order == 0) {
        const warp *first = warps + __builtin_ctz(ready_warps);
        return thread_at(first, first->ready);
    }
    bool burst_ends = !warps[burst_warp].ready;
    if (order == 1 || burst_ends) burst_warp = (int)random_bit_of(ready_warps);
    return threads + burst_warp * 32 + random_bit_of(warps[burst_warp].ready);
}

static void run_next(void) {
    thread *from = current, *to = next_thread();
    current = to;
    threadIdx = to->index;
    if (!to->on) to->on = new_stack();
    if (to != from) switch_stack(from->on, to->on);
}

static void set_ready(warp *w, uint32_t lanes) {
    w->ready |= lanes;
    ready_warps |= 1u << (w - warps);
}

static void set_waiting(const thread *t) {
    warp *w = warp_of(t);
    w->ready &= ~(1u << lane_of(t));
    if (!w->ready) ready_warps &= ~(1u << (w - warps));
}

// ---- Barriers ----------------------------------------------------------------------------------
static unsigned barrier_arrived;    // threads that wait at the barrier
static const thread *barrier_first; // the first of them
static unsigned barrier_truths;     // how many of them said true
static unsigned last_truths;        // how many said true at the last barrier
static unsigned last_all;           // how many there were

static void barrier(const char *at, int predicate, int line) {
    thread *t = current;
    t->at = at;
    t->line = line;
    t->mask = 0;
    if (barrier_arrived == 0) {
        barrier_first = t;
        barrier_truths = 0;
    }
    barrier_arrived++;
    if (barrier_first->at != at || barrier_first->line != line)
        fail("%s at line %d, but %s waits in %s at line %d", at, line, name_of(barrier_first),
             barrier_first->at, barrier_first->line);
    if (ended_count) fail("%s at line %d, but %s has returned", at, line, name_of(ended));
    barrier_truths += predicate != 0;
    if (barrier_arrived < thread_count) {
        set_waiting(t);
    } else {
        last_truths = barrier_truths;
        last_all = thread_count;
        barrier_arrived = 0;
        barrier_time = ++now;
        for (unsigned i = 0; i < thread_count; i += 32)
            set_ready(warps + i / 32, warps[i / 32].live);
    }
    run_next(); // the result stands until all have read it, since the next barrier needs them all
}

// Names are compared by address.
static const char *const barriers[] = {"__syncthreads", "__syncthreads_or", "__syncthreads_and",
                                       "__syncthreads_count"};
void __syncthreads(int line) { barrier(barriers[0], 0, line); }
int __syncthreads_or(int predicate, int line) {
    barrier(barriers[1], predicate, line);
    return last_truths > 0;
}
int __syncthreads_and(int predicate, int line) {
    barrier(barriers[2], predicate, line);
    return last_truths == last_all;
}
int __syncthreads_count(int predicate, int line) {
    barrier(barriers[3], predicate, line);
    return (int)last_truths;
}

// ---- Warp operations ---------------------------------------------------------------------------
// Every lane leaves its arguments and waits. The last to arrive completes the operation for all.
static warp *acting; // whose operation is being completed

static void complete_if_all(warp *w, group *g) {
    if (!g->arrived || g->mask & w->live & ~g->arrived) return;
    acting = w;
    g->complete(g);
    set_ready(w, g->arrived);
    g->arrived = 0;
}

// The group that waits in this operation, or a free one. There are 32, and each that waits has at
// least one of the 32 lanes.
static group *find_group(warp *w, const char *at, uint32_t mask, void (*complete)(group *)) {
    group *end = w->groups + w->group_count;
    for (group *g = w->groups; g < end; g++)
        if (g->arrived && g->at == at && g->mask == mask) return g;
    group *g = w->groups;
    while (g < end && g->arrived) g++;
    if (g == end) w->group_count++;
    *g = {at, mask, 0, complete};
    return g;
}

static void warp_operation(const char *at, void (*complete)(group *), uint32_t mask, void *argument,
                           int line) {
    thread *t = current;
    warp *w = warp_of(t);
    unsigned lane = lane_of(t);
    t->at = at;
    t->line = line;
    t->mask = mask;
    w->argument[lane] = argument;
    if (!(mask >> lane & 1))
        fail("%s at line %d: its own lane is not in the mask 0x%08x", at, line, mask);
    group *g = find_group(w, at, mask, complete);
    g->arrived |= 1u << lane;
    set_waiting(t);
    complete_if_all(w, g);
    run_next();
}

// What lane i left as the argument of the operation that is being completed.
template <typename T> static T *argument_of(unsigned lane) { return (T *)acting->argument[lane]; }

// __syncwarp: each lane gets to know what any of them knows, and what they did.
static void order_lanes(group *g) {
    if (!watching) return;
    now++;
    for (unsigned i = 0; i < 32; i++) {
        uint32_t known = 0;
        for (unsigned j : lanes{g->arrived})
            if (acting->ordered[j][i] > known) known = acting->ordered[j][i];
        for (unsigned j : lanes{g->arrived})
            acting->ordered[j][i] = g->arrived >> i & 1 ? now : known;
    }
}
void __syncwarp(unsigned mask, int line) {
    warp_operation("__syncwarp", order_lanes, mask, NULL, line);
}

struct ballot {
    uint32_t predicate, votes;
};
static void count_votes(group *g) {
    uint32_t votes = 0;
    for (unsigned i : lanes{g->arrived}) votes |= argument_of<ballot>(i)->predicate << i;
    for (unsigned i : lanes{g->arrived}) argument_of<ballot>(i)->votes = votes;
}
static uint32_t vote(const char *at, unsigned mask, int predicate, int line) {
    ballot b = {predicate != 0, 0};
    warp_operation(at, count_votes, mask, &b, line);
    return b.votes;
}
unsigned __ballot_sync(unsigned mask, int predicate, int line) {
    return vote("__ballot_sync", mask, predicate, line);
}
int __any_sync(unsigned mask, int predicate, int line) {
    return vote("__any_sync", mask, predicate, line) != 0;
}
int __all_sync(unsigned mask, int predicate, int line) {
    return vote("__all_sync", mask, !predicate, line) == 0;
}

struct shuffle {
    uint64_t bits, result;
    int source; // a lane
};
// A lane that takes no part gives garbage, as on a GPU.
static void exchange(group *g) {
    for (unsigned i : lanes{g->arrived}) {
        shuffle *s = argument_of<shuffle>(i);
        bool takes_part = g->arrived >> s->source & 1;
        s->result = takes_part ? argument_of<shuffle>((unsigned)s->source)->bits : ~(uint64_t)0;
    }
}
uint64_t emulator_shfl(emulator_shuffle kind, unsigned mask, uint64_t bits, int by, int width,
                       int line) {
    static const char *const names[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync",
                                        "__shfl_xor_sync"};
    if (width < 1 || width > 32 || width & (width - 1))
        fail("%s at line %d: width %d is no power of 2 up to 32", names[kind], line, width);
    int lane = (int)lane_of(current), first = lane & -width; // of its part of the warp
    int sources[] = {first + (by & (width - 1)), lane - by, lane + by, lane ^ by};
    int source = sources[kind];
    bool outside = kind == EMULATOR_UP ? source < first : source >= first + width;
    shuffle s = {bits, 0, outside ? lane : source};
    warp_operation(names[kind], exchange, mask, &s, line);
    return s.result;
}

// ---- PTX: ldmatrix -----------------------------------------------------------------------------
static void need_all(const group *g) {
    if (g->arrived != ~0u)
        fail("%s at line %d needs all 32 lanes, not 0x%08x", g->at, current->line, g->arrived);
}

static void check_row(const void *shared, const char *what, int line) {
    if (!in_arena(shared)) fail("%s at line %d: not an address in shared memory", what, line);
    if ((uintptr_t)shared % 16)
        fail("%s at line %d: an address that is no multiple of 16", what, line);
}

// Lane 8i + row tells where a row of matrix i is. Lane l gets of each matrix the elements
// (l/4, 2(l%4)) and (l/4, 2(l%4) + 1); transposed: (2(l%4), l/4) and (2(l%4) + 1, l/4).
struct row_address {
    const char *row;
    uint32_t *r;
};

template <bool TRANSPOSED> static void load_pair(unsigned lane, int matrix) {
    for (unsigned j = 0; j < 2; j++) {
        unsigned row = TRANSPOSED ? lane % 4 * 2 + j : lane / 4;
        unsigned column = TRANSPOSED ? lane / 4 : lane % 4 * 2 + j;
        const char *element = argument_of<row_address>(matrix * 8 + row)->row + 2 * column;
        access(element, 2, false, line_code(current->line));
        memcpy((char *)&argument_of<row_address>(lane)->r[matrix] + 2 * j, element, 2);
    }
}

template <bool TRANSPOSED> static void load_matrices(group *g) {
    need_all(g);
    thread *last = current;
    for (unsigned lane = 0; lane < 32; lane++) {
        current = threads + (acting - warps) * 32 + lane; // who reads
        for (int matrix = 0; matrix < 4; matrix++) load_pair<TRANSPOSED>(lane, matrix);
    }
    current = last;
}

void ldmatrix(uint32_t r[4], const void *row, int line) {
    row_address a = {(const char *)row, r};
    check_row(row, "ldmatrix", line);
    warp_operation("ldmatrix", load_matrices<false>, ~0u, &a, line);
}
void ldmatrix_transposed(uint32_t r[4], const void *row, int line) {
    row_address a = {(const char *)row, r};
    check_row(row, "ldmatrix_transposed", line);
    warp_operation("ldmatrix_transposed", load_matrices<true>, ~0u, &a, line);
}

// ---- PTX: mma ----------------------------------------------------------------------------------
// Lane l holds, in this order:
//     of A (16,16)   (l/4, 2(l%4) + (0, 1)), those 8 rows below, then both again 8 columns on
//     of B (16,8)    (2(l%4) + (0, 1), l/4), and those 8 rows below
//     of C (16,8)    (l/4, 2(l%4) + (0, 1)), and those 8 rows below
struct factors {
    float *c;
    const void *a, *b;
};
static float number(const float *x) { return *x; }
static float number(const __nv_bfloat16 *x) { return __bfloat162float(*x); }

// Checked by the sanitizers, this alone would be half of their time.
__attribute__((no_sanitize("address", "undefined"))) static void
multiply_add(float c[16][8], const float a[16][16], const float b[16][8]) {
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 16; k++)
            for (int column = 0; column < 8; column++)
                c[row][column] = fmaf(a[row][k], b[k][column], c[row][column]);
}

template <typename T> static void multiply(group *g) {
    need_all(g);
    float a[16][16], b[16][8], c[16][8];
    for (unsigned l = 0; l < 32; l++) {
        const factors *f = argument_of<factors>(l);
        unsigned row = l / 4, pair = l % 4 * 2;
        for (int i = 0; i < 8; i++)
            a[row + i / 2 % 2 * 8][pair + i % 2 + i / 4 * 8] = number((const T *)f->a + i);
        for (int i = 0; i < 4; i++) b[pair + i % 2 + i / 2 * 8][row] = number((const T *)f->b + i);
        for (int i = 0; i < 4; i++) c[row + i / 2 * 8][pair + i % 2] = f->c[i];
    }
    multiply_add(c, a, b);
    for (unsigned l = 0; l < 32; l++)
        for (int i = 0; i < 4; i++)
            argument_of<factors>(l)->c[i] = c[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
}

void mma(float c[4], const uint32_t a[4], const uint32_t b[2], int line) {
    factors f = {c, a, b};
    warp_operation("mma", multiply<__nv_bfloat16>, ~0u, &f, line);
}
#ifndef EMULATOR_NO_MMA_F32
void mma(float c[4], const float a[8], const float b[4], int line) {
    factors f = {c, a, b};
    warp_operation("mma of fp32", multiply<float>, ~0u, &f, line);
}
#endif

// ---- PTX: cp.async -----------------------------------------------------------------------------
static void set_in_flight(char *shared, bool yes) {
    if (!watching) return;
    for (int i = 0; i < 16; i++) shared_cells[shared - arena + i].in_flight = yes;
}

// The destination holds NaNs until the copy is waited for.
void cp_async(void *shared, const void *global, int bytes, int line) {
    check_row(shared, "cp_async", line);
    if (bytes < 0 || bytes > 16 || (uintptr_t)global % 16)
        fail("cp_async at line %d: %d bytes from %p", line, bytes, global);
    access(global, (size_t)bytes, false, line_code(line));
    access(shared, 16, true, line_code(line));
    if (bytes) memcpy(shared, global, (size_t)bytes); // so that a sanitizer's trace names the line
    memset(shared, 0xff, 16);
    set_in_flight((char *)shared, true);
    current->copies.push_back({(char *)shared, (const char *)global, bytes, current->group, line});
}

void wait_for_previous(void) { current->waits = false; }

void prefetch(const void *p, int line) {
    auto allocated = allocation_at((const char *)p);
    if (!allocated || (const char *)p >= allocated->first + allocated->second.bytes)
        fail("prefetch at line %d of no memory of the GPU", line);
}

void cp_async_commit(void) { current->group++; }

void emulator_cp_async_wait(int latest) {
    auto c = current->copies.begin();
    for (; c < current->copies.end() && c->group < current->group - latest; c++) {
        set_in_flight(c->to, false);
        access(c->to, 16, true, line_code(c->line));
        if (c->bytes) memcpy(c->to, c->from, (size_t)c->bytes);
        memset(c->to + c->bytes, 0, (size_t)(16 - c->bytes));
    }
    current->copies.erase(current->copies.begin(), c);
}

// ---- Memory of a block -------------------------------------------------------------------------
template <typename T> static T fetch_and_add(T *p, T x) {
    T before = *p;
    if (!in_arena(p)) acquired = true;
    *p = before + x;
    return before;
}
int atomicAdd(int *p, int x) { return fetch_and_add(p, x); }
unsigned atomicAdd(unsigned *p, unsigned x) { return fetch_and_add(p, x); }

static unsigned launch_number;
static size_t static_bytes, shared_limit; // of this launch
static char gap[GAP];                     // what the gaps hold, unless AddressSanitizer guards them

static void *add_array(const char *name, size_t bytes) {
    char *at = arena + GAP;
    if (!arrays.empty()) at = arrays.back().at + (arrays.back().bytes + GAP + 127) / 128 * 128;
    if (at + bytes + GAP > arena + ARENA) fail("no room for shared array %s", name);
#if ASAN
    __asan_unpoison_memory_region(at, bytes);
#else
    memcpy(at + bytes, gap, GAP);
#endif
    memset(at, 0xff, bytes);
    arrays.push_back({name, at, bytes});
    return at;
}

void *emulator_dynamic(void) { return arrays[0].at; }

void *emulator_shared(emulator_array *a) {
    if (a->launch == launch_number) return a->at;
    size_t dynamic_bytes = arrays[0].bytes;
    static_bytes += a->bytes;
    if (static_bytes > STATIC_LIMIT || static_bytes + dynamic_bytes > shared_limit)
        fail("too much shared memory: %zu bytes with %s and %zu dynamic", static_bytes, a->name,
             dynamic_bytes);
    a->launch = launch_number;
    a->at = add_array(a->name, a->bytes);
    return a->at;
}

// ---- Blocks and launches -----------------------------------------------------------------------
static void (*run_call)(void *);
static bool chained; // the launch

static void end_thread(void) {
    if (!current->copies.empty())
        fail("ends with a cp.async in flight, issued at line %d", current->copies[0].line);
    if (current->waits) fail("ends a chained launch without wait_for_previous");
    if (barrier_arrived)
        fail("returns, but %s waits in %s at line %d", name_of(barrier_first), barrier_first->at,
             barrier_first->line);
    warp *w = warp_of(current);
    set_waiting(current);
    w->live &= ~(1u << lane_of(current));
    ended = current;
    ended_count++;
    for (group *g = w->groups; g < w->groups + w->group_count; g++) complete_if_all(w, g);
}

// A thread that ends hands its stack to the next that has not begun. So kernels without barriers
// never switch.
static void fiber(void) {
    arrive(NULL);
    for (;;) {
        run_call(call.data());
        end_thread();
        stack *mine = current->on, *next = &host;
        current = ended_count < thread_count ? next_thread() : NULL;
        if (current) {
            threadIdx = current->index;
            if (!current->on) current->on = mine;
            next = current->on;
        }
        if (next == mine) continue;
        idle[idle_count++] = mine;
        switch_stack(mine, next);
    }
}

static void run_block(void) {
    block_start = barrier_time = ++now;
    acquired = false;
    ready_warps = 0;
    ended_count = 0;
    for (const array &a : arrays) memset(a.at, 0xff, a.bytes);
    for (unsigned i = 0; i < thread_count; i++) {
        threads[i].on = NULL;
        threads[i].group = 0;
        threads[i].waits = chained;
    }
    for (unsigned i = 0; i < thread_count; i += 32) {
        warp *w = warps + i / 32;
        unsigned count = thread_count - i;
        w->live = count < 32 ? (1u << count) - 1 : ~0u;
        w->ready = 0;
        w->group_count = 0;
        set_ready(w, w->live);
    }
    current = next_thread();
    threadIdx = current->index;
    current->on = new_stack();
    switch_stack(&host, current->on);
    for (const array &a : arrays)
        if (!ASAN && memcmp(a.at + a.bytes, gap, GAP))
            fail("block (%u,%u,%u) wrote behind the end of %s", blockIdx.x, blockIdx.y, blockIdx.z,
                 a.name);
}

// The numbers of `count` blocks, shuffled unless all runs in order.
static std::vector<uint32_t> block_order(size_t count) {
    std::vector<uint32_t> blocks(count);
    for (size_t i = 0; i < count; i++) {
        size_t j = order ? random_bits() % (i + 1) : i;
        blocks[i] = blocks[j];
        blocks[j] = (uint32_t)i;
    }
    return blocks;
}

static void run_launch(void (*run)(void *), const std::vector<char> &arguments,
                       emulator_launch_shape shape, size_t limit) {
    dim3 grid = shape.grid, block = shape.block;
    run_call = run;
    call = arguments;
    blockDim = block;
    gridDim = grid;
    thread_count = block.x * block.y * block.z;
    chained = shape.chained;
    for (unsigned i = 0; i < thread_count; i++)
        threads[i].index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    launch_number++;
    launch_start = ++now;
    static_bytes = 0;
    shared_limit = limit;
    arrays.clear();
    memset(gap, 0xa5, GAP);
#if ASAN
    __asan_poison_memory_region(arena, ARENA);
#endif
    add_array("(dynamic)", shape.shared);
    for (uint32_t i : block_order((size_t)grid.x * grid.y * grid.z)) {
        blockIdx = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
        run_block();
    }
}

// ---- Streams and errors ------------------------------------------------------------------------
typedef std::deque<std::function<void()>> work;
struct emulator_graph {
    work nodes;
};
struct emulator_stream {
    bool blocking; // waits for the NULL stream, and that waits for it
    bool broken;   // what it captures is of no use
    emulator_graph *capture;
    work pending;
};
struct emulator_event {
    double time;
    emulator_stream *stream; // in which it was recorded last
    bool done;
};
static emulator_stream null_stream = {true, false, NULL, {}};
static emulator_stream *capturing;
static std::vector<emulator_stream *> &streams = *new std::vector<emulator_stream *>{&null_stream};
static size_t allocated;
static cudaError_t last_error;

static size_t memory(void) { return environment("EMULATOR_MEMORY", (uint64_t)16 << 30); }
static int devices(void) { return (int)environment("EMULATOR_DEVICES", 1); }

static cudaError_t status(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}

// What allocates or waits needs a GPU, and breaks a capture: then last_error says so.
static bool forbidden(void) {
    if (capturing) {
        capturing->broken = true;
        status(cudaErrorStreamCaptureUnsupported);
        return true;
    }
    return !devices() && status(cudaErrorNoDevice) != cudaSuccess;
}

static void drain(emulator_stream *s) {
    while (!s->pending.empty()) { // a node may wait for another stream, and that one for the rest
        auto node = std::move(s->pending.front());
        s->pending.pop_front();
        node();
    }
}

static void drain_all(bool only_blocking) {
    for (emulator_stream *s : streams)
        if (s->blocking || !only_blocking) drain(s);
}

static cudaError_t submit(cudaStream_t stream, std::function<void()> node) {
    emulator_stream *s = stream ? stream : &null_stream;
    work &to = s->capture ? s->capture->nodes : s->pending;
    to.push_back(std::move(node));
    bool at_once = order == 0 && !s->capture;
    if (at_once) drain(s);
    return cudaSuccess;
}

const char *cudaGetErrorName(cudaError_t error) {
#define NAME(e, ...) \
    if (error == e) return #e;
    EMULATOR_ERRORS(NAME)
    return "unrecognized error code";
}
const char *cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }
cudaError_t cudaPeekAtLastError(void) { return last_error; }
cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

// ---- Launches ----------------------------------------------------------------------------------
// Of kernels that asked for more than 48 KB of dynamic memory: how much.
typedef std::map<const void *, size_t> limit_map;
static limit_map &dynamic_limit = *new limit_map;

static bool launchable(dim3 grid, dim3 block) {
    bool grid_fits = grid.x && grid.y && grid.z && grid.x <= 0x7fffffff && grid.y <= 65535 &&
                     grid.z <= 65535;
    bool block_fits = block.x && block.y && block.z && block.x <= 1024 && block.y <= 1024 &&
                      block.z <= 64 && block.x * block.y * block.z <= 1024;
    return grid_fits && block_fits;
}

static bool next_is_chained;
void emulator_chain(void) { next_is_chained = true; }

void emulator_submit(void (*run)(void *), const void *c, size_t bytes, const void *kernel,
                     emulator_launch_shape shape, cudaStream_t stream) {
    bool asked = dynamic_limit.count(kernel);
    size_t dynamic = asked ? dynamic_limit[kernel] : (size_t)STATIC_LIMIT;
    size_t limit = asked ? SHARED_LIMIT : STATIC_LIMIT;
    cudaError_t error = cudaSuccess;
    shape.chained = next_is_chained;
    next_is_chained = false;
    if (!devices()) error = cudaErrorNoDevice;
    else if (!launchable(shape.grid, shape.block)) error = cudaErrorInvalidConfiguration;
    else if (shape.shared > dynamic) error = cudaErrorInvalidValue;
    if (status(error) != cudaSuccess) return;
    std::vector<char> arguments((const char *)c, (const char *)c + bytes);
    submit(stream, [=] { run_launch(run, arguments, shape, limit); });
}

cudaError_t emulator_set_attribute(const void *kernel, cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || value > SHARED_LIMIT) return status(cudaErrorInvalidValue);
    dynamic_limit[kernel] = (size_t)value;
    return cudaSuccess;
}

// ---- Devices -----------------------------------------------------------------------------------
cudaError_t cudaDriverGetVersion(int *version) {
    *version = 13000;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *count) {
    *count = devices();
    return status(*count ? cudaSuccess : cudaErrorNoDevice);
}

cudaError_t cudaSetDevice(int device) {
    if (!devices()) return status(cudaErrorNoDevice);
    return status(device < 0 || device >= devices() ? cudaErrorInvalidDevice : cudaSuccess);
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int device) {
    *properties = {"emulator", memory(), STATIC_LIMIT, SHARED_LIMIT, 9, 0, 4, 32, 1024};
    return cudaSetDevice(device);
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device) {
    switch (attribute) {
#define VALUE(name, number, v) \
    case name:                 \
        *value = v;            \
        return cudaSetDevice(device);
        EMULATOR_ATTRIBUTES(VALUE)
    }
    return status(cudaErrorInvalidValue);
}

cudaError_t cudaDeviceSynchronize(void) {
    if (forbidden()) return last_error;
    drain_all(false);
    return cudaSuccess;
}

// ---- Allocations and copies --------------------------------------------------------------------
cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    *free = memory() - allocated;
    *total = memory();
    return cudaSuccess;
}

// New memory holds NaNs. It is of exact size, so that AddressSanitizer sees its end.
cudaError_t emulator_malloc(void **p, size_t bytes, bool on_device) {
    *p = NULL;
    if (forbidden()) return last_error;
    if (!bytes) return cudaSuccess;
    if (on_device && bytes > memory() - allocated) return status(cudaErrorMemoryAllocation);
    if (posix_memalign(p, 256, bytes)) return status(cudaErrorMemoryAllocation);
    cell *cells = NULL;
    if (watching && on_device) {
        cells = (cell *)calloc(bytes, sizeof(cell));
        if (!cells) fail("no memory to watch %zu bytes", bytes);
    }
    memset(*p, 0xff, bytes);
    allocations[(char *)*p] = {bytes, on_device, cells};
    if (on_device) allocated += bytes;
    return cudaSuccess;
}

static cudaError_t release(void *p, bool on_device) {
    if (!p) return cudaSuccess;
    if (forbidden()) return last_error;
    auto found = allocations.find((char *)p);
    if (found == allocations.end() || found->second.on_device != on_device)
        return status(cudaErrorInvalidValue);
    drain_all(false);
    if (on_device) allocated -= found->second.bytes;
    free(found->second.cells);
    free(p);
    allocations.erase(found);
    return cudaSuccess;
}
cudaError_t cudaFree(void *p) { return release(p, true); }
cudaError_t cudaFreeHost(void *p) { return release(p, false); }

// Where p … p + bytes - 1 are. BEYOND: they begin inside of an allocation and end outside.
enum place { PAGEABLE, PINNED, DEVICE, BEYOND };
static place place_of(const void *p, size_t bytes) {
    auto found = allocation_at(p);
    if (!found) return PAGEABLE;
    const char *end = found->first + found->second.bytes;
    if ((char *)p >= end) return PAGEABLE;
    if ((char *)p + bytes > end) return BEYOND;
    return found->second.on_device ? DEVICE : PINNED;
}

static bool copyable(const void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    if (!bytes) return true;
    place to_place = place_of(to, bytes), from_place = place_of(from, bytes);
    if (to_place == BEYOND || from_place == BEYOND) return false;
    if (kind == cudaMemcpyDefault) return true;
    bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    return (to_place == DEVICE) == to_device && (from_place == DEVICE) == from_device;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    if (forbidden()) return last_error;
    drain_all(true);
    if (!copyable(to, from, bytes, kind)) return status(cudaErrorInvalidValue);
    if (bytes) memcpy(to, from, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemset(void *to, int byte, size_t bytes) {
    if (forbidden()) return last_error;
    drain_all(true);
    if (!bytes) return cudaSuccess;
    if (place_of(to, bytes) != DEVICE) return status(cudaErrorInvalidValue);
    memset(to, byte, bytes);
    return cudaSuccess;
}

// Pageable memory has been read, or written, when the call returns, unless the copy is captured.
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
    if (!copyable(to, from, bytes, kind)) return status(cudaErrorInvalidValue);
    if (!bytes) return cudaSuccess;
    bool captured = stream && stream->capture;
    if (!captured && place_of(from, bytes) == PAGEABLE) {
        std::vector<char> staged((const char *)from, (const char *)from + bytes);
        submit(stream, [=] { memcpy(to, staged.data(), bytes); });
    } else {
        submit(stream, [=] { memcpy(to, from, bytes); });
    }
    if (!captured && place_of(to, bytes) == PAGEABLE) drain(stream ? stream : &null_stream);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *to, int byte, size_t bytes, cudaStream_t stream) {
    if (!bytes) return cudaSuccess;
    if (place_of(to, bytes) != DEVICE) return status(cudaErrorInvalidValue);
    return submit(stream, [=] { memset(to, byte, bytes); });
}

// ---- Streams and graphs ------------------------------------------------------------------------
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    if (forbidden()) return last_error;
    *stream = new emulator_stream{!(flags & cudaStreamNonBlocking), false, NULL, {}};
    streams.push_back(*stream);
    return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t *stream) {
    return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    if (forbidden()) return last_error;
    if (stream) drain(stream);
    else drain_all(true);
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    if (!stream) return status(cudaErrorInvalidValue);
    if (cudaStreamSynchronize(stream) != cudaSuccess) return last_error;
    for (emulator_stream *&s : streams)
        if (s == stream) s = streams.back();
    streams.pop_back();
    delete stream;
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    if (!stream) return status(cudaErrorStreamCaptureUnsupported);
    if (capturing) return status(cudaErrorIllegalState);
    capturing = stream;
    stream->capture = new emulator_graph;
    stream->broken = false;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    *graph = NULL;
    if (!stream || !stream->capture) return status(cudaErrorIllegalState);
    if (stream->broken) delete stream->capture;
    else *graph = stream->capture;
    stream->capture = NULL;
    capturing = NULL;
    return status(stream->broken ? cudaErrorStreamCaptureInvalidated : cudaSuccess);
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long) {
    if (!graph) return status(cudaErrorInvalidValue);
    *exec = new emulator_graph(*graph);
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    if (!exec) return status(cudaErrorInvalidValue);
    return submit(stream, [nodes = exec->nodes] {
        for (const auto &node : nodes) node();
    });
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    delete exec;
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}

// ---- Events ------------------------------------------------------------------------------------
cudaError_t cudaEventCreate(cudaEvent_t *event) {
    *event = new emulator_event{0, NULL, true};
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) {
    return cudaEventCreate(event);
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    typedef std::chrono::duration<double> seconds;
    event->stream = stream ? stream : &null_stream;
    event->done = false;
    return submit(stream, [=] {
        auto time = std::chrono::steady_clock::now().time_since_epoch();
        event->time = seconds(time).count();
        event->done = true;
    });
}

// A stream comes so far as it must when it is asked: what waits lets the other stream go first, and
// whoever asks for an event finds it done the second time.
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    emulator_stream *other = event->stream;
    return submit(stream, [=] {
        if (other && !event->done) drain(other);
    });
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
    if (event->done) return cudaSuccess;
    drain(event->stream);
    return cudaErrorNotReady;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, void (*function)(void *), void *data) {
    return submit(stream, [=] { function(data); });
}

cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaDeviceSynchronize(); }
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    *milliseconds = (float)(1e3 * (end->time - start->time));
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    cudaDeviceSynchronize();
    delete event;
    return cudaSuccess;
}
