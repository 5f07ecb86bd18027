// The model against the authors' modules: logits, losses, states and every gradient, tensor by
// tensor.
#include "test.h"

static const float *values(const retrofit_map *f, const char *run, const char *what) {
    return fixture(f, "%s.%s", run, what)->data;
}

static void open_fixture(retrofit_map *f, const char *name) {
    char path[256];
    snprintf(path, sizeof path, FIXTURES "%s/forward_backward.safetensors", name);
    need(retrofit_safetensors_open(f, path), path);
}

static retrofit_model *load(const char *name, const char *which, retrofit_mode mode) {
    char path[256];
    snprintf(path, sizeof path, FIXTURES "%s/%s", name, which);
    retrofit_model *model = retrofit_load(path, &retrofit_cpu, mode);
    need(model != NULL, path);
    return model;
}

static double compare_gradients(const retrofit_model *model, const retrofit_map *f,
                                const char *name, const char *run) {
    double worst = 0;
    for (size_t i = 0; i < model->parameter_count; i++) {
        const retrofit_parameter *p = model->parameters[i];
        const char *label = p->source[0].name;
        const retrofit_tensor *theirs = fixture(f, "%s.grad.%s", run, label);
        size_t count = p->rows * p->cols;
        double error = relative_error(p->grad, theirs->data, count);
        if (error > worst) worst = error;
        check(theirs->count == count && error < 1e-4, "%s %s gradient of %s: %.2e", name, run,
              label, error);
    }
    return worst;
}

// One training pass: logits, states, loss and gradients.
static void compare_pass(const char *name, const char *run, size_t n, size_t k,
                         retrofit_keep keep) {
    retrofit_map f;
    open_fixture(&f, name);
    retrofit_model *model = load(name, "recurrent", RETROFIT_TRAINING);
    const retrofit_tensor *tokens = fixture(&f, "tokens"), *labels = fixture(&f, "labels");
    const retrofit_tensor *s0 = fixture(&f, "s0");
    size_t B = tokens->shape[0], T = tokens->shape[1], V = model->config.vocab;
    retrofit_buffers *buffers = retrofit_buffers_new(model, B, T, k, keep, NULL);
    need(buffers && retrofit_prelude(buffers, tokens->data, B, T), name);
    memcpy(buffers->state, s0->data, s0->count * sizeof(float));
    retrofit_recur(buffers, n, k);
    retrofit_coda(buffers);

    float *logits = retrofit_allocate(B * T * V, sizeof *logits);
    retrofit_logits(buffers, 0, B * T, logits);
    double error = relative_error(logits, values(&f, run, "logits"), B * T * V);
    check(error < 1e-5, "%s %s logits: %.2e", name, run, error);
    error = relative_error(latest_state(buffers), values(&f, run, "latents"), s0->count);
    check(error < 1e-5, "%s %s latents: %.2e", name, run, error);
    double loss = retrofit_loss(buffers, labels->data, 1), theirs = *values(&f, run, "loss");
    check(fabs(loss - theirs) < 1e-5 * theirs, "%s %s loss: %.9g, the authors' %.9g", name, run,
          loss, theirs);
    retrofit_backward(buffers);
    double worst = compare_gradients(model, &f, name, run);
    printf("%s %s: loss %.6f, worst gradient %.1e\n", name, run, loss, worst);

    free(logits);
    retrofit_buffers_free(buffers);
    retrofit_free(model);
    retrofit_safetensors_close(&f);
}

static void compare(const char *name, const char *run, size_t n, size_t k) {
    compare_pass(name, run, n, k, RETROFIT_KEEP_ALL);
    compare_pass(name, run, n, k, RETROFIT_KEEP_INPUTS);
}

// The source model: inference, where blocks run in place.
static void compare_base(const char *name) {
    retrofit_map f;
    open_fixture(&f, name);
    retrofit_model *model = load(name, "base", RETROFIT_INFERENCE);
    const retrofit_tensor *tokens = fixture(&f, "tokens");
    size_t B = tokens->shape[0], T = tokens->shape[1], V = model->config.vocab;
    retrofit_buffers *buffers = retrofit_buffers_new(model, B, T, 0, RETROFIT_KEEP_NOTHING, NULL);
    need(buffers && retrofit_prelude(buffers, tokens->data, B, T), name);
    float *logits = retrofit_allocate(B * T * V, sizeof *logits);
    retrofit_coda(buffers);
    retrofit_logits(buffers, 0, B * T, logits);
    double error = relative_error(logits, fixture(&f, "base.logits")->data, B * T * V);
    check(error < 1e-5, "%s base logits: %.2e", name, error);
    free(logits);
    retrofit_buffers_free(buffers);
    retrofit_free(model);
    retrofit_safetensors_close(&f);
}

// The recurrent model from the zero state at r = 1, 2, 4, 8: one run of states, read off on the
// way.
static void compare_depths(const char *name) {
    retrofit_map f;
    open_fixture(&f, name);
    retrofit_model *model = load(name, "recurrent", RETROFIT_INFERENCE);
    const retrofit_tensor *tokens = fixture(&f, "tokens");
    size_t T = tokens->shape[1], V = model->config.vocab, done = 0;
    retrofit_buffers *buffers = retrofit_buffers_new(model, 1, T, 0, RETROFIT_KEEP_NOTHING, NULL);
    need(buffers && retrofit_prelude(buffers, tokens->data, 1, T), name);
    float *logits = retrofit_allocate(T * V, sizeof *logits);
    retrofit_init_state(buffers, 0, 1);
    for (size_t r = 1; r <= 8; r *= 2) {
        retrofit_recur(buffers, r - done, 0);
        done = r;
        retrofit_coda(buffers);
        retrofit_logits(buffers, 0, T, logits);
        double error = relative_error(logits, fixture(&f, "zero.r%zu.logits", r)->data, T * V);
        check(error < 1e-5, "%s zero state, r = %zu: logits %.2e", name, r, error);
    }
    free(logits);
    retrofit_buffers_free(buffers);
    retrofit_free(model);
    retrofit_safetensors_close(&f);
}

int main(void) {
    static const char *const names[] = {"tiny", "llama3", "head64", "olmo2", "qwen2", "qwen3"};
    compare("tiny", "n0k1", 0, 1);
    compare("tiny", "n2k3", 2, 3);
    compare("llama3", "n1k2", 1, 2);
    compare("llama3", "n5k4", 5, 4);
    compare("head64", "n1k2", 1, 2);
    compare("olmo2", "n1k2", 1, 2);
    compare("qwen2", "n1k2", 1, 2);
    compare("qwen3", "n1k2", 1, 2);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        compare_base(names[i]);
        compare_depths(names[i]);
    }
    return finish("model");
}
