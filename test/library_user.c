// library_user LIBRARY DIR PROMPT R: test/example.c with libretrofit.so, loaded at run time. No
// retrofit_ function is linked: each is looked up by its name.
#include "../retrofit.h"
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

static void *library;

static void *need(void *p, const char *why) {
    if (p) return p;
    fprintf(stderr, "library_user: %s\n", why);
    exit(1);
}

// A function of the library, as a pointer of the type that the header declares for it.
#define F(name) ((__typeof__(&name))need(dlsym(library, #name), #name))
#define NEED(p) need((void *)(p), F(retrofit_error)())

static void next_token(const char *directory, const char *prompt, size_t r) {
    size_t count, length;
    const retrofit_ops *cpu = need(dlsym(library, "retrofit_cpu"), "retrofit_cpu");
    retrofit_tokenizer *tokenizer = NEED(F(retrofit_tokenizer_load)(directory));
    retrofit_model *model = NEED(F(retrofit_load)(directory, cpu, RETROFIT_INFERENCE));
    int32_t *ids = NEED(F(retrofit_encode)(tokenizer, prompt, strlen(prompt), true, &count));

    retrofit_kv_cache cache = {.capacity = count, .recurrences = r};
    retrofit_recurrence_options options = {.recurrences = r};
    retrofit_buffers *buffers =
        NEED(F(retrofit_buffers_new)(model, 1, count, 0, RETROFIT_KEEP_NOTHING, &cache));
    const float *logits =
        NEED(F(retrofit_next_logits)(buffers, ids, 1, count, NULL, &options));
    int32_t next = F(retrofit_argmax)(logits, model->config.vocab);
    char *text = NEED(F(retrofit_decode)(tokenizer, &next, 1, true, &length));
    printf("%d '%s'\n", (int)next, text);
    free(text);
    free(ids);
    F(retrofit_buffers_free)(buffers);
    F(retrofit_free)(model);
    F(retrofit_tokenizer_free)(tokenizer);
}

int main(int argc, char **argv) {
    if (argc != 5) return 2;
    library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
    if (!library) need(NULL, dlerror());
    next_token(argv[2], argv[3], strtoul(argv[4], NULL, 10));
    return 0;
}
