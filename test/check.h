// Checks that count: what every test program ends with, in C and C++.
#ifndef CHECK_H
#define CHECK_H
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>

static size_t passed, failed;

// One line for every check that fails; the count of both at the end of the program.
__attribute__((format(printf, 2, 3))) static bool check(bool ok, const char *format, ...) {
    va_list args;
    va_start(args, format);
    if (ok) passed++;
    else failed++;
    if (!ok) {
        fputs("FAILED ", stdout);
        vprintf(format, args);
        puts("");
    }
    va_end(args);
    return ok;
}

static int finish(const char *name) {
    printf("%-24s %zu passed, %zu failed\n", name, passed, failed);
    return failed != 0;
}
#endif
