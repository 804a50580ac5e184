#include "hccl_algorithms.h"

#include <stdlib.h>
#include <string.h>

#include "errors.h"
#include "hccl_types.h"

/* How much a rank holds of what others give it to reduce: memory stays bounded however large the tensor is. */
#define CHUNK_BYTES ((size_t)4 << 20)

static void copy_own(void *to, const void *from, size_t length)
{
    if (length && to != from)
        memmove(to, from, length);
}

/* Gives each rank its part of `send`; reduces one's own part of all of them into `out`. */
static HcclResult reduce_parts(hccl_round *round, const hccl_call *call, const char *send, hccl_parts parts, void *out)
{
    const hccl_comm *comm = round->comm;
    size_t size = hccl_type_size(call->type), own = parts.counts[comm->rank] * size;
    const void **sources = calloc(comm->size, sizeof *sources);
    char *scratch = malloc(own * comm->size + 1), *next = scratch;
    HcclResult result;

    if (!sources || !scratch) {
        result = hccl_no_memory(call->name);
        goto done;
    }

    for (uint32_t peer = 0; peer < comm->size; peer++) {
        const char *part = send + parts.places[peer] * size;

        if (peer == comm->rank) {
            sources[peer] = part;
            continue;
        }
        sources[peer] = next;
        if (parts.counts[peer])
            hccl_give(round, peer, part, parts.counts[peer] * size);
        if (own)
            hccl_take(round, peer, next, own);
        next += own;
    }

    if ((result = hccl_exchange(round)))
        goto done;
    if (own)
        hccl_reduce(out, sources, comm->size, parts.counts[comm->rank], call->type, call->op);

done:
    free(scratch);
    free(sources);
    return result;
}

/* Gives one's own part of `buffer` to all and takes theirs. */
static HcclResult gather_parts(hccl_round *round, const hccl_call *call, char *buffer, hccl_parts parts)
{
    const hccl_comm *comm = round->comm;
    size_t size = hccl_type_size(call->type);

    for (uint32_t peer = 0; peer < comm->size; peer++) {
        if (peer == comm->rank)
            continue;
        hccl_give(round, peer, buffer + parts.places[comm->rank] * size, parts.counts[comm->rank] * size);
        hccl_take(round, peer, buffer + parts.places[peer] * size, parts.counts[peer] * size);
    }
    return hccl_exchange(round);
}

/* Elements of a chunk that all ranks hold a part of. */
static uint64_t chunk_of(const hccl_comm *comm, HcclDataType type)
{
    uint64_t count = CHUNK_BYTES / hccl_type_size(type);

    return count > comm->size ? count : comm->size;
}

/* Divides `count` elements among the ranks. */
static void divide(hccl_parts parts, uint32_t size, uint64_t count)
{
    for (uint32_t rank = 0; rank < size; rank++) {
        parts.places[rank] = count * rank / size;
        parts.counts[rank] = count * (rank + 1) / size - parts.places[rank];
    }
}

HcclResult hccl_run_all_reduce(hccl_round *round, const hccl_call *call)
{
    const hccl_comm *comm = round->comm;
    size_t size = hccl_type_size(call->type);
    uint64_t chunk = chunk_of(comm, call->type);

    for (uint64_t done = 0; done < call->count; done += chunk) {
        uint64_t left = call->count - done;
        const char *send = (const char *)call->send + done * size;
        char *out = (char *)call->receive + done * size;
        HcclResult result;

        divide(call->slices, comm->size, left < chunk ? left : chunk);
        if ((result = reduce_parts(round, call, send, call->slices, out + call->slices.places[comm->rank] * size)) ||
            (result = gather_parts(round, call, out, call->slices)))
            return result;
    }
    return HCCL_SUCCESS;
}

/* The length of the longest part. */
static uint64_t longest(const hccl_comm *comm, hccl_parts parts)
{
    uint64_t count = 0;

    for (uint32_t rank = 0; rank < comm->size; rank++)
        if (parts.counts[rank] > count)
            count = parts.counts[rank];
    return count;
}

HcclResult hccl_run_reduce_scatter(hccl_round *round, const hccl_call *call)
{
    const hccl_comm *comm = round->comm;
    size_t size = hccl_type_size(call->type);
    uint64_t chunk = chunk_of(comm, call->type) / comm->size, end = longest(comm, call->sent);

    for (uint64_t done = 0; done < end; done += chunk) {
        HcclResult result;

        for (uint32_t rank = 0; rank < comm->size; rank++) {
            uint64_t left = call->sent.counts[rank] > done ? call->sent.counts[rank] - done : 0;

            call->slices.places[rank] = call->sent.places[rank] + done;
            call->slices.counts[rank] = left < chunk ? left : chunk;
        }
        if ((result = reduce_parts(round, call, call->send, call->slices, (char *)call->receive + done * size)))
            return result;
    }
    return HCCL_SUCCESS;
}

HcclResult hccl_run_broadcast(hccl_round *round, const hccl_call *call)
{
    const hccl_comm *comm = round->comm;
    size_t length = call->count * hccl_type_size(call->type);

    if (comm->rank != call->root) {
        hccl_take(round, call->root, call->receive, length);
        return hccl_exchange(round);
    }
    for (uint32_t peer = 0; peer < comm->size; peer++)
        if (peer != comm->rank)
            hccl_give(round, peer, call->receive, length);
    return hccl_exchange(round);
}

HcclResult hccl_run_scatter(hccl_round *round, const hccl_call *call)
{
    const hccl_comm *comm = round->comm;
    size_t length = call->count * hccl_type_size(call->type);
    const char *send = call->send;
    HcclResult result;

    if (comm->rank != call->root) {
        hccl_take(round, call->root, call->receive, length);
        return hccl_exchange(round);
    }
    for (uint32_t peer = 0; peer < comm->size; peer++)
        if (peer != comm->rank)
            hccl_give(round, peer, send + peer * length, length);
    if ((result = hccl_exchange(round)))
        return result;
    copy_own(call->receive, send + comm->rank * length, length);
    return HCCL_SUCCESS;
}

HcclResult hccl_run_all_gather(hccl_round *round, const hccl_call *call)
{
    uint32_t rank = round->comm->rank;
    size_t size = hccl_type_size(call->type);

    copy_own((char *)call->receive + call->received.places[rank] * size, call->send,
             call->received.counts[rank] * size);
    return gather_parts(round, call, call->receive, call->received);
}

HcclResult hccl_run_barrier(hccl_round *round, const hccl_call *call)
{
    (void)call;
    hccl_greet_all(round);
    return hccl_exchange(round);
}

HcclResult hccl_run_all_to_all(hccl_round *round, const hccl_call *call)
{
    const hccl_comm *comm = round->comm;
    size_t size = hccl_type_size(call->type);

    for (uint32_t peer = 0; peer < comm->size; peer++) {
        const char *from = (const char *)call->send + call->sent.places[peer] * size;
        char *to = (char *)call->receive + call->received.places[peer] * size;

        if (peer == comm->rank) {
            copy_own(to, from, call->sent.counts[peer] * size);
            continue;
        }
        hccl_give(round, peer, from, call->sent.counts[peer] * size);
        hccl_take(round, peer, to, call->received.counts[peer] * size);
    }
    return hccl_exchange(round);
}
