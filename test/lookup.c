// The demo's data: programs of assignments in which every variable leads, hop by hop, to a digit.
//
//     i=1 j=8 d=9 k=d e=k m=e … c=o | s=8 e=9 …
//
// 24 assignments: K chains of D variables, interleaved at random; then 16 results.
//
// lookup COUNT SEED SHAPES writes COUNT programs as JSON lines {"text": …}, in equal parts of the
// SHAPES, as in 8x3,6x4,4x6,3x8. lookup COUNT SEED SHAPES tasks writes
// {"prompt": …, "answer": …, "hops": …} with the first result as the question.
//
// A last argument, overwrite, makes the second task of the experiments, where breadth counts and
// depth should not: K·D assignments of digits to K variables, of which the latest one holds.
//
//     i=1 j=8 i=9 k=0 j=4 i=2 … | j=4 i=2 …
//
// Its "hops" are the older values of the variable: all of them are there to be mistaken for it.
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// The names are a to x, the only ones that the shipped base was trained with.
enum { VARIABLES = 24, CHAINS = 10, SHAPES = 16, RESULTS = 16 };

// Below n: the high bits of a 64-bit linear congruence.
static uint64_t state;
static unsigned below(unsigned n) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (unsigned)((state >> 33) * n >> 31);
}

static void shuffle(char *x, unsigned n) {
    for (unsigned i = n; i > 1; i--) {
        unsigned j = below(i);
        char swapped = x[i - 1];
        x[i - 1] = x[j];
        x[j] = swapped;
    }
}

typedef struct {
    unsigned chains, depth; // K, D
} shape;

// "KxD,KxD": how many shapes, 0 if one of them does not fit.
static unsigned read_shapes(const char *text, shape *shapes) {
    unsigned count = 0;
    while (text && count < SHAPES) {
        shape *s = &shapes[count++];
        bool ok = sscanf(text, "%ux%u", &s->chains, &s->depth) == 2;
        ok = ok && s->chains >= 1 && s->chains <= CHAINS && s->depth >= 1;
        if (!ok || s->chains * s->depth > VARIABLES) {
            fprintf(stderr, "lookup: '%s': at most 10 chains, 24 variables\n", text);
            return 0;
        }
        text = strchr(text, ',');
        if (text) text++;
    }
    return count;
}

// One program. The next variable is of a chain drawn in proportion to what the chain has left.
static void write_program(shape s, bool task) {
    unsigned K = s.chains, D = s.depth, total = K * D, used[CHAINS] = {0};
    char names[VARIABLES], digits[CHAINS], value[VARIABLES], hops[VARIABLES];
    for (int i = 0; i < VARIABLES; i++) names[i] = (char)('a' + i);
    for (int i = 0; i < CHAINS; i++) digits[i] = (char)('0' + i);
    shuffle(names, VARIABLES);
    shuffle(digits, CHAINS);

    printf(task ? "{\"prompt\": \"" : "{\"text\": \"");
    for (unsigned i = 0; i < total; i++) {
        unsigned pick = below(total - i), k = 0;
        while (pick >= D - used[k]) {
            pick -= D - used[k];
            k++;
        }
        unsigned at = used[k]++;
        char name = names[k * D + at];
        printf("%s%c=%c", i ? " " : "", name, at ? names[k * D + at - 1] : digits[k]);
        value[name - 'a'] = digits[k];
        hops[name - 'a'] = (char)at;
    }

    char name = names[below(total)];
    if (task) {
        printf(" | %c\", \"answer\": \"=%c\", \"hops\": %d}\n", name, value[name - 'a'],
               hops[name - 'a']);
        return;
    }
    printf(" |");
    for (int i = 0; i < RESULTS; i++) {
        printf(" %c=%c", name, value[name - 'a']);
        name = names[below(total)];
    }
    printf("\"}\n");
}

// The task that needs no depth. A question has no more than 7 older values, as in the first task.
static void write_overwrites(shape s, bool task) {
    unsigned K = s.chains, total = K * s.depth, writes[CHAINS] = {0};
    char names[VARIABLES], latest[CHAINS] = {0};
    for (int i = 0; i < VARIABLES; i++) names[i] = (char)('a' + i);
    shuffle(names, VARIABLES);

    printf(task ? "{\"prompt\": \"" : "{\"text\": \"");
    for (unsigned i = 0; i < total; i++) {
        unsigned k = below(K);
        latest[k] = (char)('0' + below(10));
        writes[k]++;
        printf("%s%c=%c", i ? " " : "", names[k], latest[k]);
    }

    printf(" |");
    for (int i = 0; i < RESULTS; i++) {
        unsigned k = below(K);
        while (writes[k] == 0 || (task && writes[k] > 8)) k = (k + 1) % K;
        if (task) {
            printf(" %c\", \"answer\": \"=%c\", \"hops\": %u}\n", names[k], latest[k],
                   writes[k] - 1);
            return;
        }
        printf(" %c=%c", names[k], latest[k]);
    }
    printf("\"}\n");
}

int main(int argc, char **argv) {
    bool task = argc > 4 && strcmp(argv[4], "tasks") == 0;
    bool overwrite = argc > 4 && strcmp(argv[argc - 1], "overwrite") == 0;
    if (argc < 4 || argc != 4 + task + overwrite) {
        fputs("usage: lookup COUNT SEED KxD[,KxD...] [tasks] [overwrite]\n", stderr);
        return 2;
    }
    unsigned long count = strtoul(argv[1], NULL, 10);
    state = strtoull(argv[2], NULL, 10) * 0x9e3779b97f4a7c15u + 1;
    for (int i = 0; i < 16; i++) below(2); // small seeds start alike
    shape shapes[SHAPES];
    unsigned shape_count = read_shapes(argv[3], shapes);
    if (shape_count == 0) return 2;
    for (unsigned long n = 0; n < count; n++) {
        shape s = shapes[n % shape_count];
        if (overwrite) {
            write_overwrites(s, task);
        } else {
            write_program(s, task);
        }
    }
    return fflush(stdout) || ferror(stdout);
}
