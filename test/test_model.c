// The model against the authors' modules: logits, losses, states and every gradient, tensor by tensor.
#include "test.h"

// Surgery has copied the layers; what the forward and backward make of them is compared here.
static void compare(const char *name, const char *run, size_t n, size_t k) {
    char path[256];
    snprintf(path, sizeof path, FIXTURES "%s/recurrent", name);
    retrofit_model *m = retrofit_load(path, &retrofit_cpu, RETROFIT_TRAINING);
    need(m != NULL, path);
    retrofit_map f;
    snprintf(path, sizeof path, FIXTURES "%s/forward_backward.safetensors", name);
    need(retrofit_safetensors_open(&f, path), path);
    const retrofit_tensor *tokens = fixture(&f, "tokens"), *labels = fixture(&f, "labels"), *s0 = fixture(&f, "s0");
    size_t B = tokens->shape[0], T = tokens->shape[1], V = m->config.vocab;
    retrofit_buffers *a = retrofit_buffers_new(m, B, T, k, RETROFIT_KEEP_ALL, NULL);
    need(a && retrofit_prelude(a, (const int32_t *)tokens->data, B, T), name);
    memcpy(a->state, s0->data, s0->count * 4);
    retrofit_recur(a, n, k);
    retrofit_coda(a);
    float *logits = (float *)retrofit_allocate(B * T * V, 4);
    retrofit_logits(a, 0, B * T, logits);
    double error = relative_error(logits, (const float *)fixture(&f, "%s.logits", run)->data, B * T * V);
    check(error < 1e-5, "%s %s logits: %.2e", name, run, error);
    error = relative_error(latest_state(a), (const float *)fixture(&f, "%s.latents", run)->data, s0->count);
    check(error < 1e-5, "%s %s latents: %.2e", name, run, error);
    double loss = retrofit_loss(a, (const int32_t *)labels->data, 1), theirs = *(const float *)fixture(&f, "%s.loss", run)->data;
    check(fabs(loss - theirs) < 1e-5 * theirs, "%s %s loss: %.9g, the authors' %.9g", name, run, loss, theirs);
    retrofit_backward(a);
    double worst = 0;
    for (size_t i = 0; i < m->parameter_count; i++) {
        const retrofit_parameter *p = m->parameters[i];
        const retrofit_tensor *g = fixture(&f, "%s.grad.%s", run, p->source[0].name);
        error = relative_error(p->grad, (const float *)g->data, p->rows * p->cols);
        if (error > worst) worst = error;
        check(g->count == p->rows * p->cols && error < 1e-4, "%s %s gradient of %s: %.2e", name, run, p->source[0].name, error);
    }
    printf("%s %s: loss %.6f, worst gradient %.1e\n", name, run, loss, worst);
    free(logits), retrofit_buffers_free(a), retrofit_free(m), retrofit_safetensors_close(&f);
}

// The source model, and the recurrent one from the zero state at r = 1, 2, 4, 8: inference, where blocks run in place.
static void compare_logits(const char *name) {
    char path[256];
    retrofit_map f;
    snprintf(path, sizeof path, FIXTURES "%s/forward_backward.safetensors", name);
    need(retrofit_safetensors_open(&f, path), path);
    const retrofit_tensor *tokens = fixture(&f, "tokens");
    size_t B = tokens->shape[0], T = tokens->shape[1];
    for (int base = 0; base < 2; base++) {
        snprintf(path, sizeof path, FIXTURES "%s/%s", name, base ? "base" : "recurrent");
        retrofit_model *m = retrofit_load(path, &retrofit_cpu, RETROFIT_INFERENCE);
        need(m != NULL, path);
        size_t V = m->config.vocab;
        retrofit_buffers *a = retrofit_buffers_new(m, B, T, 0, RETROFIT_KEEP_NOTHING, NULL);
        need(a && retrofit_prelude(a, (const int32_t *)tokens->data, base ? B : 1, T), name);
        float *logits = (float *)retrofit_allocate(B * T * V, 4);
        if (base) {
            retrofit_coda(a);
            retrofit_logits(a, 0, B * T, logits);
            double error = relative_error(logits, (const float *)fixture(&f, "base.logits")->data, B * T * V);
            check(error < 1e-5, "%s base logits: %.2e", name, error);
        }
        retrofit_init_state(a, 0, 1);
        for (size_t r = 1, done = 0; !base && r <= 8; done = r, r *= 2) { // one run of states, read off on the way
            retrofit_recur(a, r - done, 0);
            retrofit_coda(a);
            retrofit_logits(a, 0, T, logits);
            double error = relative_error(logits, (const float *)fixture(&f, "zero.r%zu.logits", r)->data, T * V);
            check(error < 1e-5, "%s zero state, r = %zu: logits %.2e", name, r, error);
        }
        free(logits), retrofit_buffers_free(a), retrofit_free(m);
    }
    retrofit_safetensors_close(&f);
}

int main(void) {
    compare("tiny", "n0k1", 0, 1);
    compare("tiny", "n2k3", 2, 3);
    compare("llama3", "n1k2", 1, 2);
    compare("llama3", "n5k4", 5, 4);
    compare("head64", "n1k2", 1, 2);
    compare_logits("tiny"), compare_logits("llama3"), compare_logits("head64");
    return finish("model");
}
