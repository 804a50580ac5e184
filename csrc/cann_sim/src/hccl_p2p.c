/* Point to point: sends and receives, and groups of them. */
#include <stdlib.h>
#include <string.h>

#include "errors.h"
#include "hccl_call.h"
#include "hccl_types.h"

/* All sends and receives at once; with one peer in their order. */
static HcclResult run_items(hccl_round *round, const hccl_call *call)
{
    for (size_t i = 0; i < call->item_count; i++) {
        const HcclSendRecvItem *item = &call->items[i];
        size_t length = item->count * hccl_type_size(item->dataType);

        if (item->sendRecvType == HCCL_SEND)
            hccl_give(round, item->remoteRank, item->buf, length);
        else
            hccl_take(round, item->remoteRank, item->buf, length);
    }
    return hccl_exchange(round);
}

static HcclResult check_item(const hccl_call *call, const HcclSendRecvItem *item)
{
    HcclResult result = hccl_check_rank(call, item->remoteRank);

    if (result)
        return result;
    if (item->remoteRank == call->comm->rank)
        return sim_fail(call->name, HCCL_E_PARA, "rank %u cannot send to itself", item->remoteRank);
    if (item->sendRecvType != HCCL_SEND && item->sendRecvType != HCCL_RECV)
        return sim_fail(call->name, HCCL_E_PARA, "neither send nor receive");
    return hccl_check_buffer(call, item->sendRecvType == HCCL_SEND ? "send" : "receive", item->buf, item->count,
                             item->dataType);
}

/* Copies the items into the call, if all of them can be done. */
static HcclResult set_items(hccl_call *call, const HcclSendRecvItem *items, uint32_t count)
{
    HcclResult result;

    for (uint32_t i = 0; i < count; i++)
        if ((result = check_item(call, &items[i])))
            return result;
    if (!(call->items = calloc(count, sizeof *call->items)))
        return hccl_no_memory(call->name);
    memcpy(call->items, items, count * sizeof *items);
    call->item_count = count;
    return HCCL_SUCCESS;
}

static HcclResult call_items(const char *function, const HcclSendRecvItem *items, uint32_t count, HcclComm comm,
                             hcclStream stream)
{
    hccl_call call = {.name = function, .kind = HCCL_KIND_P2P, .run = run_items};
    HcclResult result;

    if ((result = hccl_begin(&call, comm)) || (result = set_items(&call, items, count)))
        return hccl_drop(&call, result);
    return hccl_end(&call, stream);
}

/* Sends to another rank, which must receive the same number of bytes. May return before they are received. */
HcclResult HcclSend(void *sendBuf, uint64_t count, HcclDataType dataType, uint32_t destRank, HcclComm comm,
                    hcclStream stream)
{
    HcclSendRecvItem item = {HCCL_SEND, sendBuf, count, dataType, destRank};

    return call_items(__func__, &item, 1, comm, stream);
}

/* Receives from another rank, which must send the same number of bytes. */
HcclResult HcclRecv(void *recvBuf, uint64_t count, HcclDataType dataType, uint32_t srcRank, HcclComm comm,
                    hcclStream stream)
{
    HcclSendRecvItem item = {HCCL_RECV, recvBuf, count, dataType, srcRank};

    return call_items(__func__, &item, 1, comm, stream);
}

/* Does several sends and receives at once; the order matters only among those with the same peer. */
HcclResult HcclBatchSendRecv(HcclSendRecvItem *sendRecvInfo, uint32_t itemNum, HcclComm comm, hcclStream stream)
{
    if (!sendRecvInfo || !itemNum)
        return FAIL(HCCL_E_PARA, "no items");
    return call_items(__func__, sendRecvInfo, itemNum, comm, stream);
}

/* Collects the calling thread's operations until HcclGroupEnd. Groups may be nested; the outermost one counts. */
HcclResult HcclGroupStart(void)
{
    hccl_begin_group();
    return HCCL_SUCCESS;
}

/* Does the operations that were collected, in their order, and the sends and receives of a communicator at once, as
 * HcclBatchSendRecv does. */
HcclResult HcclGroupEnd(void)
{
    return hccl_end_group(__func__);
}
