#include <stdlib.h>
#include <string.h>

#include "errors.h"
#include "hccl_call.h"
#include "hccl_link.h"
#include "hccl_types.h"

/* All sends and receives at once; with one peer in their order. */
static HcclResult run_items(hccl_comm *comm, const hccl_call *call)
{
    hccl_transfer *transfers = calloc(call->item_count, sizeof *transfers);
    HcclResult result;

    if (!transfers)
        return hccl_no_memory(call->name);
    for (size_t i = 0; i < call->item_count; i++) {
        const HcclSendRecvItem *item = &call->items[i];

        transfers[i].peer = item->remoteRank;
        transfers[i].outgoing = item->sendRecvType == HCCL_SEND;
        transfers[i].data = item->buf;
        transfers[i].length = item->count * hccl_type_size(item->dataType);
    }
    result = hccl_exchange(call->name, comm, (hccl_tag){HCCL_KIND_P2P, 0, 0}, transfers, call->item_count);
    free(transfers);
    return result;
}

static HcclResult check_item(const hccl_call *call, const HcclSendRecvItem *item)
{
    HcclResult result = hccl_check_rank(call, item->remoteRank);

    if (!result && item->remoteRank == call->comm->rank)
        result = sim_fail(call->name, HCCL_E_PARA, "rank %u cannot send to itself", item->remoteRank);
    if (!result && item->sendRecvType != HCCL_SEND && item->sendRecvType != HCCL_RECV)
        result = sim_fail(call->name, HCCL_E_PARA, "neither send nor receive");
    if (result)
        return result;
    return hccl_check_buffer(call, item->sendRecvType == HCCL_SEND ? "send" : "receive", item->buf, item->count,
                             item->dataType);
}

static HcclResult call_items(const char *function, const HcclSendRecvItem *items, uint32_t count, HcclComm comm,
                             hcclStream stream)
{
    hccl_call call = {.name = function, .run = run_items, .item_count = count};
    HcclResult result = hccl_begin(&call, comm);

    for (uint32_t i = 0; i < count && !result; i++)
        result = check_item(&call, &items[i]);
    if (!result && !(call.items = calloc(count, sizeof *call.items)))
        result = hccl_no_memory(function);
    if (!result)
        memcpy(call.items, items, count * sizeof *items);
    return hccl_end(&call, result, stream);
}

/* Sends to another rank, which receives the same number of bytes. May return before they were received. */
HcclResult HcclSend(void *sendBuf, uint64_t count, HcclDataType dataType, uint32_t destRank, HcclComm comm,
                    hcclStream stream)
{
    HcclSendRecvItem item = {HCCL_SEND, sendBuf, count, dataType, destRank};

    return call_items(__func__, &item, 1, comm, stream);
}

/* Receives what another rank sends. */
HcclResult HcclRecv(void *recvBuf, uint64_t count, HcclDataType dataType, uint32_t srcRank, HcclComm comm,
                    hcclStream stream)
{
    HcclSendRecvItem item = {HCCL_RECV, recvBuf, count, dataType, srcRank};

    return call_items(__func__, &item, 1, comm, stream);
}

/* Sends and receives at once, in any order of the peers. */
HcclResult HcclBatchSendRecv(HcclSendRecvItem *sendRecvInfo, uint32_t itemNum, HcclComm comm, hcclStream stream)
{
    if (!sendRecvInfo || !itemNum)
        return FAIL(HCCL_E_PARA, "no items");
    return call_items(__func__, sendRecvInfo, itemNum, comm, stream);
}

/* From here to HcclGroupEnd the calling thread's operations are collected. Groups may be nested; the outermost counts.
 */
HcclResult HcclGroupStart(void)
{
    hccl_begin_group();
    return HCCL_SUCCESS;
}

/* Does what was collected, in its order; all sends and receives of a communicator at once, as HcclBatchSendRecv. */
HcclResult HcclGroupEnd(void)
{
    return hccl_end_group(__func__);
}
