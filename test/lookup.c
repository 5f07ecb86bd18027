// The demo's data: programs of assignments in which every variable leads, hop by hop, to a digit.
//
//     i=1 j=8 d=9 k=d e=k m=e … c=o | s=8 e=9 …      24 assignments: K chains of D variables, interleaved at random; 16 results
//
// lookup COUNT SEED SHAPES writes COUNT programs as JSON lines {"text": …}, in equal parts of the SHAPES, as in 8x3,6x4,4x6,3x8.
// lookup COUNT SEED SHAPES tasks writes {"prompt": …, "answer": …, "hops": …} with the first result as the question.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint64_t state;
static unsigned below(unsigned n) { // a 64-bit linear congruence; its high bits
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (unsigned)((state >> 33) * n >> 31);
}

static void shuffle(char *x, unsigned n) {
    for (unsigned i = n; i > 1; i--) {
        unsigned j = below(i);
        char t = x[i - 1];
        x[i - 1] = x[j], x[j] = t;
    }
}

int main(int argc, char **argv) {
    if (argc < 4 || argc > 5) return fputs("usage: lookup COUNT SEED KxD[,KxD...] [tasks]\n", stderr), 2;
    unsigned long count = strtoul(argv[1], NULL, 10);
    state = strtoull(argv[2], NULL, 10) * 0x9e3779b97f4a7c15u + 1;
    for (int i = 0; i < 16; i++) below(2); // small seeds start alike
    unsigned chains[16], depths[16], shapes = 0;
    for (const char *s = argv[3]; s && shapes < 16; s = strchr(s, ','), s += s != NULL, shapes++)
        if (sscanf(s, "%ux%u", &chains[shapes], &depths[shapes]) != 2 || chains[shapes] < 1 || chains[shapes] > 10 || depths[shapes] < 1 ||
            chains[shapes] * depths[shapes] > 26)
            return fprintf(stderr, "lookup: '%s': at most 10 chains, 26 variables\n", s), 2;
    for (unsigned long n = 0; n < count; n++) {
        unsigned K = chains[n % shapes], D = depths[n % shapes], used[10] = {0}, total = K * D;
        char names[26], digits[10], value[26], hops[26];
        for (int i = 0; i < 26; i++) names[i] = (char)('a' + i);
        for (int i = 0; i < 10; i++) digits[i] = (char)('0' + i);
        shuffle(names, 26), shuffle(digits, 10);
        printf(argc == 5 ? "{\"prompt\": \"" : "{\"text\": \"");
        for (unsigned i = 0; i < total; i++) { // the next variable of a chain, each chain in proportion to what it has left
            unsigned pick = below(total - i), k = 0;
            while (pick >= D - used[k]) pick -= D - used[k++];
            unsigned at = used[k]++;
            char name = names[k * D + at];
            printf("%s%c=%c", i ? " " : "", name, at ? names[k * D + at - 1] : digits[k]);
            value[name - 'a'] = digits[k], hops[name - 'a'] = (char)at;
        }
        char name = names[below(total)];
        if (argc == 5) printf(" | %c\", \"answer\": \"=%c\", \"hops\": %d}\n", name, value[name - 'a'], hops[name - 'a']);
        else {
            printf(" |");
            for (int i = 0; i < 16; i++, name = names[below(total)]) printf(" %c=%c", name, value[name - 'a']);
            printf("\"}\n");
        }
    }
    return fflush(stdout) || ferror(stdout);
}
