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

int main(void) {
    enter("output");
    live_lines();
    return leave("output");
}
