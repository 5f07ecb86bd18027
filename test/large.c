// What test/large.sh needs beside the three programs:
//
//     large publish FROM TO                a recurrent model's tensors as the authors publish them
//     large finite FILE                    whether all numbers of a .safetensors file are finite
//     large measure TABLE NAME COMMAND …   runs it, and adds its time and memory to the table
//     large measure-until PATH TABLE NAME COMMAND …
//                                          the same, but kills it once PATH is there and not empty
#define RETROFIT_IMPLEMENTATION
#include "../retrofit.h"
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>

__attribute__((format(printf, 1, 2), noreturn)) static void die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fputs("large: ", stderr);
    vfprintf(stderr, format, args);
    fputs("\n", stderr);
    va_end(args);
    exit(1);
}

static void must(bool ok) {
    if (!ok) die("%s", retrofit_error());
}

// ---- A published model -------------------------------------------------------------------------

// Two F32 shards with an index, as save_pretrained of transformers names them.
enum { SHARDS = 2 };
static void shard_name(char name[64], size_t shard) {
    snprintf(name, 64, "model-%05zu-of-%05d.safetensors", shard + 1, SHARDS);
}

// How many tensors from `first` on make up the share of the file's bytes that a shard gets.
static size_t count_for_shard(const retrofit_map *map, size_t first) {
    size_t bytes = 0, count = 0;
    while (first + count < map->count && bytes < map->bytes / SHARDS) {
        const retrofit_tensor *tensor = &map->tensors[first + count];
        bytes += tensor->count * retrofit_type_size(tensor->type);
        count++;
    }
    return count;
}

// The index: {"metadata": {"total_size": bytes}, "weight_map": {tensor: file}}.
static FILE *begin_index(const char *path, const retrofit_map *map) {
    FILE *file = fopen(path, "wb");
    if (!file) die("%s: %s", path, strerror(errno));
    size_t bytes = 0;
    for (size_t i = 0; i < map->count; i++) bytes += map->tensors[i].count * sizeof(float);
    fprintf(file, "{\n  \"metadata\": {\n    \"total_size\": %zu\n  },\n", bytes);
    fprintf(file, "  \"weight_map\": {");
    return file;
}

static void publish(const char *from, const char *to) {
    char path[RETROFIT_PATH], name[64];
    retrofit_map map;
    must(retrofit_path(path, from, "model.safetensors") && retrofit_safetensors_open(&map, path));
    must(retrofit_path(path, to, "model.safetensors.index.json"));
    FILE *index = begin_index(path, &map);
    const char *separator = "\n";
    for (size_t shard = 0, first = 0; shard < SHARDS; shard++) {
        size_t count = count_for_shard(&map, first);
        shard_name(name, shard);
        must(retrofit_path(path, to, name));
        must(retrofit_safetensors_write(path, &retrofit_cpu, map.tensors + first, count,
                                        RETROFIT_F32, NULL));
        for (size_t end = first + count; first < end; first++) {
            fprintf(index, "%s    \"%s\": \"%s\"", separator, map.tensors[first].name, name);
            separator = ",\n";
        }
    }
    fprintf(index, "\n  }\n}\n");
    must(retrofit_finish_file(index, "the index", true));
    retrofit_safetensors_close(&map);
}

static void check_finite(const char *path) {
    retrofit_map map;
    must(retrofit_safetensors_open(&map, path));
    size_t infinite, zeros;
    retrofit_safetensors_survey(&map, false, &infinite, &zeros);
    if (infinite < map.count) die("%s: %s is not finite", path, map.tensors[infinite].name);
    if (zeros < map.count) die("%s: %s is zero", path, map.tensors[zeros].name);
    retrofit_safetensors_close(&map);
}

// ---- Measuring a command -----------------------------------------------------------------------

// Memory in KiB, as Linux counts it: a process's own, and pages of files that it has mapped, which
// the system takes away again where memory is needed for something else.
typedef struct {
    size_t all, own, files;
} memory;

static void note_memory(memory *most, pid_t process) {
    char path[64], line[256];
    snprintf(path, sizeof path, "/proc/%d/status", (int)process);
    FILE *file = fopen(path, "r");
    if (!file) return;
    while (fgets(line, sizeof line, file)) {
        size_t kib = 0;
        if (sscanf(line, "VmHWM: %zu", &kib) == 1) most->all = retrofit_max(most->all, kib);
        if (sscanf(line, "RssAnon: %zu", &kib) == 1) most->own = retrofit_max(most->own, kib);
        if (sscanf(line, "RssFile: %zu", &kib) == 1) most->files = retrofit_max(most->files, kib);
    }
    fclose(file);
}

static double seconds_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static double seconds_of(struct timeval time) {
    return (double)time.tv_sec + 1e-6 * (double)time.tv_usec;
}

static bool has_something(const char *path) {
    struct stat status;
    return !stat(path, &status) && status.st_size > 0;
}

// Waits for the process, or kills it once `until` is there, and looks at its memory meanwhile.
static int watch(pid_t process, const char *until, memory *most) {
    const struct timespec pause = {.tv_nsec = 20 * 1000 * 1000};
    int status = 0;
    bool killed = false;
    while (waitpid(process, &status, WNOHANG) == 0) {
        note_memory(most, process);
        if (until && !killed && has_something(until)) killed = !kill(process, SIGKILL);
        nanosleep(&pause, NULL);
    }
    if (killed) return 0;
    if (until && !has_something(until)) die("it ended before %s was there", until);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}

// A line of the table: name, seconds, seconds of all cores together, and KiB of memory.
static int measure(const char *until, const char *table, const char *name, char **command) {
    memory most = {0};
    struct rusage usage;
    double begin = seconds_now();
    pid_t process = fork();
    if (process < 0) die("fork: %s", strerror(errno));
    if (process == 0) {
        execvp(command[0], command);
        die("%s: %s", command[0], strerror(errno));
    }
    int code = watch(process, until, &most);
    double seconds = seconds_now() - begin;
    getrusage(RUSAGE_CHILDREN, &usage);
    size_t all = retrofit_max(most.all, (size_t)usage.ru_maxrss);

    FILE *file = fopen(table, "ab");
    if (!file) die("%s: %s", table, strerror(errno));
    fprintf(file, "%s\t%.1f\t%.1f\t%zu\t%zu\t%zu\n", name, seconds,
            seconds_of(usage.ru_utime) + seconds_of(usage.ru_stime), all, most.own, most.files);
    if (fclose(file)) die("%s: %s", table, strerror(errno));
    return code;
}

int main(int argc, char **argv) {
    const char *task = argc > 2 ? argv[1] : "";
    if (!strcmp(task, "publish") && argc == 4) publish(argv[2], argv[3]);
    else if (!strcmp(task, "finite") && argc == 3) check_finite(argv[2]);
    else if (!strcmp(task, "measure") && argc > 4) return measure(NULL, argv[2], argv[3], argv + 4);
    else if (!strcmp(task, "measure-until") && argc > 5)
        return measure(argv[2], argv[3], argv[4], argv + 5);
    else return 2;
    return 0;
}
