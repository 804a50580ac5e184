/* One operation of one rank: its arguments, and its way into a stream. */
#ifndef CANN_SIM_HCCL_CALL_H
#define CANN_SIM_HCCL_CALL_H

#include "hccl_comm.h"

typedef struct hccl_call {
    const char *name; /* of the function that was called */
    HcclResult (*run)(hccl_comm *comm, const struct hccl_call *call);
    hccl_comm *comm;
    const void *send;
    void *receive;
    uint64_t count;
    HcclDataType type;
    HcclReduceOp op;
    uint32_t root;
    /* By rank: elements sent and where they begin, elements received and where they begin. Owned by the call. */
    uint64_t *send_counts, *send_places, *receive_counts, *receive_places;
    /* Point to point. Owned by the call. */
    HcclSendRecvItem *items;
    size_t item_count;
} hccl_call;

/* Finds the communicator and puts it, with a reference, into the call. The thread must be on its device. */
HcclResult hccl_begin(hccl_call *call, HcclComm comm);

/* Memory for `count` numbers; `which` is one of the call's arrays. */
HcclResult hccl_make_counts(const hccl_call *call, uint64_t **which, size_t count);

/* Whether a buffer of `count` elements lies in the memory of the communicator's device. */
HcclResult hccl_check_buffer(const hccl_call *call, const char *which, const void *buffer, uint64_t count,
                             HcclDataType type);

/* Whether `rank` is one of the communicator's. */
HcclResult hccl_check_rank(const hccl_call *call, uint32_t rank);

/* Puts the call into the stream, or into the group that the thread has begun. If `result` is an error already, that is
 * all that is returned. The call and what it owns are used up. */
HcclResult hccl_end(hccl_call *call, HcclResult result, hcclStream stream);

/* Groups: what a thread calls between the two is done at the end, its sends and receives all at once. */
void hccl_begin_group(void);
HcclResult hccl_end_group(const char *function);

#endif
