// What every test program shares: checks that count, and readers for the authors' numbers in
// fixtures/.
#ifndef TEST_H
#define TEST_H
#define RETROFIT_IMPLEMENTATION
#include "../retrofit.h"

#include "check.h"

// For what a test cannot go on without.
static void need(bool ok, const char *what) {
    if (ok) return;
    printf("FAILED %s: %s\n", what, retrofit_error());
    failed++;
    exit(finish(what));
}

// xorshift64: the same numbers in every run.
static inline uint32_t random_below(uint32_t n) {
    static uint64_t seed = 1;
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return (uint32_t)((seed >> 11) % n);
}

// ‖a - b‖ / ‖b‖, in double.
static inline double relative_error(const float *a, const float *b, size_t n) {
    double difference = 0, size = 0;
    for (size_t i = 0; i < n; i++) {
        difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        size += (double)b[i] * b[i];
    }
    return size > 0 ? sqrt(difference / size) : sqrt(difference);
}

static inline const retrofit_tensor *fixture(const retrofit_map *f, const char *format, ...) {
    char name[256];
    va_list args;
    va_start(args, format);
    vsnprintf(name, sizeof name, format, args);
    va_end(args);
    const retrofit_tensor *t = retrofit_safetensors_find(f, name);
    if (!t) retrofit_fail("%s: no tensor %s", f->path, name);
    need(t != NULL, name);
    return t;
}

#define FIXTURES "test/fixtures/"
#endif
