/* retrofit_ranks.h - several processes train together (train.c). retrofit.h calls what stands here
   through model->ranks, a structure of functions; what they do it with, MPI or NCCL, stands in
   retrofit_mpi.c and retrofit_cuda.cu.

   A step's micro-batches lie in as many equal parts as the training has ranks. Parts have the same
   draws, one by one, and their gradients are added from the first part to the last: so on CPUs the
   numbers are the same to the bit whatever the number of processes, if it divides that of the
   parts. (Else there are as many parts as processes.) With W processes, the last rank computes the
   first of every W parts, and rank 0, which logs the states of the last micro-batch, the last.

   Every parameter is updated by one rank, which alone has its moments (ZeRO's first stage); then
   the others get the weights. */
#ifndef RETROFIT_RANKS_H
#define RETROFIT_RANKS_H

static struct {
    size_t *loads;                // [2·count] numbers that each has, of Muon's matrices, of others
    retrofit_optimizer_kind kind; // whose moments were dealt out
    float *before;                // on the device: a step's gradients so far, if needed
    bool adds_before, last_own;   // whether they are to be added; the last micro-batch before sums
    size_t unsummed;              // gradients that are still to be summed: the first of the arena
    float *slots, *host_slots;    // [3·count] on the device, on the host: what is exchanged
    double *numbers;              // [count] that were exchanged, one of each rank
    float *moments;               // on the host of rank 0: those of all, while they are saved
} ranks_state;

static void finish_exchange(retrofit_ranks *ranks) {
    if (!ranks->failed && ranks->finish) ranks->failed = !ranks->finish(ranks);
}

// Each rank's x to all of them, in `numbers`. A number of 53 bits passes as the sum of three of 24,
// each in a place where all others have 0. false or error.
static bool ranks_exchange(retrofit_ranks *ranks, const retrofit_ops *ops, double x) {
    size_t n = 3 * ranks->count;
    float *slots = ranks_state.host_slots;
    double *numbers = ranks_state.numbers;
    numbers[ranks->rank] = x;
    if (ranks->count == 1) return true;
    memset(slots, 0, n * sizeof *slots);
    for (size_t i = 0; i < 3; i++) {
        slots[3 * ranks->rank + i] = (float)x;
        x = isfinite(x) ? x - (double)(float)x : 0;
    }
    ops->upload(ranks_state.slots, slots, n * sizeof *slots);
    ranks->failed = ranks->failed || !ranks->all_reduce(ranks, ranks_state.slots, n);
    finish_exchange(ranks);
    if (ranks->failed) return false;
    ops->download(slots, ranks_state.slots, n * sizeof *slots);
    for (size_t i = 0; i < n; i += 3)
        numbers[i / 3] = (double)slots[i] + (double)slots[i + 1] + (double)slots[i + 2];
    return true;
}

// ---- Gradients ---------------------------------------------------------------------------------

static size_t micro_batches_of_part(const retrofit_ranks *ranks,
                                    const retrofit_training *training) {
    size_t parts = retrofit_max(1, training->ranks);
    return training->accumulate / (parts % ranks->count ? ranks->count : parts);
}

// Sums the gradients from this one of the arena on that were not summed before.
static void sum_from(retrofit_model *model, size_t first) {
    retrofit_ranks *ranks = model->ranks;
    size_t n = ranks_state.unsummed - first;
    float *from = (float *)model->grads + first;
    ranks_state.unsummed = first;
    if (ranks->failed || n == 0) return;
    if (ranks_state.adds_before) model->ops->add(from, ranks_state.before + first, n, 1);
    if (ranks->count > 1) ranks->failed = !ranks->all_reduce(ranks, from, n);
}

// The arena has the parts of the model in their order. What is summed early, a GPU sums beside its
// backward pass.
static void ranks_gradients_done(retrofit_model *model, retrofit_part part) {
    if (!ranks_state.last_own) return;
    for (size_t i = 0; i < model->parameter_count; i++) {
        const retrofit_parameter *p = model->parameters[i];
        if (p->frozen || p->part < part) continue;
        sum_from(model, (size_t)(p->grad - (float *)model->grads));
        return;
    }
}

// The parts that were computed side by side now have one sum. Unless they were the last it is put
// aside, and added to the first of the next ones.
static void end_round(retrofit_model *model, bool last) {
    retrofit_ranks *ranks = model->ranks;
    const retrofit_ops *ops = model->ops;
    sum_from(model, 0);
    finish_exchange(ranks);
    ranks_state.unsummed = model->grad_bytes / sizeof(float);
    ranks_state.adds_before = !last && ranks->rank == ranks->count - 1;
    if (last || ranks->failed) return;
    if (ranks_state.adds_before) {
        if (!ranks_state.before) ranks_state.before = ops->alloc(model->grad_bytes);
        if (ranks_state.before) ops->copy(ranks_state.before, model->grads, model->grad_bytes);
        else ranks->failed = true;
    }
    retrofit_zero_grad(model);
}

static bool ranks_is_own(retrofit_model *model, const retrofit_training *training, size_t j) {
    retrofit_ranks *ranks = model->ranks;
    size_t part = micro_batches_of_part(ranks, training), round = part * ranks->count;
    if (j == 0) ranks_state.unsummed = model->grad_bytes / sizeof(float);
    if (j > 0 && j % round == 0) end_round(model, false);
    ranks_state.last_own = (j + 1) % part == 0;
    return !ranks->failed && j / part % ranks->count == ranks->count - 1 - ranks->rank;
}

static bool ranks_sum(retrofit_model *model, double *loss) {
    retrofit_ranks *ranks = model->ranks;
    end_round(model, true);
    if (ranks->failed || !ranks_exchange(ranks, model->ops, *loss)) return false;
    *loss = 0;
    for (size_t i = ranks->count; i-- > 0;) *loss += ranks_state.numbers[i];
    return true;
}

// ---- Parameters --------------------------------------------------------------------------------

// Each goes to the rank that has least so far: Muon's matrices, which take the time, and apart from
// them all others.
static void ranks_deal(retrofit_model *model, retrofit_optimizer_kind kind) {
    size_t count = model->ranks->count;
    ranks_state.kind = kind;
    memset(ranks_state.loads, 0, 2 * count * sizeof *ranks_state.loads);
    for (size_t i = 0; i < model->parameter_count; i++) {
        retrofit_parameter *p = model->parameters[i];
        size_t *loads = ranks_state.loads + (retrofit_by_muon(p, kind) ? 0 : count);
        p->owner = 0;
        for (size_t r = 1; r < count; r++)
            if (loads[r] < loads[p->owner]) p->owner = r;
        if (!p->frozen) loads[p->owner] += p->rows * p->cols;
    }
}

// What share of the parameters is the first rank's.
static double ranks_share(const retrofit_ranks *ranks) {
    size_t all = 0, *loads = ranks_state.loads;
    for (size_t i = 0; i < 2 * ranks->count; i++) all += loads[i];
    return (double)(loads[0] + loads[ranks->count]) / (double)all;
}

static void ranks_gather_weights(retrofit_model *model) {
    retrofit_ranks *ranks = model->ranks;
    for (size_t i = 0; ranks->count > 1 && i < model->parameter_count; i++) {
        const retrofit_parameter *p = model->parameters[i];
        if (p->frozen || ranks->failed) continue;
        ranks->failed = !ranks->broadcast(ranks, p->master, p->rows * p->cols, p->owner);
    }
    finish_exchange(ranks);
}

// Moments pass through the gradients' memory, which is free between two steps, to the host of rank
// 0. There a parameter's lie one behind the other.
static bool gather_moments(retrofit_model *model) {
    retrofit_ranks *ranks = model->ranks;
    const retrofit_ops *ops = model->ops;
    float *to = ranks_state.moments;
    for (size_t i = 0; i < model->parameter_count; i++) {
        const retrofit_parameter *p = model->parameters[i];
        size_t n = p->rows * p->cols, count = retrofit_by_muon(p, ranks_state.kind) ? 1 : 2;
        for (size_t j = 0; j < count && !p->frozen; j++) {
            if (p->owner == ranks->rank) ops->copy(p->grad, j ? p->v : p->m, n * sizeof(float));
            ranks->failed = !ranks->broadcast(ranks, p->grad, n, p->owner);
            finish_exchange(ranks);
            if (ranks->failed) return false;
            if (ranks->rank == 0) ops->download(to, p->grad, n * sizeof(float));
            if (ranks->rank == 0) to += n;
        }
    }
    return true;
}

// All ranks' moments to rank 0, which then saves them. false or error.
static bool ranks_gather_moments(retrofit_model *model) {
    if (!model->ranks || model->ranks->count == 1) return true;
    if (model->ranks->rank == 0 && !ranks_state.moments) {
        ranks_state.moments = retrofit_allocate(2 * model->weight_count, sizeof(float));
        if (!ranks_state.moments) return false;
    }
    return gather_moments(model);
}

// Saves the moments of all ranks: while they are written the model has those on the host. false or
// error.
static bool ranks_save_optimizer(retrofit_model *model, const char *directory,
                                 const char *const *metadata) {
    bool alone = !model->ranks || model->ranks->count == 1;
    if (alone) return retrofit_save_optimizer(model, directory, metadata);
    const retrofit_ops *ops = model->ops;
    float **own = retrofit_allocate(2 * model->parameter_count, sizeof *own);
    float *moments = ranks_state.moments;
    if (!own) return false;
    for (size_t i = 0; i < model->parameter_count; i++) {
        retrofit_parameter *p = model->parameters[i];
        size_t n = p->frozen ? 0 : p->rows * p->cols;
        bool two = n > 0 && !retrofit_by_muon(p, ranks_state.kind);
        own[2 * i] = p->m;
        own[2 * i + 1] = p->v;
        p->m = n > 0 ? moments : NULL;
        p->v = two ? moments + n : NULL;
        moments += two ? 2 * n : n;
    }
    model->ops = &retrofit_cpu;
    bool ok = retrofit_save_optimizer(model, directory, metadata);
    model->ops = ops;
    for (size_t i = 0; i < model->parameter_count; i++) {
        model->parameters[i]->m = own[2 * i];
        model->parameters[i]->v = own[2 * i + 1];
    }
    free(own);
    return ok;
}

// ---- Beginning and end -------------------------------------------------------------------------

// Connects them, by MPI and on GPUs by NCCL; `meeting` is the path for where there is no MPI. false
// or error.
static bool ranks_start(retrofit_ranks *ranks, const retrofit_ops *ops, const char *meeting) {
    size_t W = ranks->count;
    ranks->is_own = ranks_is_own;
    ranks->gradients_done = ranks_gradients_done;
    ranks->sum = ranks_sum;
    ranks->deal = ranks_deal;
    ranks->gather_weights = ranks_gather_weights;
    ranks_state.loads = retrofit_allocate(2 * W, sizeof *ranks_state.loads);
    ranks_state.numbers = retrofit_allocate(W, sizeof *ranks_state.numbers);
    if (!ranks_state.loads || !ranks_state.numbers || W == 1)
        return ranks_state.loads && ranks_state.numbers;
    ranks_state.host_slots = retrofit_allocate(3 * W, sizeof(float));
    ranks_state.slots = ops->alloc(3 * W * sizeof(float));
    if (!ranks_state.host_slots || !ranks_state.slots) return false;
#ifdef RETROFIT_MPI
    if (!getenv("TORCHELASTIC_RUN_ID") && !retrofit_mpi_start(ranks)) return false;
#endif
#ifdef RETROFIT_CUDA
    if (ops != &retrofit_cpu) return retrofit_nccl_start(ranks, meeting);
#endif
    (void)meeting;
    return ranks->all_reduce ||
           retrofit_fail("rank %zu of %zu on a CPU needs MPI: make MPI=1, then mpirun or srun "
                         "(torchrun starts GPUs only)", ranks->rank, W);
}

static void ranks_free(const retrofit_ops *ops) {
    if (ranks_state.slots) ops->free(ranks_state.slots);
    if (ranks_state.before) ops->free(ranks_state.before);
    free(ranks_state.loads);
    free(ranks_state.numbers);
    free(ranks_state.host_slots);
    free(ranks_state.moments);
    memset(&ranks_state, 0, sizeof ranks_state);
}
#endif
