/* Collectives: each rank talks to each other directly. A reduction is done part by part, each part by one rank and in
 * the order of the ranks, so that all ranks get the same bits, each time. */
#include <stdlib.h>
#include <string.h>

#include "errors.h"
#include "hccl_call.h"
#include "hccl_link.h"
#include "hccl_types.h"

/* How much a rank holds of what others give it to reduce: memory stays bounded however large the tensor is. */
#define CHUNK_BYTES ((size_t)4 << 20)

/* Transfers that are done at once. */
typedef struct {
    const hccl_call *call;
    hccl_comm *comm;
    hccl_tag tag;
    hccl_transfer *transfers; /* room for one to and one from each rank */
    size_t count;
} step;

static HcclResult new_step(step *step, hccl_comm *comm, const hccl_call *call, hccl_kind kind, uint32_t detail)
{
    step->call = call;
    step->comm = comm;
    step->tag = (hccl_tag){(uint16_t)kind, (uint16_t)call->type, detail};
    step->count = 0;
    step->transfers = calloc(2 * (size_t)comm->size, sizeof *step->transfers);
    return step->transfers ? HCCL_SUCCESS : hccl_no_memory(call->name);
}

static void give(step *step, uint32_t peer, const void *data, size_t length)
{
    step->transfers[step->count++] =
        (hccl_transfer){.peer = peer, .outgoing = true, .data = (void *)data, .length = length};
}

static void take(step *step, uint32_t peer, void *data, size_t length)
{
    step->transfers[step->count++] = (hccl_transfer){.peer = peer, .data = data, .length = length};
}

static HcclResult do_step(step *step)
{
    size_t count = step->count;

    step->count = 0;
    return hccl_exchange(step->call->name, step->comm, step->tag, step->transfers, count);
}

static void copy_own(void *to, const void *from, size_t length)
{
    if (length && to != from)
        memmove(to, from, length);
}

/* Parts of a buffer, in elements: one for each rank. */
typedef struct {
    const uint64_t *places, *counts;
} parts;

/* Gives each rank its part of `send`; reduces one's own part of all of them into `out`. */
static HcclResult reduce_parts(step *step, const char *send, parts of, void *out)
{
    const hccl_comm *comm = step->comm;
    size_t size = hccl_type_size(step->call->type), own = of.counts[comm->rank] * size;
    const void **sources = calloc(comm->size, sizeof *sources);
    char *scratch = malloc(own * comm->size + 1), *next = scratch;
    HcclResult result;

    if (!sources || !scratch) {
        result = hccl_no_memory(step->call->name);
        goto done;
    }
    for (uint32_t peer = 0; peer < comm->size; peer++) {
        sources[peer] = peer == comm->rank ? send + of.places[peer] * size : next;
        if (peer == comm->rank)
            continue;
        if (of.counts[peer])
            give(step, peer, send + of.places[peer] * size, of.counts[peer] * size);
        if (own)
            take(step, peer, next, own);
        next += own;
    }
    if (!(result = do_step(step)) && own)
        hccl_reduce(out, sources, comm->size, of.counts[comm->rank], step->call->type, step->call->op);
done:
    free(scratch);
    free(sources);
    return result;
}

/* Gives one's own part of `buffer` to all and takes theirs. */
static HcclResult gather_parts(step *step, char *buffer, parts of)
{
    const hccl_comm *comm = step->comm;
    size_t size = hccl_type_size(step->call->type);

    for (uint32_t peer = 0; peer < comm->size; peer++)
        if (peer != comm->rank) {
            give(step, peer, buffer + of.places[comm->rank] * size, of.counts[comm->rank] * size);
            take(step, peer, buffer + of.places[peer] * size, of.counts[peer] * size);
        }
    return do_step(step);
}

static HcclResult run_nothing(hccl_comm *comm, const hccl_call *call)
{
    (void)comm, (void)call;
    return HCCL_SUCCESS;
}

/* Elements of a chunk that all ranks hold a part of. */
static uint64_t chunk_of(const hccl_comm *comm, HcclDataType type)
{
    uint64_t count = CHUNK_BYTES / hccl_type_size(type);

    return count > comm->size ? count : comm->size;
}

static HcclResult run_all_reduce(hccl_comm *comm, const hccl_call *call)
{
    size_t size = hccl_type_size(call->type);
    uint64_t chunk = chunk_of(comm, call->type);
    parts slices = {call->send_places, call->send_counts};
    HcclResult result;
    step step;

    if ((result = new_step(&step, comm, call, HCCL_KIND_ALL_REDUCE, call->op)))
        return result;
    for (uint64_t done = 0; done < call->count && !result; done += chunk) {
        uint64_t length = call->count - done < chunk ? call->count - done : chunk;
        char *out = (char *)call->receive + done * size;

        for (uint32_t rank = 0; rank < comm->size; rank++) {
            call->send_places[rank] = length * rank / comm->size;
            call->send_counts[rank] = length * (rank + 1) / comm->size - call->send_places[rank];
        }
        result =
            reduce_parts(&step, (const char *)call->send + done * size, slices, out + slices.places[comm->rank] * size);
        if (!result)
            result = gather_parts(&step, out, slices);
    }
    free(step.transfers);
    return result;
}

/* For reduce-scatter and reduce: `send_counts` and `send_places` say which part is whose. */
static HcclResult run_reduce_scatter(hccl_comm *comm, const hccl_call *call)
{
    bool to_root = call->root != UINT32_MAX;
    size_t size = hccl_type_size(call->type);
    uint64_t chunk = chunk_of(comm, call->type) / comm->size, longest = 0;
    uint64_t *numbers = calloc(2 * (size_t)comm->size, sizeof *numbers);
    parts slices = {numbers, numbers + comm->size};
    HcclResult result;
    step step;

    result = new_step(&step, comm, call, to_root ? HCCL_KIND_REDUCE : HCCL_KIND_REDUCE_SCATTER,
                      to_root ? call->root << 8 | call->op : call->op);
    if (!result && !numbers)
        result = hccl_no_memory(call->name);
    for (uint32_t rank = 0; rank < comm->size; rank++)
        longest = call->send_counts[rank] > longest ? call->send_counts[rank] : longest;
    for (uint64_t done = 0; done < longest && !result; done += chunk) {
        for (uint32_t rank = 0; rank < comm->size; rank++) {
            uint64_t left = call->send_counts[rank] > done ? call->send_counts[rank] - done : 0;

            numbers[rank] = call->send_places[rank] + done;
            numbers[comm->size + rank] = left < chunk ? left : chunk;
        }
        result = reduce_parts(&step, call->send, slices, (char *)call->receive + done * size);
    }
    free(numbers);
    free(step.transfers);
    return result;
}

static HcclResult run_broadcast(hccl_comm *comm, const hccl_call *call)
{
    size_t length = call->count * hccl_type_size(call->type);
    HcclResult result;
    step step;

    if ((result = new_step(&step, comm, call, HCCL_KIND_BROADCAST, call->root)))
        return result;
    if (comm->rank != call->root)
        take(&step, call->root, call->receive, length);
    else
        for (uint32_t peer = 0; peer < comm->size; peer++)
            if (peer != comm->rank)
                give(&step, peer, call->receive, length);
    result = do_step(&step);
    free(step.transfers);
    return result;
}

static HcclResult run_scatter(hccl_comm *comm, const hccl_call *call)
{
    size_t length = call->count * hccl_type_size(call->type);
    const char *send = call->send;
    HcclResult result;
    step step;

    if ((result = new_step(&step, comm, call, HCCL_KIND_SCATTER, call->root)))
        return result;
    if (comm->rank != call->root)
        take(&step, call->root, call->receive, length);
    else
        for (uint32_t peer = 0; peer < comm->size; peer++)
            if (peer != comm->rank)
                give(&step, peer, send + peer * length, length);
    if (!(result = do_step(&step)) && comm->rank == call->root)
        copy_own(call->receive, send + comm->rank * length, length);
    free(step.transfers);
    return result;
}

static HcclResult run_all_gather(hccl_comm *comm, const hccl_call *call)
{
    size_t size = hccl_type_size(call->type);
    parts slices = {call->receive_places, call->receive_counts};
    HcclResult result;
    step step;

    if ((result = new_step(&step, comm, call, HCCL_KIND_ALL_GATHER, 0)))
        return result;
    copy_own((char *)call->receive + slices.places[comm->rank] * size, call->send, slices.counts[comm->rank] * size);
    result = gather_parts(&step, call->receive, slices);
    free(step.transfers);
    return result;
}

static HcclResult run_barrier(hccl_comm *comm, const hccl_call *call)
{
    HcclResult result;
    step step;

    if ((result = new_step(&step, comm, call, HCCL_KIND_BARRIER, 0)))
        return result;
    for (uint32_t peer = 0; peer < comm->size; peer++)
        if (peer != comm->rank) {
            give(&step, peer, NULL, 0);
            take(&step, peer, NULL, 0);
        }
    result = do_step(&step);
    free(step.transfers);
    return result;
}

static HcclResult run_all_to_all(hccl_comm *comm, const hccl_call *call)
{
    size_t size = hccl_type_size(call->type);
    const char *send = call->send;
    char *receive = call->receive;
    HcclResult result;
    step step;

    if ((result = new_step(&step, comm, call, HCCL_KIND_ALL_TO_ALL, 0)))
        return result;
    for (uint32_t peer = 0; peer < comm->size; peer++) {
        const void *from = send + call->send_places[peer] * size;
        void *to = receive + call->receive_places[peer] * size;

        if (peer == comm->rank) {
            copy_own(to, from, call->send_counts[peer] * size);
            continue;
        }
        give(&step, peer, from, call->send_counts[peer] * size);
        take(&step, peer, to, call->receive_counts[peer] * size);
    }
    result = do_step(&step);
    free(step.transfers);
    return result;
}

static HcclResult check_reduction(const hccl_call *call)
{
    if (hccl_can_reduce(call->type, call->op))
        return HCCL_SUCCESS;
    return sim_fail(call->name, HCCL_E_PARA, "operation %d on data type %d is not simulated", (int)call->op,
                    (int)call->type);
}

/* Numbers of the caller's; without `source` each is `each`. Places follow one another unless they are given, too. */
static HcclResult copy_parts(const hccl_call *call, uint64_t **counts, uint64_t **places, const uint64_t *source,
                             const uint64_t *source_places, uint64_t each)
{
    uint64_t next = 0;
    HcclResult result = hccl_make_counts(call, counts, call->comm->size);

    if (!result)
        result = hccl_make_counts(call, places, call->comm->size);
    for (uint32_t rank = 0; rank < call->comm->size && !result; rank++) {
        (*counts)[rank] = source ? source[rank] : each;
        (*places)[rank] = source_places ? source_places[rank] : next;
        next += (*counts)[rank];
    }
    return result;
}

/* The elements that a buffer must have for its parts. */
static uint64_t extent(const hccl_call *call, const uint64_t *counts, const uint64_t *places)
{
    uint64_t end = 0;

    for (uint32_t rank = 0; rank < call->comm->size; rank++)
        if (counts[rank] && places[rank] + counts[rank] > end)
            end = places[rank] + counts[rank];
    return end;
}

/* Reduces `count` elements of all ranks; all get the result. The buffers may be the same. */
HcclResult HcclAllReduce(void *sendBuf, void *recvBuf, uint64_t count, HcclDataType dataType, HcclReduceOp op,
                         HcclComm comm, hcclStream stream)
{
    hccl_call call = {.name = __func__,
                      .run = count ? run_all_reduce : run_nothing,
                      .send = sendBuf,
                      .receive = recvBuf,
                      .count = count,
                      .type = dataType,
                      .op = op};
    HcclResult result = hccl_begin(&call, comm);

    if (!result)
        result = check_reduction(&call);
    if (!result)
        result = hccl_check_buffer(&call, "send", sendBuf, count, dataType);
    if (!result)
        result = hccl_check_buffer(&call, "receive", recvBuf, count, dataType);
    if (!result)
        result = copy_parts(&call, &call.send_counts, &call.send_places, NULL, NULL, 0);
    return hccl_end(&call, result, stream);
}

/* Gives the root's `count` elements to all. */
HcclResult HcclBroadcast(void *buf, uint64_t count, HcclDataType dataType, uint32_t root, HcclComm comm,
                         hcclStream stream)
{
    hccl_call call = {.name = __func__,
                      .run = count ? run_broadcast : run_nothing,
                      .receive = buf,
                      .count = count,
                      .type = dataType,
                      .root = root};
    HcclResult result = hccl_begin(&call, comm);

    if (!result)
        result = hccl_check_rank(&call, root);
    if (!result)
        result = hccl_check_buffer(&call, "broadcast", buf, count, dataType);
    return hccl_end(&call, result, stream);
}

static HcclResult reduce_scatter(hccl_call *call, const void *counts, const void *places, HcclComm comm,
                                 hcclStream stream)
{
    HcclResult result = hccl_begin(call, comm);

    call->root = UINT32_MAX;
    if (!result)
        result = check_reduction(call);
    if (!result)
        result = copy_parts(call, &call->send_counts, &call->send_places, counts, places, call->count);
    if (!result && call->send_counts[call->comm->rank] != call->count)
        result = sim_fail(call->name, HCCL_E_PARA, "%llu elements to receive, %llu are for this rank",
                          (unsigned long long)call->count, (unsigned long long)call->send_counts[call->comm->rank]);
    if (!result)
        result =
            hccl_check_buffer(call, "send", call->send, extent(call, call->send_counts, call->send_places), call->type);
    if (!result)
        result = hccl_check_buffer(call, "receive", call->receive, call->count, call->type);
    return hccl_end(call, result, stream);
}

/* Reduces `recvCount` elements for each rank; each gets its part of the result. */
HcclResult HcclReduceScatter(void *sendBuf, void *recvBuf, uint64_t recvCount, HcclDataType dataType, HcclReduceOp op,
                             HcclComm comm, hcclStream stream)
{
    hccl_call call = {.name = __func__,
                      .run = run_reduce_scatter,
                      .send = sendBuf,
                      .receive = recvBuf,
                      .count = recvCount,
                      .type = dataType,
                      .op = op};

    return reduce_scatter(&call, NULL, NULL, comm, stream);
}

/* The same with parts of different lengths; all ranks give the same counts. */
HcclResult HcclReduceScatterV(void *sendBuf, const void *sendCounts, const void *sendDispls, void *recvBuf,
                              uint64_t recvCount, HcclDataType dataType, HcclReduceOp op, HcclComm comm,
                              hcclStream stream)
{
    hccl_call call = {.name = __func__,
                      .run = run_reduce_scatter,
                      .send = sendBuf,
                      .receive = recvBuf,
                      .count = recvCount,
                      .type = dataType,
                      .op = op};

    if (!sendCounts || !sendDispls)
        return FAIL(HCCL_E_PTR, "NULL");
    return reduce_scatter(&call, sendCounts, sendDispls, comm, stream);
}

/* Reduces `count` elements of all ranks; the root gets the result, the others' `recvBuf` is not used. */
HcclResult HcclReduce(void *sendBuf, void *recvBuf, uint64_t count, HcclDataType dataType, HcclReduceOp op,
                      uint32_t root, HcclComm comm, hcclStream stream)
{
    hccl_call call = {.name = __func__,
                      .run = run_reduce_scatter,
                      .send = sendBuf,
                      .receive = recvBuf,
                      .count = count,
                      .type = dataType,
                      .op = op,
                      .root = root};
    HcclResult result = hccl_begin(&call, comm);

    if (!result)
        result = hccl_check_rank(&call, root);
    if (!result)
        result = check_reduction(&call);
    if (!result)
        result = hccl_check_buffer(&call, "send", sendBuf, count, dataType);
    if (!result && root == call.comm->rank)
        result = hccl_check_buffer(&call, "receive", recvBuf, count, dataType);
    if (!result)
        result = copy_parts(&call, &call.send_counts, &call.send_places, NULL, NULL, 0);
    if (!result)
        call.send_counts[root] = count;
    return hccl_end(&call, result, stream);
}

/* Gives each rank its `recvCount` elements of the root's `sendBuf`; that of the others is not used. */
HcclResult HcclScatter(void *sendBuf, void *recvBuf, uint64_t recvCount, HcclDataType dataType, uint32_t root,
                       HcclComm comm, hcclStream stream)
{
    hccl_call call = {.name = __func__,
                      .run = recvCount ? run_scatter : run_nothing,
                      .send = sendBuf,
                      .receive = recvBuf,
                      .count = recvCount,
                      .type = dataType,
                      .root = root};
    HcclResult result = hccl_begin(&call, comm);

    if (!result)
        result = hccl_check_rank(&call, root);
    if (!result && root == call.comm->rank)
        result = hccl_check_buffer(&call, "send", sendBuf, recvCount * call.comm->size, dataType);
    if (!result)
        result = hccl_check_buffer(&call, "receive", recvBuf, recvCount, dataType);
    return hccl_end(&call, result, stream);
}

static HcclResult all_gather(hccl_call *call, const void *counts, const void *places, HcclComm comm, hcclStream stream)
{
    HcclResult result = hccl_begin(call, comm);

    if (!result)
        result = copy_parts(call, &call->receive_counts, &call->receive_places, counts, places, call->count);
    if (!result && call->receive_counts[call->comm->rank] != call->count)
        result = sim_fail(call->name, HCCL_E_PARA, "%llu elements to send, %llu are of this rank",
                          (unsigned long long)call->count, (unsigned long long)call->receive_counts[call->comm->rank]);
    if (!result)
        result = hccl_check_buffer(call, "send", call->send, call->count, call->type);
    if (!result)
        result = hccl_check_buffer(call, "receive", call->receive,
                                   extent(call, call->receive_counts, call->receive_places), call->type);
    return hccl_end(call, result, stream);
}

/* Each rank gets the `sendCount` elements of all, one after the other. */
HcclResult HcclAllGather(void *sendBuf, void *recvBuf, uint64_t sendCount, HcclDataType dataType, HcclComm comm,
                         hcclStream stream)
{
    hccl_call call = {.name = __func__,
                      .run = sendCount ? run_all_gather : run_nothing,
                      .send = sendBuf,
                      .receive = recvBuf,
                      .count = sendCount,
                      .type = dataType};

    return all_gather(&call, NULL, NULL, comm, stream);
}

/* The same with parts of different lengths; all ranks give the same counts. */
HcclResult HcclAllGatherV(void *sendBuf, uint64_t sendCount, void *recvBuf, const void *recvCounts,
                          const void *recvDispls, HcclDataType dataType, HcclComm comm, hcclStream stream)
{
    hccl_call call = {.name = __func__,
                      .run = run_all_gather,
                      .send = sendBuf,
                      .receive = recvBuf,
                      .count = sendCount,
                      .type = dataType};

    if (!recvCounts || !recvDispls)
        return FAIL(HCCL_E_PTR, "NULL");
    return all_gather(&call, recvCounts, recvDispls, comm, stream);
}

/* Returns, or lets the stream go on, when all ranks have come. */
HcclResult HcclBarrier(HcclComm comm, hcclStream stream)
{
    hccl_call call = {.name = __func__, .run = run_barrier};

    return hccl_end(&call, hccl_begin(&call, comm), stream);
}

/* Finishes a call whose counts and places are there. */
static HcclResult all_to_all(hccl_call *call, HcclResult result, HcclDataType receive_type, hcclStream stream)
{
    if (!result && receive_type != call->type)
        result = sim_fail(call->name, HCCL_E_PARA, "sends data type %d, receives data type %d", (int)call->type,
                          (int)receive_type);
    if (!result)
        result =
            hccl_check_buffer(call, "send", call->send, extent(call, call->send_counts, call->send_places), call->type);
    if (!result)
        result = hccl_check_buffer(call, "receive", call->receive,
                                   extent(call, call->receive_counts, call->receive_places), call->type);
    if (!result && call->send_counts[call->comm->rank] != call->receive_counts[call->comm->rank])
        result = sim_fail(call->name, HCCL_E_PARA, "rank %u sends itself another number of elements than it receives",
                          call->comm->rank);
    return hccl_end(call, result, stream);
}

/* Each rank gives `sendCount` elements to each. */
HcclResult HcclAlltoAll(const void *sendBuf, uint64_t sendCount, HcclDataType sendType, const void *recvBuf,
                        uint64_t recvCount, HcclDataType recvType, HcclComm comm, hcclStream stream)
{
    hccl_call call = {
        .name = __func__, .run = run_all_to_all, .send = sendBuf, .receive = (void *)recvBuf, .type = sendType};
    HcclResult result = hccl_begin(&call, comm);

    if (!result)
        result = copy_parts(&call, &call.send_counts, &call.send_places, NULL, NULL, sendCount);
    if (!result)
        result = copy_parts(&call, &call.receive_counts, &call.receive_places, NULL, NULL, recvCount);
    return all_to_all(&call, result, recvType, stream);
}

/* The same with parts of different lengths: arrays of uint64_t, by rank, in elements. */
HcclResult HcclAlltoAllV(const void *sendBuf, const void *sendCounts, const void *sdispls, HcclDataType sendType,
                         const void *recvBuf, const void *recvCounts, const void *rdispls, HcclDataType recvType,
                         HcclComm comm, hcclStream stream)
{
    hccl_call call = {
        .name = __func__, .run = run_all_to_all, .send = sendBuf, .receive = (void *)recvBuf, .type = sendType};
    HcclResult result;

    if (!sendCounts || !sdispls || !recvCounts || !rdispls)
        return FAIL(HCCL_E_PTR, "NULL");
    result = hccl_begin(&call, comm);
    if (!result)
        result = copy_parts(&call, &call.send_counts, &call.send_places, sendCounts, sdispls, 0);
    if (!result)
        result = copy_parts(&call, &call.receive_counts, &call.receive_places, recvCounts, rdispls, 0);
    return all_to_all(&call, result, recvType, stream);
}

/* The same with parts that follow one another; entry [i][j] of the matrix is what rank i gives to rank j. */
HcclResult HcclAlltoAllVC(const void *sendBuf, const void *sendCountMatrix, HcclDataType sendType, const void *recvBuf,
                          HcclDataType recvType, HcclComm comm, hcclStream stream)
{
    hccl_call call = {
        .name = __func__, .run = run_all_to_all, .send = sendBuf, .receive = (void *)recvBuf, .type = sendType};
    const uint64_t *matrix = sendCountMatrix;
    uint64_t next = 0;
    HcclResult result;

    if (!matrix)
        return FAIL(HCCL_E_PTR, "NULL");
    result = hccl_begin(&call, comm);
    if (!result)
        result = copy_parts(&call, &call.send_counts, &call.send_places, matrix + call.comm->rank * call.comm->size,
                            NULL, 0);
    if (!result)
        result = copy_parts(&call, &call.receive_counts, &call.receive_places, NULL, NULL, 0);
    for (uint32_t peer = 0; !result && peer < call.comm->size; peer++) {
        call.receive_counts[peer] = matrix[peer * call.comm->size + call.comm->rank];
        call.receive_places[peer] = next;
        next += call.receive_counts[peer];
    }
    return all_to_all(&call, result, recvType, stream);
}
