/* The collectives of HCCL: what they demand of their arguments, and which algorithm does them. */
#include "errors.h"
#include "hccl_algorithms.h"
#include "hccl_call.h"
#include "hccl_types.h"

static HcclResult check_reduction(const hccl_call *call)
{
    if (hccl_can_reduce(call->type, call->op))
        return HCCL_SUCCESS;
    return sim_fail(call->name, HCCL_E_PARA, "operation %d on data type %d is not simulated", (int)call->op,
                    (int)call->type);
}

static HcclResult check_send(const hccl_call *call, uint64_t count)
{
    return hccl_check_buffer(call, "send", call->send, count, call->type);
}

static HcclResult check_receive(const hccl_call *call, uint64_t count)
{
    return hccl_check_buffer(call, "receive", call->receive, count, call->type);
}

/* The elements that a buffer must have for its parts. */
static uint64_t extent(const hccl_call *call, hccl_parts parts)
{
    uint64_t end = 0;

    for (uint32_t rank = 0; rank < call->comm->size; rank++)
        if (parts.counts[rank] && parts.places[rank] + parts.counts[rank] > end)
            end = parts.places[rank] + parts.counts[rank];
    return end;
}

/* Room for the slices that a chunk is divided into. */
static HcclResult make_slices(hccl_call *call)
{
    return hccl_set_parts(call, &call->slices, NULL, NULL, 0);
}

/* Reduces `count` elements of all ranks; all get the result. The buffers may be the same. */
HcclResult HcclAllReduce(void *sendBuf, void *recvBuf, uint64_t count, HcclDataType dataType, HcclReduceOp op,
                         HcclComm comm, hcclStream stream)
{
    hccl_call call = {.name = __func__,
                      .kind = HCCL_KIND_ALL_REDUCE,
                      .detail = (uint32_t)op,
                      .run = count ? hccl_run_all_reduce : NULL,
                      .send = sendBuf,
                      .receive = recvBuf,
                      .count = count,
                      .type = dataType,
                      .op = op};
    HcclResult result;

    if ((result = hccl_begin(&call, comm)) || (result = check_reduction(&call)) ||
        (result = check_send(&call, count)) || (result = check_receive(&call, count)) || (result = make_slices(&call)))
        return hccl_drop(&call, result);
    return hccl_end(&call, stream);
}

/* Gives the root's `count` elements to all. */
HcclResult HcclBroadcast(void *buf, uint64_t count, HcclDataType dataType, uint32_t root, HcclComm comm,
                         hcclStream stream)
{
    hccl_call call = {.name = __func__,
                      .kind = HCCL_KIND_BROADCAST,
                      .detail = root,
                      .run = count ? hccl_run_broadcast : NULL,
                      .receive = buf,
                      .count = count,
                      .type = dataType,
                      .root = root};
    HcclResult result;

    if ((result = hccl_begin(&call, comm)) || (result = hccl_check_rank(&call, root)) ||
        (result = hccl_check_buffer(&call, "broadcast", buf, count, dataType)))
        return hccl_drop(&call, result);
    return hccl_end(&call, stream);
}

static HcclResult check_own_part(const hccl_call *call)
{
    uint64_t own = call->sent.counts[call->comm->rank];

    if (own == call->count)
        return HCCL_SUCCESS;
    return sim_fail(call->name, HCCL_E_PARA, "%llu elements to receive, %llu are for this rank",
                    (unsigned long long)call->count, (unsigned long long)own);
}

static HcclResult reduce_scatter(hccl_call *call, const void *counts, const void *places, HcclComm comm,
                                 hcclStream stream)
{
    HcclResult result;

    if ((result = hccl_begin(call, comm)) || (result = check_reduction(call)) ||
        (result = hccl_set_parts(call, &call->sent, counts, places, call->count)) || (result = check_own_part(call)) ||
        (result = check_send(call, extent(call, call->sent))) || (result = check_receive(call, call->count)) ||
        (result = make_slices(call)))
        return hccl_drop(call, result);
    return hccl_end(call, stream);
}

/* Reduces `recvCount` elements for each rank; each gets its part of the result. */
HcclResult HcclReduceScatter(void *sendBuf, void *recvBuf, uint64_t recvCount, HcclDataType dataType, HcclReduceOp op,
                             HcclComm comm, hcclStream stream)
{
    hccl_call call = {.name = __func__,
                      .kind = HCCL_KIND_REDUCE_SCATTER,
                      .detail = (uint32_t)op,
                      .run = hccl_run_reduce_scatter,
                      .send = sendBuf,
                      .receive = recvBuf,
                      .count = recvCount,
                      .type = dataType,
                      .op = op};

    return reduce_scatter(&call, NULL, NULL, comm, stream);
}

/* Does the same as HcclReduceScatter with parts of different lengths; all ranks pass the same counts. */
HcclResult HcclReduceScatterV(void *sendBuf, const void *sendCounts, const void *sendDispls, void *recvBuf,
                              uint64_t recvCount, HcclDataType dataType, HcclReduceOp op, HcclComm comm,
                              hcclStream stream)
{
    hccl_call call = {.name = __func__,
                      .kind = HCCL_KIND_REDUCE_SCATTER,
                      .detail = (uint32_t)op,
                      .run = hccl_run_reduce_scatter,
                      .send = sendBuf,
                      .receive = recvBuf,
                      .count = recvCount,
                      .type = dataType,
                      .op = op};

    if (!sendCounts || !sendDispls)
        return FAIL(HCCL_E_PTR, "NULL");
    return reduce_scatter(&call, sendCounts, sendDispls, comm, stream);
}

/* Makes all of the buffer the root's part. */
static HcclResult send_to_root(hccl_call *call)
{
    HcclResult result = hccl_set_parts(call, &call->sent, NULL, NULL, 0);

    if (result)
        return result;
    call->sent.counts[call->root] = call->count;
    return HCCL_SUCCESS;
}

/* Reduces `count` elements of all ranks; the root gets the result, the others' `recvBuf` is not used. */
HcclResult HcclReduce(void *sendBuf, void *recvBuf, uint64_t count, HcclDataType dataType, HcclReduceOp op,
                      uint32_t root, HcclComm comm, hcclStream stream)
{
    hccl_call call = {.name = __func__,
                      .kind = HCCL_KIND_REDUCE,
                      .detail = root << 8 | (uint32_t)op,
                      .run = hccl_run_reduce_scatter,
                      .send = sendBuf,
                      .receive = recvBuf,
                      .count = count,
                      .type = dataType,
                      .op = op,
                      .root = root};
    HcclResult result;

    if ((result = hccl_begin(&call, comm)) || (result = hccl_check_rank(&call, root)) ||
        (result = check_reduction(&call)) || (result = check_send(&call, count)) ||
        (root == call.comm->rank && (result = check_receive(&call, count))) || (result = send_to_root(&call)) ||
        (result = make_slices(&call)))
        return hccl_drop(&call, result);
    return hccl_end(&call, stream);
}

/* Gives each rank its `recvCount` elements of the root's `sendBuf`; the others' `sendBuf` is not used. */
HcclResult HcclScatter(void *sendBuf, void *recvBuf, uint64_t recvCount, HcclDataType dataType, uint32_t root,
                       HcclComm comm, hcclStream stream)
{
    hccl_call call = {.name = __func__,
                      .kind = HCCL_KIND_SCATTER,
                      .detail = root,
                      .run = recvCount ? hccl_run_scatter : NULL,
                      .send = sendBuf,
                      .receive = recvBuf,
                      .count = recvCount,
                      .type = dataType,
                      .root = root};
    HcclResult result;

    if ((result = hccl_begin(&call, comm)) || (result = hccl_check_rank(&call, root)) ||
        (root == call.comm->rank && (result = check_send(&call, recvCount * call.comm->size))) ||
        (result = check_receive(&call, recvCount)))
        return hccl_drop(&call, result);
    return hccl_end(&call, stream);
}

static HcclResult check_given_part(const hccl_call *call)
{
    uint64_t own = call->received.counts[call->comm->rank];

    if (own == call->count)
        return HCCL_SUCCESS;
    return sim_fail(call->name, HCCL_E_PARA, "%llu elements to send, %llu are of this rank",
                    (unsigned long long)call->count, (unsigned long long)own);
}

static HcclResult all_gather(hccl_call *call, const void *counts, const void *places, HcclComm comm, hcclStream stream)
{
    HcclResult result;

    if ((result = hccl_begin(call, comm)) ||
        (result = hccl_set_parts(call, &call->received, counts, places, call->count)) ||
        (result = check_given_part(call)) || (result = check_send(call, call->count)) ||
        (result = check_receive(call, extent(call, call->received))))
        return hccl_drop(call, result);
    return hccl_end(call, stream);
}

/* Gives the `sendCount` elements of each rank to all, one after the other. */
HcclResult HcclAllGather(void *sendBuf, void *recvBuf, uint64_t sendCount, HcclDataType dataType, HcclComm comm,
                         hcclStream stream)
{
    hccl_call call = {.name = __func__,
                      .kind = HCCL_KIND_ALL_GATHER,
                      .run = sendCount ? hccl_run_all_gather : NULL,
                      .send = sendBuf,
                      .receive = recvBuf,
                      .count = sendCount,
                      .type = dataType};

    return all_gather(&call, NULL, NULL, comm, stream);
}

/* Does the same as HcclAllGather with parts of different lengths; all ranks pass the same counts. */
HcclResult HcclAllGatherV(void *sendBuf, uint64_t sendCount, void *recvBuf, const void *recvCounts,
                          const void *recvDispls, HcclDataType dataType, HcclComm comm, hcclStream stream)
{
    hccl_call call = {.name = __func__,
                      .kind = HCCL_KIND_ALL_GATHER,
                      .run = hccl_run_all_gather,
                      .send = sendBuf,
                      .receive = recvBuf,
                      .count = sendCount,
                      .type = dataType};

    if (!recvCounts || !recvDispls)
        return FAIL(HCCL_E_PTR, "NULL");
    return all_gather(&call, recvCounts, recvDispls, comm, stream);
}

/* Lets the stream go on when all ranks have come. */
HcclResult HcclBarrier(HcclComm comm, hcclStream stream)
{
    hccl_call call = {.name = __func__, .kind = HCCL_KIND_BARRIER, .run = hccl_run_barrier};
    HcclResult result = hccl_begin(&call, comm);

    return result ? hccl_drop(&call, result) : hccl_end(&call, stream);
}

static hccl_call new_all_to_all(const char *name, const void *send, HcclDataType type, const void *receive)
{
    return (hccl_call){.name = name,
                       .kind = HCCL_KIND_ALL_TO_ALL,
                       .run = hccl_run_all_to_all,
                       .send = send,
                       .receive = (void *)receive,
                       .type = type};
}

/* Whether the parts of an all-to-all go together and lie in the buffers. */
static HcclResult check_all_to_all(const hccl_call *call, HcclDataType receive_type)
{
    uint32_t rank = call->comm->rank;
    HcclResult result;

    if (receive_type != call->type)
        return sim_fail(call->name, HCCL_E_PARA, "sends data type %d, receives data type %d", (int)call->type,
                        (int)receive_type);
    if ((result = check_send(call, extent(call, call->sent))) ||
        (result = check_receive(call, extent(call, call->received))))
        return result;
    if (call->sent.counts[rank] != call->received.counts[rank])
        return sim_fail(call->name, HCCL_E_PARA, "rank %u sends itself another number of elements than it receives",
                        rank);
    return HCCL_SUCCESS;
}

/* Gives `sendCount` elements of each rank to each. */
HcclResult HcclAlltoAll(const void *sendBuf, uint64_t sendCount, HcclDataType sendType, const void *recvBuf,
                        uint64_t recvCount, HcclDataType recvType, HcclComm comm, hcclStream stream)
{
    hccl_call call = new_all_to_all(__func__, sendBuf, sendType, recvBuf);
    HcclResult result;

    if ((result = hccl_begin(&call, comm)) || (result = hccl_set_parts(&call, &call.sent, NULL, NULL, sendCount)) ||
        (result = hccl_set_parts(&call, &call.received, NULL, NULL, recvCount)) ||
        (result = check_all_to_all(&call, recvType)))
        return hccl_drop(&call, result);
    return hccl_end(&call, stream);
}

/* Does the same as HcclAlltoAll with parts of different lengths: arrays of uint64_t, by rank, in elements. */
HcclResult HcclAlltoAllV(const void *sendBuf, const void *sendCounts, const void *sdispls, HcclDataType sendType,
                         const void *recvBuf, const void *recvCounts, const void *rdispls, HcclDataType recvType,
                         HcclComm comm, hcclStream stream)
{
    hccl_call call = new_all_to_all(__func__, sendBuf, sendType, recvBuf);
    HcclResult result;

    if (!sendCounts || !sdispls || !recvCounts || !rdispls)
        return FAIL(HCCL_E_PTR, "NULL");
    if ((result = hccl_begin(&call, comm)) || (result = hccl_set_parts(&call, &call.sent, sendCounts, sdispls, 0)) ||
        (result = hccl_set_parts(&call, &call.received, recvCounts, rdispls, 0)) ||
        (result = check_all_to_all(&call, recvType)))
        return hccl_drop(&call, result);
    return hccl_end(&call, stream);
}

/* The row of this rank is what it sends, the column what it receives. */
static HcclResult set_parts_by_matrix(hccl_call *call, const uint64_t *matrix)
{
    uint32_t size = call->comm->size, own = call->comm->rank;
    uint64_t next = 0;
    HcclResult result;

    if ((result = hccl_set_parts(call, &call->sent, matrix + own * size, NULL, 0)) ||
        (result = hccl_set_parts(call, &call->received, NULL, NULL, 0)))
        return result;
    for (uint32_t peer = 0; peer < size; peer++) {
        call->received.counts[peer] = matrix[peer * size + own];
        call->received.places[peer] = next;
        next += call->received.counts[peer];
    }
    return HCCL_SUCCESS;
}

/* Does the same as HcclAlltoAllV with parts that follow one another; entry [i][j] of the matrix is the number of
 * elements that rank i gives to rank j. */
HcclResult HcclAlltoAllVC(const void *sendBuf, const void *sendCountMatrix, HcclDataType sendType, const void *recvBuf,
                          HcclDataType recvType, HcclComm comm, hcclStream stream)
{
    hccl_call call = new_all_to_all(__func__, sendBuf, sendType, recvBuf);
    HcclResult result;

    if (!sendCountMatrix)
        return FAIL(HCCL_E_PTR, "NULL");
    if ((result = hccl_begin(&call, comm)) || (result = set_parts_by_matrix(&call, sendCountMatrix)) ||
        (result = check_all_to_all(&call, recvType)))
        return hccl_drop(&call, result);
    return hccl_end(&call, stream);
}
