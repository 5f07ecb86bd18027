// What programs write, and what they leave: the line about work that goes on, on a terminal and in
// a file; streams that fail; files that are there as a whole or not at all, whatever stops the
// program.
#include "run.h"

// ---- A terminal --------------------------------------------------------------------------------

// What came to a terminal of so many columns while `work` ran in a process whose stderr it was.
static char terminal[1 << 16];

static void on_terminal(unsigned short columns, void (*work)(const void *), const void *argument) {
    struct winsize window = {.ws_col = columns, .ws_row = 24};
    int master = posix_openpt(O_RDWR | O_NOCTTY);
    need(master >= 0 && !grantpt(master) && !unlockpt(master), "a terminal");
    int slave = open(ptsname(master), O_RDWR | O_NOCTTY);
    need(slave >= 0 && !ioctl(slave, TIOCSWINSZ, &window), "its window");
    fflush(stdout);
    pid_t child = fork();
    need(child >= 0, "fork");
    if (child == 0) {
        dup2(slave, STDERR_FILENO);
        setenv("TERM", "xterm", 1);
        work(argument);
        _exit(0);
    }
    close(slave);
    size_t size = 0;
    for (;;) { // reading fails once no process has the terminal open
        ssize_t n = read(master, terminal + size, sizeof terminal - 1 - size);
        if (n <= 0) break;
        size += (size_t)n;
    }
    terminal[size] = 0;
    close(master);
    waitpid(child, NULL, 0);
}

static void show_lines(const void *argument) {
    (void)argument;
    retrofit_live_line("one");
    retrofit_live_line("0123456789abcdefghijklm");
    retrofit_live_line("äöüäöüäöüäöüäöüäöüäöü");
    retrofit_live_line("日本語日本語日本語日本語日本語");
    retrofit_note("said");
    retrofit_live_line("two");
    retrofit_live_line(NULL);
    retrofit_live_line(NULL);
}

static void live_lines(void) {
    static const char expected[] = "\rone\033[K"
                                   "\r0123456789abcdefghi\033[K"
                                   "\räöüäöüäöüäöüäöüäöüä\033[K"
                                   "\r日本語日本語日本語\033[K"
                                   "\r\033[Knote: said\r\n"
                                   "\rtwo\033[K\r\033[K";
    on_terminal(20, show_lines, NULL);
    check(!strcmp(terminal, expected), "20 columns: '%s'", terminal);
    on_terminal(0, show_lines, NULL); // a terminal that does not say how wide it is
    check(strstr(terminal, "jklm") != NULL, "0 columns: '%s'", terminal);
    on_terminal(1, show_lines, NULL);
    check(!strncmp(terminal, "\r\033[K\r\033[K", 8), "1 column: '%s'", terminal);
}

static int run_command(const char *command) {
    int status = system(command);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static void run_there(const void *command) {
    if (run_command(command)) fputs("it failed", stderr);
}

// All live lines of a command on a terminal of 40 columns fit into it, there are some, and the last
// one is taken away.
static void check_on_terminal(const char *command) {
    double began = retrofit_seconds();
    on_terminal(40, run_there, command);
    bool quick = retrofit_seconds() - began < 0.6; // a machine on which this is no long work
    size_t count = 0, erased = 0;
    bool fits = true;
    for (const char *at = strchr(terminal, '\r'); at; at = strchr(at + 1, '\r')) {
        const char *end = strstr(at, "\033[K");
        if (!end || at[1] == '\n') continue;
        size_t size = (size_t)(end - at - 1);
        fits = fits && size < 40 && !memchr(at, '\n', size + 1);
        count += size > 0;
        erased = size == 0 ? count : erased;
    }
    check(fits, "%s: a live line too long: '%s'", command, terminal);
    check((count > 0 || quick) && erased == count, "%s: %zu live lines, %zu taken away: '%s'",
          command, count, erased, terminal);
    check(!strstr(terminal, "failed"), "%s: '%s'", command, terminal);
}

// In a file a line of its own, every two seconds, and none of work that took less.
static void show_in_file(const char *path) {
    static const struct timespec pause = {.tv_sec = 2, .tv_nsec = 1000000};
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        int file = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
        need(file >= 0 && dup2(file, STDERR_FILENO) >= 0, path);
        retrofit_shows_shares = true;
        for (size_t i = 0; i <= 4; i++) {
            if (i == 2) nanosleep(&pause, NULL);
            retrofit_show_share(i, 4, "%s done", "it");
        }
        _exit(0);
    }
    waitpid(child, NULL, 0);
    size_t size;
    char *text = slurp(path, &size);
    check(!strcmp(text, "50 % of it done\n"), "in a file: '%s'", text);
    free(text);
}

// Work of about a second shows how far it is on a terminal.
static void long_work(void) {
    static const char *const commands[] = {
        "infer --model talk --eval rows.bin --seq-len 100 --rows 20 --recurrences 1,16,64 >table",
        "infer --model talk --eval rows.bin --seq-len 100 --rows 9 --recurrences 32 --kv-bf16 "
        "--json >table",
        "infer --model talk --tokenizer f/tokenizers/smollm_style --batch prompts.jsonl "
        "--max-tokens 500 --recurrences 8 >table",
        "infer --model talk --tokenizer f/tokenizers/smollm_style --tasks tasks.jsonl >table",
        "convert --random large.json --to large >table",
    };
    shell("sed 's/131/1000/; s/128/1300/' f/tiny/recurrent/config.json >talk.json && "
          "sed 's/131/30000/; s/32,/200,/; s/: 8,/: 50,/' f/tiny/base/config.json >large.json && "
          "convert --random talk.json --to talk >table && for i in $(seq 40); do "
          "seq $i 120 | tr '\\n' ' '; echo; done >numbers.txt && convert --tokenize numbers.txt "
          "--tokenizer f/tokenizers/smollm_style --to rows.bin >table && "
          "for i in 1 2 3 4; do echo '{\"prompt\": \"Once\"}'; done >prompts.jsonl && "
          "for i in $(seq 400); do echo '{\"prompt\": \"Once '$i'\", \"answer\": \" '"
          "$i$i$i$i'\"}'; done >tasks.jsonl");
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) check_on_terminal(commands[i]);
}

// The line of the third step on a terminal of so many columns.
static void read_step_line(unsigned short columns, char line[256]) {
    static const char command[] = "train --model talk --data rows.bin --out line --steps 3 "
                                  "--seq-len 20 --micro-batch-size 1 && rm -r line";
    on_terminal(columns, run_there, command);
    const char *begin = strstr(terminal, "\rstep 3/3"), *end = begin ? strchr(begin, '\033') : NULL;
    check(end != NULL, "%d columns: no third step: '%s'", columns, terminal);
    if (end) snprintf(line, 256, "%.*s", (int)(end - begin - 1), begin + 1);
}

// A narrow terminal has the step, its loss, how long the rest takes and the speed; none is cut.
static void step_lines(void) {
    static const char *const parts[] = {"  loss ", "  ETA ", " tok/s", "  muon-lr ", "  n,k ",
                                        "  r ", "  |g| ", "FLOP/s"};
    char line[256] = {0};
    for (size_t i = 0; i < 2; i++) {
        read_step_line(i ? 160 : 60, line);
        check(strlen(line) < (i ? 160 : 60), "a line of a step too long: '%s'", line);
        for (size_t j = 0; j < (i ? 8 : 3); j++)
            check(strstr(line, parts[j]) != NULL, "no '%s' in '%s'", parts[j], line);
    }
    read_step_line(30, line);
    check(strlen(line) < 30 && strstr(line, "  loss ") && !strstr(line, "ETA"), "30: '%s'", line);
}

// ---- Streams that fail -------------------------------------------------------------------------

#define ONCE "infer --model talk --tokenizer f/tokenizers/smollm_style "

// Nor is a text lost in silence where stdout is closed; what prints nothing goes on.
static void closed_stdout(void) {
    static const char *const commands[] = {
        "train --help",
        "convert --version",
        ONCE "--prompt Once --max-tokens 3",
        "infer --model talk --eval rows.bin --rows 1 --seq-len 20 --recurrences 1 --json",
        "convert --random talk.json --to unseen",
        "train --model talk --dry-run=schedule --steps 2",
    };
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
        fails(1, "writing to stdout failed: it is closed", "%s >&-", commands[i]);
    works("infer --model talk --tokens 1,2 --logits closed.safetensors >&- && "
          "infer --model talk --tokens 1,2 --logits open.safetensors && "
          "cmp closed.safetensors open.safetensors");
    works("train --model talk --data rows.bin --out trained --steps 1 --seq-len 20 "
          "--micro-batch-size 1 >&- && ls trained/latest/model.safetensors");
}

// Every mode that prints notices that nobody got it; what was to be made beside that is there.
static void full_stdout(void) {
    static const char *const commands[] = {
        ONCE "--prompt Once --max-tokens 3",
        ONCE "--prompt Once --max-tokens 3 --json",
        ONCE "--prompt Once --max-tokens 0",
        ONCE "--batch prompts.jsonl --max-tokens 3",
        ONCE "--tasks tasks.jsonl --rows 3 --recurrences 1",
        ONCE "--tasks tasks.jsonl --rows 3 --recurrences 1 --json",
        ONCE "--prompt Once --print-tokens",
        "infer --model talk --eval rows.bin --rows 1 --seq-len 20 --recurrences 1",
        "infer --model talk --eval rows.bin --rows 1 --seq-len 20 --recurrences 1 --kv-bf16",
        "convert --random talk.json --to made",
        "convert --from f/lookup/base --to cut --prelude 0 --core 1 --coda 2",
        "convert --tokenize numbers.txt --tokenizer f/tokenizers/smollm_style --to made.bin",
    };
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
        fails(1, "writing to stdout failed: No space left on device", "%s >/dev/full", commands[i]);
    works("ls made/model.safetensors cut/tokenizer.json made.bin");
}

static void failing_stdin(void) {
    fails(1, "--prompt -: reading stdin failed: Is a directory", ONCE "--prompt - <talk");
    fails(1, "talk: ", ONCE "--batch talk");
    fails(1, "talk: ", ONCE "--tasks talk");
}

// Files that fail late: /dev/full takes all and keeps nothing. A device stays what it is.
static void full_files(void) {
    fails(1, "/dev/full: writing failed: No space left on device",
          ONCE "--prompt Once --logits /dev/full");
    works("! " ONCE "--prompt Once --max-tokens 3 --recurrences 2 --trace /dev/full");
    check(strstr(err, "infer: /dev/full: writing failed: No space left") != NULL, "--trace: %s",
          err);
    works("[ -c /dev/full ]");
    shell("mkdir shut && echo old >shut/old && chmod a-w shut");
    if (access("shut", W_OK)) // root writes everywhere
        fails(1, "shut/old: Permission denied", ONCE "--prompt Once --logits shut/old");
    shell("chmod u+w shut");
}

// What cannot be looked at is not taken for what is not there: a link that leads nowhere, a name
// that is too long for the system.
static void unreadable_companions(void) {
    shell("cp -r f/lookup/base dangling && chmod -R u+w dangling && "
          "ln -s nowhere dangling/chat_template.jinja");
    fails(1, "dangling/chat_template.jinja: No such file", "convert --from dangling --to bad >ls");
    shell("rm dangling/chat_template.jinja && mkdir dangling/vocab.json");
    fails(1, "dangling/vocab.json: not a regular file", "convert --from dangling --to bad >ls");
    shell("rmdir dangling/vocab.json && ln -s generation_config.json "
          "dangling/generation_config.json");
    fails(1, "generation_config.json: Too many levels", "convert --from dangling --to bad");
    shell("ln -s nowhere link");
    fails(1, "link exists already", "convert --from f/lookup/base --to link");
}

// A run's directory does for its tokenizer as it does for its model.
static void tokenizer_of_a_run(void) {
    shell("mkdir run && cp -r f/lookup/base run/step_00000001 && ln -s step_00000001 run/latest && "
          "chmod -R u+w run && "
          "echo '{{ messages[0].content }}' >run/latest/chat_template.jinja && "
          "cp f/lookup/base/config.json lookup.json");
    works("infer --tokenizer run --prompt 'a=1 b' --print-tokens");
    works("infer --model f/lookup/base --tokenizer run --chat --prompt 'a=1 b' --max-tokens 1");
    works("convert --random lookup.json --tokenizer run --to carried && "
          "cmp carried/tokenizer.json run/latest/tokenizer.json && "
          "cmp carried/chat_template.jinja run/latest/chat_template.jinja");
    fails(1, "tokenizer.json", "convert --random lookup.json --tokenizer talk --to bad");
    fails(1, "nowhere", "convert --random lookup.json --tokenizer nowhere --to bad");
}

// A training that runs, or was killed, before its first checkpoint is no model yet.
static void run_without_checkpoint(void) {
    static const char *const commands[] = {
        "infer --model begun --prompt a",
        "infer --model begun --tokens 1,2 --logits bad",
        "infer --model f/lookup/base --tokenizer begun --prompt a",
        "train --model begun --data rows.bin --out bad --steps 1",
        "convert --from begun --to bad",
        "convert --tokenize numbers.txt --tokenizer begun --to bad.bin",
    };
    shell("mkdir begun && touch begun/log.jsonl begun/options.txt");
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
        fails(1, "begun: a training run that has no checkpoint yet", "%s", commands[i]);
}

// What is said is one line without control characters, whatever is in names and files.
static void one_line(void) {
    char text[] = "a\033[31mb\tc\n\x7f \xc2\x9b \xc2\xa0\xc3\xa9";
    retrofit_make_line(text);
    check(!strcmp(text, "a?[31mb?c?? ?? \xc2\xa0\xc3\xa9"), "one line: '%s'", text);
    fails(1, "no?where", "train --model 'no\nwhere' --data a.bin --out b --steps 1");
    fails(1, "no?where", "infer --model 'no\nwhere' --prompt a");
    fails(1, "no?where", "convert --from 'no\nwhere' --to b --preset smollm2");
}

int main(void) {
    enter("output");
    one_line();
    live_lines();
    show_in_file("lines");
    long_work();
    step_lines();
    tokenizer_of_a_run();
    run_without_checkpoint();
    closed_stdout();
    full_stdout();
    failing_stdin();
    full_files();
    unreadable_companions();
    return leave("output");
}
