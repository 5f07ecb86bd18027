// emulator.cpp - the machine behind emulator.h: fibers, barriers, shared memory, races, streams. Never compiled with -fsanitize=thread.
#include "emulator.h"
#include <chrono>
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

enum { STACK = 256 << 10, GAP = 1 << 10, ARENA = 320 << 10, STATIC_LIMIT = 48 << 10, SHARED_LIMIT = 227 << 10 };

struct stack { // of a fiber; the host's own is one of them
    void *sp;
    char *bottom;
    size_t size;
    void *fake; // AddressSanitizer's
};
struct copy { // a cp.async in flight
    char *to;
    const char *from;
    int bytes, group, line;
};
struct alignas(64) thread {
    uint3 index;
    uint32_t mask;   // of the warp operation it waits in
    stack *on;       // NULL until it begins
    const char *at;  // what it waits in, and the line
    int line, group; // group: of the next cp.async
    std::vector<copy> copies;
};
struct group { // lanes that wait in one warp operation
    const char *at;
    uint32_t mask, arrived;
    void (*complete)(group *g);
};
struct warp {
    uint32_t live, ready;
    int group_count; // used of groups
    group groups[32];
    void *argument[32];       // of the operation each lane waits in
    uint32_t ordered[32][32]; // [j][i]: what lane i did before this time is known to lane j
};

emulator_coordinates emulator_at;
static thread threads[1024], *current, *ended; // current: NULL while the host runs; ended: the last that did
static warp warps[32];
static uint32_t ready_warps;
static unsigned thread_count, ended_count;
static int order, burst; // burst: the warp that runs
static uint64_t rng;

static unsigned lane_of(const thread *t) { return (unsigned)(t - threads) % 32; }
static warp *warp_of(const thread *t) { return warps + (t - threads) / 32; }
static thread *thread_at(const warp *w, uint32_t lanes) { return threads + (w - warps) * 32 + __builtin_ctz(lanes); } // the first of lanes

__attribute__((format(printf, 1, 2))) static const char *text(const char *format, ...) { // the latest few stay
    static char texts[4][48];
    static unsigned next;
    va_list args;
    char *s = texts[next++ % 4];
    return va_start(args, format), vsnprintf(s, sizeof texts[0], format, args), va_end(args), s;
}
static const char *name_of(const thread *t) { return text("thread (%u,%u,%u)", t->index.x, t->index.y, t->index.z); }

__attribute__((format(printf, 1, 2), noreturn)) static void fail(const char *format, ...) {
    char what[1000];
    va_list args;
    va_start(args, format), vsnprintf(what, sizeof what, format, args), va_end(args);
    fflush(stdout);
    if (!current) fprintf(stderr, "emulator: %s\n", what);
    else fprintf(stderr, "emulator: block (%u,%u,%u) %s: %s\n", blockIdx.x, blockIdx.y, blockIdx.z, name_of(current), what);
    _exit(70);
}

static uint32_t random_bits(void) { // xorshift64*
    rng ^= rng >> 12, rng ^= rng << 25, rng ^= rng >> 27;
    return (uint32_t)(rng * 0x2545f4914f6cdd1d >> 32);
}
static uint64_t environment(const char *name, uint64_t otherwise) { return getenv(name) ? strtoull(getenv(name), NULL, 0) : otherwise; }
extern "C" void emulator_order(int kind, uint64_t seed) {
    order = kind, burst = 0, rng = (seed + 1) * 0x9e3779b97f4a7c15 | 1;
    for (int i = 0; i < 8; i++) random_bits();
}
__attribute__((constructor)) static void read_order(void) {
    emulator_order((int)environment("EMULATOR_ORDER", 0), environment("EMULATOR_SEED", 0));
}

// ---- Races ------------------------------------------------------------------------------------------------------------
// Time passes with every block, barrier and __syncwarp. Of every byte it is known who wrote it last and who has read it since; an access
// must be ordered behind those it conflicts with, by a barrier, by __syncwarp, or because the same thread did both. Blocks of a launch are
// not ordered, but one that did an atomic may know what others wrote. Code is a line, or with the top bit 0 an address for addr2line.
static const unsigned SEVERAL_WARPS = 254, OTHER_BLOCK = 255;
struct cell {
    uint32_t write_time, write_code, read_time, read_code, readers; // readers: lanes of read_warp
    uint16_t writer;
    uint8_t read_warp; // or one of the two above
    bool in_flight;    // a cp.async fills it
};
struct array { // in shared memory
    const char *name;
    char *at;
    size_t bytes;
};
struct allocation {
    size_t bytes;
    bool on_device;
    cell *cells;
};
static std::map<const char *, allocation> &allocations = *new std::map<const char *, allocation>;
static std::vector<array> arrays; // the dynamic one first
alignas(128) static char arena[ARENA]; // shared memory: arrays with gaps before and behind
static cell shared_cells[ARENA];
static bool watching, acquired; // kernels are instrumented; this block did an atomic
static uint32_t now, launch_start, block_start, barrier_time;
static std::vector<char> call; // the kernel's arguments

static bool in_arena(const void *p) { return (char *)p >= arena && (char *)p < arena + ARENA; }
static const std::pair<const char *const, allocation> *allocation_at(const void *p) { // the last that begins at or before p
    auto next = allocations.upper_bound((const char *)p);
    return next == allocations.begin() ? NULL : &*--next;
}

static const char *code_name(uint32_t code) { return code >> 31 ? text("line %u", code & ~0u >> 1) : text("+0x%x", code); }
__attribute__((noreturn)) static void race(const cell *c, bool write, uint32_t code, bool written, const char *array, size_t byte) {
    uint32_t other = written ? c->write_code : c->read_code;
    bool elsewhere = (written ? c->write_time : c->read_time) < block_start || (!written && c->read_warp == OTHER_BLOCK);
    const char *who = elsewhere ? "another block" : "threads of several warps";
    if (!elsewhere && written) who = name_of(threads + c->writer);
    else if (!elsewhere && c->read_warp < 32) {
        uint32_t me = warp_of(current) == warps + c->read_warp ? 1u << lane_of(current) : 0;
        who = name_of(thread_at(warps + c->read_warp, c->readers & ~me));
    }
    fail("race: %s byte %zu of %s, %s by %s, and nothing orders them (code: %s and %s)", write ? "writes" : "reads", byte, array,
         written ? "written" : "read", who, code_name(code), code_name(other));
}

static void touch(cell *c, bool shared, bool write, uint32_t code, const char *array, size_t byte) {
    unsigned me = (unsigned)(current - threads);
    const uint32_t *ordered = warps[me / 32].ordered[me % 32];
    if (c->in_flight)
        fail("touches byte %zu of %s, which a cp.async of %s still fills (code: %s)", byte, array, name_of(threads + c->writer),
             code_name(code));
    if (c->write_time >= barrier_time) {
        if (c->writer != me && (c->writer / 32 != me / 32 || c->write_time >= ordered[c->writer % 32]))
            race(c, write, code, true, array, byte);
    } else if (shared && c->write_time < block_start && !write)
        fail("reads byte %zu of %s, which nobody has written (code: %s)", byte, array, code_name(code));
    else if (!shared && c->write_time >= launch_start && c->write_time < block_start && !acquired) race(c, write, code, true, array, byte);

    bool elsewhere = !shared && !acquired && c->read_time >= launch_start && (c->read_time < block_start || c->read_warp == OTHER_BLOCK);
    bool several = c->read_time >= barrier_time && c->read_warp != me / 32;
    uint32_t unordered = 0; // other lanes of this warp that have read it
    if (c->read_time >= barrier_time && !several)
        for (uint32_t rest = c->readers & ~(1u << me % 32); rest; rest &= rest - 1)
            if (c->read_time >= ordered[__builtin_ctz(rest)]) unordered |= rest & -rest;
    if (write && (elsewhere || several || unordered)) race(c, write, code, false, array, byte);
    if (write) c->write_time = now, c->write_code = code, c->writer = (uint16_t)me;
    else {
        c->read_warp = (uint8_t)(elsewhere ? OTHER_BLOCK : several ? SEVERAL_WARPS : me / 32);
        c->readers = unordered | 1u << me % 32, c->read_code = code;
        if (!elsewhere) c->read_time = now;
    }
}

static void access(const void *address, size_t bytes, bool write, uint32_t code) {
    const char *p = (const char *)address;
    if (!watching || !current || !bytes) return;
    if ((p >= current->on->bottom && p < current->on->bottom + STACK) || (p >= call.data() && p < call.data() + call.size()) ||
        (p >= (char *)&emulator_at && p < (char *)(&emulator_at + 1)))
        return;
    auto found = allocation_at(p);
    bool inside = found && p + bytes <= found->first + found->second.bytes;
    array a = {"device memory", inside ? (char *)found->first : NULL, 0};
    for (const array &each : arrays)
        if (p >= each.at && p + bytes <= each.at + each.bytes) a = each, inside = true;
    const char *outside = in_arena(p) ? "of shared memory in no array" : "of no memory of the GPU";
    if (!inside) fail("touches %zu bytes %s (code: %s)", bytes, outside, code_name(code));
    cell *cells = in_arena(p) ? shared_cells + (p - arena) : found->second.cells + (p - a.at);
    if (in_arena(p) || found->second.cells)
        for (size_t i = 0; i < bytes; i++) touch(cells + i, in_arena(p), write, code, a.name, (size_t)(p - a.at) + i);
}

// What -fsanitize=thread makes of loads and stores.
extern "C" char __executable_start;
#define HERE ((uint32_t)((char *)__builtin_return_address(0) - &__executable_start) & ~0u >> 1)
#define HOOK(name, n, write) void __tsan_##name##n(void *p) { access(p, n, write, HERE); }
#define HOOKS(n)                                                                                                                           \
    HOOK(read, n, false) HOOK(unaligned_read, n, false) HOOK(volatile_read, n, false) HOOK(unaligned_volatile_read, n, false)              \
    HOOK(write, n, true) HOOK(unaligned_write, n, true) HOOK(volatile_write, n, true) HOOK(unaligned_volatile_write, n, true)
extern "C" {
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
void __tsan_init(void) { watching = true; }
void __tsan_func_entry(void *) {}
void __tsan_func_exit(void) {}
void __tsan_vptr_read(void *) {}
void __tsan_vptr_update(void *, void *) {}
void __tsan_read_range(void *p, size_t n) { access(p, n, false, HERE); }
void __tsan_write_range(void *p, size_t n) { access(p, n, true, HERE); }
void *__tsan_memset(void *p, int byte, size_t n) { return access(p, n, true, HERE), memset(p, byte, n); }
void *__tsan_memmove(void *to, const void *from, size_t n) {
    return access(from, n, false, HERE), access(to, n, true, HERE), memmove(to, from, n);
}
void *__tsan_memcpy(void *to, const void *from, size_t n) {
    return access(from, n, false, HERE), access(to, n, true, HERE), memcpy(to, from, n);
}
uint8_t __tsan_atomic8_load(const volatile uint8_t *p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); } // guards of static variables
}
static uint32_t line_code(int line) { return 1u << 31 | (uint32_t)line; }

// ---- Fibers -----------------------------------------------------------------------------------------------------------
static stack host, stacks[1024], *idle[1024]; // idle: whose thread has ended
static unsigned idle_count, stack_count;

extern "C" void emulator_switch(void **from, void *to);
#if defined __x86_64__ && !defined EMULATOR_UCONTEXT
__asm__(".text\n.globl emulator_switch\nemulator_switch:\n"
        "pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15; movq %rsp, (%rdi); movq %rsi, %rsp\n"
        "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; popq %rcx; jmp *%rcx\n"); // predicted well, unlike ret
static void *first_frame(char *top, void (*entry)(void)) { // six registers, where to begin, and a return address of 0 at rsp % 16 == 8
    void **sp = (void **)top - 8;
    return memset(sp, 0, 64), sp[6] = (void *)entry, sp;
}
#else
extern "C" void emulator_switch(void **from, void *to) {
    ucontext_t here;
    *from = &here, swapcontext(&here, (ucontext_t *)to);
}
static void *first_frame(char *top, void (*entry)(void)) {
    ucontext_t *context = new ucontext_t;
    getcontext(context), context->uc_stack.ss_sp = top - STACK / 2, context->uc_stack.ss_size = STACK / 2;
    return makecontext(context, entry, 0), context;
}
#endif

static void arrive(void *fake) { // tells AddressSanitizer that a switch is done
#if ASAN
    const void *bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(fake, &bottom, &size);
    if (!host.bottom) host.bottom = (char *)bottom, host.size = size; // the first switch of all comes from there
#endif
    (void)fake;
}
static void switch_stack(stack *from, stack *to) {
#if ASAN
    __sanitizer_start_switch_fiber(&from->fake, to->bottom, to->size);
#endif
    emulator_switch(&from->sp, to->sp), arrive(from->fake);
}

static void fiber(void);
static stack *take_stack(void) {
    if (idle_count) return idle[--idle_count];
    char *base = (char *)mmap(NULL, STACK + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED || mprotect(base, 4096, PROT_NONE)) fail("no memory for a thread's stack");
    char *top = base + 4096 + STACK - stack_count * 13 % 64 * 64; // in different sets of the cache
    return stacks[stack_count] = {first_frame(top, fiber), base + 4096, STACK, NULL}, &stacks[stack_count++];
}

static unsigned some_bit(uint32_t mask) { // the first at or behind a random place
    uint32_t r = random_bits() % 32;
    return (r + (uint32_t)__builtin_ctz(mask >> r | mask << (32 - r) % 32)) % 32;
}

__attribute__((noreturn)) static void deadlock(void) {
    for (warp *w = warps; w < warps + 32; w++)
        for (const group &g : w->groups) {
            if (!(w->live & g.arrived)) continue;
            const thread *missing = thread_at(w, g.mask & w->live & ~g.arrived);
            current = thread_at(w, g.arrived);
            fail("%s at line %d, mask 0x%08x, waits for %s, which waits in %s at line %d, mask 0x%08x", g.at, current->line, g.mask,
                 name_of(missing), missing->at, missing->line, missing->mask);
        }
    fail("no thread can go on");
}

static thread *next_thread(void) {
    if (!ready_warps) deadlock();
    if (!order) return burst = __builtin_ctz(ready_warps), thread_at(warps + burst, warps[burst].ready);
    if (order == 1 || !warps[burst].ready) burst = (int)some_bit(ready_warps);
    return threads + burst * 32 + some_bit(warps[burst].ready);
}
static void run_next(void) {
    thread *from = current, *to = next_thread();
    current = to, threadIdx = to->index;
    if (!to->on) to->on = take_stack();
    if (to != from) switch_stack(from->on, to->on);
}
static void set_ready(warp *w, uint32_t lanes) { w->ready |= lanes, ready_warps |= 1u << (w - warps); }
static void set_waiting(const thread *t) {
    warp *w = warp_of(t);
    if (!(w->ready &= ~(1u << lane_of(t)))) ready_warps &= ~(1u << (w - warps));
}

// ---- Barriers, warp operations --------------------------------------------------------------------------------------------
static unsigned barrier_arrived, barrier_truths, barrier_result[2]; // of the last barrier: how many said true, how many there were
static const thread *barrier_first;

static void barrier(const char *at, int predicate, int line) {
    thread *t = current;
    t->at = at, t->line = line, t->mask = 0;
    if (!barrier_arrived++) barrier_first = t, barrier_truths = 0;
    if (barrier_first->at != at || barrier_first->line != line)
        fail("%s at line %d, but %s waits in %s at line %d", at, line, name_of(barrier_first), barrier_first->at, barrier_first->line);
    if (ended_count) fail("%s at line %d, but %s has returned", at, line, name_of(ended));
    barrier_truths += predicate != 0;
    if (barrier_arrived < thread_count) set_waiting(t);
    else {
        barrier_result[0] = barrier_truths, barrier_result[1] = thread_count, barrier_arrived = 0, barrier_time = ++now;
        for (unsigned i = 0; i < thread_count; i += 32) set_ready(warps + i / 32, warps[i / 32].live);
    }
    run_next(); // the result stands until all have read it, since the next barrier needs them all
}
static const char *const barriers[] = {"__syncthreads", "__syncthreads_or", "__syncthreads_and", "__syncthreads_count"};
void __syncthreads(int line) { barrier(barriers[0], 0, line); }
int __syncthreads_or(int predicate, int line) { return barrier(barriers[1], predicate, line), barrier_result[0] > 0; }
int __syncthreads_and(int predicate, int line) { return barrier(barriers[2], predicate, line), barrier_result[0] == barrier_result[1]; }
int __syncthreads_count(int predicate, int line) { return barrier(barriers[3], predicate, line), (int)barrier_result[0]; }

static warp *acting; // whose operation is being completed
static void complete_if_all(warp *w, group *g) {
    if (!g->arrived || g->mask & w->live & ~g->arrived) return;
    acting = w, g->complete(g), set_ready(w, g->arrived), g->arrived = 0;
}

static void end_thread(void) {
    if (!current->copies.empty()) fail("ends with a cp.async in flight, issued at line %d", current->copies[0].line);
    if (barrier_arrived) fail("returns, but %s waits in %s at line %d", name_of(barrier_first), barrier_first->at, barrier_first->line);
    warp *w = warp_of(current);
    set_waiting(current), w->live &= ~(1u << lane_of(current)), ended = current, ended_count++;
    for (group *g = w->groups; g < w->groups + w->group_count; g++) complete_if_all(w, g);
}
static void (*run_call)(void *);
static void fiber(void) { // a thread that ends hands its stack to the next that has not begun: kernels without barriers never switch
    for (arrive(NULL);;) {
        run_call(call.data()), end_thread();
        stack *mine = current->on, *next = &host;
        current = ended_count < thread_count ? next_thread() : NULL;
        if (current) threadIdx = current->index, next = current->on ? current->on : (current->on = mine);
        if (next != mine) idle[idle_count++] = mine, switch_stack(mine, next);
    }
}

// Every lane leaves its arguments and waits; the last to arrive completes the operation for all.
static void warp_operation(const char *at, void (*complete)(group *), uint32_t mask, void *argument, int line) {
    thread *t = current;
    warp *w = warp_of(t);
    t->at = at, t->line = line, t->mask = mask, w->argument[lane_of(t)] = argument;
    if (!(mask >> lane_of(t) & 1)) fail("%s at line %d: its own lane is not in the mask 0x%08x", at, line, mask);
    group *g = w->groups, *end = g + w->group_count;
    while (g < end && (!g->arrived || g->at != at || g->mask != mask)) g++;
    if (g == end) {
        for (g = w->groups; g < end && g->arrived;) g++; // there are 32, and in each that waits is a lane
        w->group_count += g == end, *g = {at, mask, 0, complete};
    }
    g->arrived |= 1u << lane_of(t);
    set_waiting(t), complete_if_all(w, g), run_next();
}
#define EACH(i, lanes) for (unsigned rest = lanes, i; rest && (i = (unsigned)__builtin_ctz(rest), true); rest &= rest - 1)

static void order_lanes(group *g) { // each gets to know what any of them knows, and what they did
    if (!watching) return;
    now++;
    for (unsigned i = 0; i < 32; i++) {
        uint32_t known = 0;
        EACH(j, g->arrived) known = acting->ordered[j][i] > known ? acting->ordered[j][i] : known;
        EACH(j, g->arrived) acting->ordered[j][i] = g->arrived >> i & 1 ? now : known;
    }
}
void __syncwarp(unsigned mask, int line) { warp_operation("__syncwarp", order_lanes, mask, NULL, line); }

struct ballot { uint32_t predicate, votes; };
static void count_votes(group *g) {
    uint32_t votes = 0;
    EACH(i, g->arrived) votes |= ((ballot *)acting->argument[i])->predicate << i;
    EACH(i, g->arrived) ((ballot *)acting->argument[i])->votes = votes;
}
static uint32_t vote(const char *at, unsigned mask, int predicate, int line) {
    ballot b = {predicate != 0, 0};
    return warp_operation(at, count_votes, mask, &b, line), b.votes;
}
unsigned __ballot_sync(unsigned mask, int predicate, int line) { return vote("__ballot_sync", mask, predicate, line); }
int __any_sync(unsigned mask, int predicate, int line) { return vote("__any_sync", mask, predicate, line) != 0; }
int __all_sync(unsigned mask, int predicate, int line) { return vote("__all_sync", mask, !predicate, line) == 0; }

struct shuffle { uint64_t bits, result; int source; };
static void exchange(group *g) { // garbage from a lane that takes no part
    EACH(i, g->arrived) {
        shuffle *s = (shuffle *)acting->argument[i];
        s->result = g->arrived >> s->source & 1 ? ((shuffle *)acting->argument[s->source])->bits : ~(uint64_t)0;
    }
}
uint64_t emulator_shfl(emulator_shuffle kind, unsigned mask, uint64_t bits, int by, int width, int line) {
    static const char *const names[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync"};
    if (width < 1 || width > 32 || width & (width - 1)) fail("%s at line %d: width %d is no power of 2 up to 32", names[kind], line, width);
    int lane = (int)lane_of(current), first = lane & -width, sources[] = {first + (by & (width - 1)), lane - by, lane + by, lane ^ by};
    int source = sources[kind], own = kind == EMULATOR_UP ? source < first : source >= first + width;
    shuffle s = {bits, 0, own ? lane : source};
    return warp_operation(names[kind], exchange, mask, &s, line), s.result;
}

static void need_all(const group *g) {
    if (g->arrived != ~0u) fail("%s at line %d needs all 32 lanes, not 0x%08x", g->at, current->line, g->arrived);
}
static void check_row(const void *shared, const char *what, int line) {
    if (!in_arena(shared)) fail("%s at line %d: not an address in shared memory", what, line);
    if ((uintptr_t)shared % 16) fail("%s at line %d: an address that is no multiple of 16", what, line);
}

// Lane 8i + row tells where a row of matrix i lies. Lane t gets of each matrix the elements (t/4, 2(t%4)) and (t/4, 2(t%4) + 1);
// transposed: (2(t%4), t/4) and (2(t%4) + 1, t/4).
struct row_address { const char *row; uint32_t *r; };
template <bool TRANSPOSED> static void load_matrices(group *g) {
    need_all(g);
    thread *last = current;
    for (int t = 0; t < 32; t++)
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 2; j++) {
                int row = TRANSPOSED ? t % 4 * 2 + j : t / 4, column = TRANSPOSED ? t / 4 : t % 4 * 2 + j;
                const char *element = ((row_address *)acting->argument[i * 8 + row])->row + 2 * column;
                current = threads + (acting - warps) * 32 + t; // who reads
                access(element, 2, false, line_code(current->line));
                memcpy((char *)&((row_address *)acting->argument[t])->r[i] + 2 * j, element, 2);
            }
    current = last;
}
template <bool TRANSPOSED> static void load_matrix(uint32_t *r, const void *row, const char *at, int line) {
    row_address a = {(const char *)row, r};
    check_row(row, at, line), warp_operation(at, load_matrices<TRANSPOSED>, ~0u, &a, line);
}
void ldmatrix(uint32_t r[4], const void *row, int line) { load_matrix<false>(r, row, "ldmatrix", line); }
void ldmatrix_transposed(uint32_t r[4], const void *row, int line) { load_matrix<true>(r, row, "ldmatrix_transposed", line); }

// Lane t holds, in this order: of A (16,16) the elements (t/4, 2(t%4) + (0, 1)), then those 8 rows below, then both again 8 columns on;
// of B (16,8) the elements (2(t%4) + (0, 1), t/4) and those 8 rows below; of C (16,8) (t/4, 2(t%4) + (0, 1)) and those 8 rows below.
struct factors { float *c; const void *a, *b; };
static float number(const float *x) { return *x; }
static float number(const __nv_bfloat16 *x) { return __bfloat162float(*x); }
__attribute__((no_sanitize("address", "undefined"))) static void multiply_add(float c[16][8], const float a[16][16], const float b[16][8]) {
    for (int row = 0; row < 16; row++) // half the time of a sanitized run, were it checked
        for (int k = 0; k < 16; k++)
            for (int column = 0; column < 8; column++) c[row][column] = fmaf(a[row][k], b[k][column], c[row][column]);
}
template <typename T> static void multiply(group *g) {
    need_all(g);
    float a[16][16], b[16][8], c[16][8];
    for (int t = 0; t < 32; t++) {
        const factors *f = (factors *)acting->argument[t];
        for (int i = 0; i < 8; i++) a[t / 4 + i / 2 % 2 * 8][t % 4 * 2 + i % 2 + i / 4 * 8] = number((const T *)f->a + i);
        for (int i = 0; i < 4; i++) b[t % 4 * 2 + i % 2 + i / 2 * 8][t / 4] = number((const T *)f->b + i);
        for (int i = 0; i < 4; i++) c[t / 4 + i / 2 * 8][t % 4 * 2 + i % 2] = f->c[i];
    }
    multiply_add(c, a, b);
    for (int t = 0; t < 32; t++)
        for (int i = 0; i < 4; i++) ((factors *)acting->argument[t])->c[i] = c[t / 4 + i / 2 * 8][t % 4 * 2 + i % 2];
}
template <typename T> static void mma_of(float *c, const void *a, const void *b, int line) {
    factors f = {c, a, b};
    warp_operation(sizeof(T) == 2 ? "mma" : "mma of fp32", multiply<T>, ~0u, &f, line);
}
void mma(float c[4], const uint32_t a[4], const uint32_t b[2], int line) { mma_of<__nv_bfloat16>(c, a, b, line); }
#ifndef EMULATOR_NO_MMA_F32
void mma(float c[4], const float a[8], const float b[4], int line) { mma_of<float>(c, a, b, line); }
#endif

// ---- Memory, blocks, launches -----------------------------------------------------------------------------------------------
static void set_in_flight(char *shared, bool yes) {
    for (int i = 0; i < 16 && watching; i++) shared_cells[shared - arena + i].in_flight = yes;
}
void cp_async(void *shared, const void *global, int bytes, int line) { // NaNs until it is waited for
    check_row(shared, "cp_async", line);
    if (bytes < 0 || bytes > 16 || (uintptr_t)global % 16) fail("cp_async at line %d: %d bytes from %p", line, bytes, global);
    access(global, (size_t)bytes, false, line_code(line)), access(shared, 16, true, line_code(line));
    if (bytes) memcpy(shared, global, (size_t)bytes); // so that a sanitizer's trace names the line
    memset(shared, 0xff, 16);
    set_in_flight((char *)shared, true);
    current->copies.push_back({(char *)shared, (const char *)global, bytes, current->group, line});
}
void cp_async_commit(void) { current->group++; }
void emulator_cp_async_wait(int latest) {
    auto c = current->copies.begin();
    for (; c < current->copies.end() && c->group < current->group - latest; c++) {
        set_in_flight(c->to, false), access(c->to, 16, true, line_code(c->line));
        if (c->bytes) memcpy(c->to, c->from, (size_t)c->bytes);
        memset(c->to + c->bytes, 0, (size_t)(16 - c->bytes));
    }
    current->copies.erase(current->copies.begin(), c);
}

template <typename T> static T fetch_and_add(T *p, T x) { return acquired |= !in_arena(p), *p += x, *p - x; }
int atomicAdd(int *p, int x) { return fetch_and_add(p, x); }
unsigned atomicAdd(unsigned *p, unsigned x) { return fetch_and_add(p, x); }

static unsigned launch_number;
static size_t static_bytes, shared_limit;
static char gap[GAP];

static void *add_array(const char *name, size_t bytes) {
    char *at = arrays.empty() ? arena + GAP : arrays.back().at + (arrays.back().bytes + GAP + 127) / 128 * 128;
    if (at + bytes + GAP > arena + ARENA) fail("no room for shared array %s", name);
#if ASAN
    __asan_unpoison_memory_region(at, bytes);
#else
    memcpy(at + bytes, gap, GAP);
#endif
    return memset(at, 0xff, bytes), arrays.push_back({name, at, bytes}), at;
}
void *emulator_dynamic(void) { return arrays[0].at; }
void *emulator_shared(emulator_array *a) {
    if (a->launch == launch_number) return a->at;
    static_bytes += a->bytes;
    if (static_bytes > STATIC_LIMIT || static_bytes + arrays[0].bytes > shared_limit)
        fail("too much shared memory: %zu bytes with %s and %zu dynamic", static_bytes, a->name, arrays[0].bytes);
    return a->launch = launch_number, a->at = add_array(a->name, a->bytes);
}

static void run_block(void) {
    block_start = barrier_time = ++now, acquired = false, ready_warps = 0, ended_count = 0;
    for (const array &a : arrays) memset(a.at, 0xff, a.bytes);
    for (unsigned i = 0; i < thread_count; i++) threads[i].on = NULL, threads[i].group = 0;
    for (unsigned i = 0; i < thread_count; i += 32) {
        warp *w = warps + i / 32;
        w->live = thread_count - i < 32 ? (1u << (thread_count - i)) - 1 : ~0u, w->ready = w->group_count = 0, set_ready(w, w->live);
    }
    current = next_thread(), threadIdx = current->index, current->on = take_stack(), switch_stack(&host, current->on);
    for (const array &a : arrays)
        if (!ASAN && memcmp(a.at + a.bytes, gap, GAP))
            fail("block (%u,%u,%u) wrote behind the end of %s", blockIdx.x, blockIdx.y, blockIdx.z, a.name);
}

static void run_launch(void (*run)(void *), const std::vector<char> &arguments, dim3 grid, dim3 block, size_t shared, size_t limit) {
    run_call = run, call = arguments, blockDim = block, gridDim = grid, thread_count = block.x * block.y * block.z;
    for (unsigned i = 0; i < thread_count; i++) threads[i].index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    launch_number++, launch_start = ++now, static_bytes = 0, shared_limit = limit, arrays.clear();
    memset(gap, 0xa5, GAP);
#if ASAN
    __asan_poison_memory_region(arena, ARENA);
#endif
    add_array("(dynamic)", shared);
    std::vector<uint32_t> blocks((size_t)grid.x * grid.y * grid.z);
    for (size_t i = 0; i < blocks.size(); i++) {
        size_t j = order ? random_bits() % (i + 1) : i;
        blocks[i] = blocks[j], blocks[j] = (uint32_t)i;
    }
    for (uint32_t i : blocks) blockIdx = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y}, run_block();
}

// ---- Runtime API ----------------------------------------------------------------------------------------------------------------
typedef std::vector<std::function<void()>> work;
struct emulator_graph { work nodes; };
struct emulator_stream {
    bool blocking, broken; // waits for the NULL stream, and that for it; what it captures is of no use
    emulator_graph *capture;
    work pending;
};
struct emulator_event { double time; };
static emulator_stream null_stream = {true, false, NULL, {}}, *capturing;
static std::vector<emulator_stream *> &streams = *new std::vector<emulator_stream *>{&null_stream};
static std::map<const void *, size_t> &dynamic_limit = *new std::map<const void *, size_t>; // of kernels that asked for more than 48 KB
static size_t allocated;
static cudaError_t last_error;

static size_t memory(void) { return environment("EMULATOR_MEMORY", (uint64_t)16 << 30); }
static int devices(void) { return (int)environment("EMULATOR_DEVICES", 1); }
static cudaError_t status(cudaError_t error) { return error ? last_error = error : error; }
static bool forbidden(void) { // what allocates or waits breaks a capture
    if (capturing) capturing->broken = true;
    return status(capturing ? cudaErrorStreamCaptureUnsupported : devices() ? cudaSuccess : cudaErrorNoDevice) != cudaSuccess;
}
static void drain(emulator_stream *s) {
    for (const auto &node : s->pending) node();
    s->pending.clear();
}
static void drain_all(bool blocking) {
    for (emulator_stream *s : streams)
        if (s->blocking || !blocking) drain(s);
}
static cudaError_t submit(cudaStream_t stream, std::function<void()> node) {
    emulator_stream *s = stream ? stream : &null_stream;
    (s->capture ? s->capture->nodes : s->pending).push_back(std::move(node));
    return order || s->capture ? cudaSuccess : (drain(s), cudaSuccess);
}

void emulator_submit(void (*run)(void *), void *c, size_t bytes, const void *kernel, dim3 grid, dim3 block, size_t shared, cudaStream_t s) {
    bool asked = dynamic_limit.count(kernel);
    size_t most = asked ? dynamic_limit[kernel] : (size_t)STATIC_LIMIT, limit = asked ? SHARED_LIMIT : STATIC_LIMIT;
    bool sizes = grid.x && grid.y && grid.z && grid.x <= 0x7fffffff && grid.y <= 65535 && grid.z <= 65535 && block.x && block.y &&
                 block.z && block.x <= 1024 && block.y <= 1024 && block.z <= 64 && block.x * block.y * block.z <= 1024;
    cudaError_t error = !devices() ? cudaErrorNoDevice : !sizes ? cudaErrorInvalidConfiguration : cudaErrorInvalidValue;
    if (!devices() || !sizes || shared > most) return (void)status(error);
    std::vector<char> arguments((char *)c, (char *)c + bytes);
    submit(s, [=] { run_launch(run, arguments, grid, block, shared, limit); });
}
cudaError_t emulator_set_attribute(const void *kernel, cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    return value < 0 || value > SHARED_LIMIT ? status(cudaErrorInvalidValue) : (dynamic_limit[kernel] = (size_t)value, cudaSuccess);
}

const char *cudaGetErrorName(cudaError_t error) {
#define NAME(e, ...) if (error == e) return #e;
    EMULATOR_ERRORS(NAME)
    return "unrecognized error code";
}
const char *cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }
cudaError_t cudaPeekAtLastError(void) { return last_error; }
cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    return last_error = cudaSuccess, error;
}
cudaError_t cudaGetDeviceCount(int *count) { return *count = devices(), status(*count ? cudaSuccess : cudaErrorNoDevice); }
cudaError_t cudaSetDevice(int device) {
    return status(!devices() ? cudaErrorNoDevice : device < 0 || device >= devices() ? cudaErrorInvalidDevice : cudaSuccess);
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int device) {
    *properties = {"emulator", memory(), STATIC_LIMIT, SHARED_LIMIT, 9, 0, 4, 32, 1024};
    return cudaSetDevice(device);
}
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device) {
#define VALUE(name, number, v) if (attribute == name) return *value = v, cudaSetDevice(device);
    EMULATOR_ATTRIBUTES(VALUE)
    return status(cudaErrorInvalidValue);
}
cudaError_t cudaDeviceSynchronize(void) { return forbidden() ? last_error : (drain_all(false), cudaSuccess); }
cudaError_t cudaMemGetInfo(size_t *free, size_t *total) { return *free = memory() - allocated, *total = memory(), cudaSuccess; }

cudaError_t emulator_malloc(void **p, size_t bytes, bool on_device) { // holds NaNs; of exact size, so that AddressSanitizer sees its end
    *p = NULL;
    if (forbidden()) return last_error;
    if (!bytes) return cudaSuccess;
    if ((on_device && bytes > memory() - allocated) || posix_memalign(p, 256, bytes)) return status(cudaErrorMemoryAllocation);
    cell *cells = watching && on_device ? (cell *)calloc(bytes, sizeof(cell)) : NULL;
    if (watching && on_device && !cells) fail("no memory to watch %zu bytes", bytes);
    allocations[(char *)memset(*p, 0xff, bytes)] = {bytes, on_device, cells}, allocated += on_device ? bytes : 0;
    return cudaSuccess;
}
static cudaError_t release(void *p, bool on_device) {
    if (!p) return cudaSuccess;
    if (forbidden()) return last_error;
    auto found = allocations.find((char *)p);
    if (found == allocations.end() || found->second.on_device != on_device) return status(cudaErrorInvalidValue);
    drain_all(false), free(found->second.cells), free(p), allocated -= on_device ? found->second.bytes : 0, allocations.erase(found);
    return cudaSuccess;
}
cudaError_t cudaFree(void *p) { return release(p, true); }
cudaError_t cudaFreeHost(void *p) { return release(p, false); }

enum place { PAGEABLE, PINNED, DEVICE, BEYOND };
static place place_of(const void *p, size_t bytes) {
    auto found = allocation_at(p);
    if (!found || (char *)p >= found->first + found->second.bytes) return PAGEABLE;
    return (char *)p + bytes > found->first + found->second.bytes ? BEYOND : found->second.on_device ? DEVICE : PINNED;
}
static bool copyable(const void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    place t = place_of(to, bytes), f = place_of(from, bytes);
    bool right = (t == DEVICE) == (kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice) &&
                 (f == DEVICE) == (kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice);
    return !bytes || (t != BEYOND && f != BEYOND && (right || kind == cudaMemcpyDefault));
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    if (forbidden()) return last_error;
    drain_all(true);
    return !copyable(to, from, bytes, kind) ? status(cudaErrorInvalidValue) : (bytes ? memcpy(to, from, bytes) : NULL, cudaSuccess);
}
cudaError_t cudaMemset(void *to, int byte, size_t bytes) {
    if (forbidden()) return last_error;
    drain_all(true);
    return bytes && place_of(to, bytes) != DEVICE ? status(cudaErrorInvalidValue) : (bytes ? memset(to, byte, bytes) : NULL, cudaSuccess);
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    if (!copyable(to, from, bytes, kind)) return status(cudaErrorInvalidValue);
    bool now_or_never = !(stream && stream->capture) && bytes; // pageable memory has been read, or written, when the call returns
    if (now_or_never && place_of(from, bytes) == PAGEABLE) {
        std::vector<char> staged((const char *)from, (const char *)from + bytes);
        submit(stream, [=] { memcpy(to, staged.data(), bytes); });
    } else if (bytes) submit(stream, [=] { memcpy(to, from, bytes); });
    if (now_or_never && place_of(to, bytes) == PAGEABLE) drain(stream ? stream : &null_stream);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *to, int byte, size_t bytes, cudaStream_t stream) {
    if (bytes && place_of(to, bytes) != DEVICE) return status(cudaErrorInvalidValue);
    return bytes ? submit(stream, [=] { memset(to, byte, bytes); }) : cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    if (forbidden()) return last_error;
    streams.push_back(*stream = new emulator_stream{!(flags & cudaStreamNonBlocking), false, NULL, {}});
    return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithFlags(stream, cudaStreamDefault); }
cudaError_t cudaStreamSynchronize(cudaStream_t s) { return forbidden() ? last_error : (s ? drain(s) : drain_all(true), cudaSuccess); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    if (!stream) return status(cudaErrorInvalidValue);
    if (cudaStreamSynchronize(stream)) return last_error;
    for (emulator_stream *&s : streams)
        if (s == stream) s = streams.back();
    return streams.pop_back(), delete stream, cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    if (!stream || capturing) return status(stream ? cudaErrorIllegalState : cudaErrorStreamCaptureUnsupported);
    capturing = stream, stream->capture = new emulator_graph, stream->broken = false;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    *graph = NULL;
    if (!stream || !stream->capture) return status(cudaErrorIllegalState);
    if (stream->broken) delete stream->capture;
    else *graph = stream->capture;
    stream->capture = NULL, capturing = NULL;
    return status(stream->broken ? cudaErrorStreamCaptureInvalidated : cudaSuccess);
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long) {
    return graph ? (*exec = new emulator_graph(*graph), cudaSuccess) : status(cudaErrorInvalidValue);
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    return exec ? submit(stream, [nodes = exec->nodes] { for (const auto &node : nodes) node(); }) : status(cudaErrorInvalidValue);
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { return delete exec, cudaSuccess; }
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }

cudaError_t cudaEventCreate(cudaEvent_t *event) { return *event = new emulator_event{0}, cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) { return cudaEventCreate(event); }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    typedef std::chrono::duration<double> seconds;
    return submit(stream, [=] { event->time = seconds(std::chrono::steady_clock::now().time_since_epoch()).count(); });
}
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaDeviceSynchronize(); }
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    return *milliseconds = (float)(1e3 * (end->time - start->time)), cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) { return cudaDeviceSynchronize(), delete event, cudaSuccess; }
