/* One operation of one rank: its arguments, and its way into a stream. */
#ifndef CANN_SIM_HCCL_CALL_H
#define CANN_SIM_HCCL_CALL_H

#include "hccl_comm.h"
#include "hccl_round.h"

/* How a buffer is divided among the ranks: elements of each part and where they begin. */
typedef struct {
    uint64_t *counts, *places;
} hccl_parts;

typedef struct hccl_call {
    const char *name; /* of the function that was called */
    hccl_kind kind;
    uint32_t detail; /* on which all ranks must agree: the root, the operation, or both */

    /* Moves the data when it is the call's turn, by one round or several, for which `round` has room: one transfer to
     * and one from each rank, or as many as there are items. NULL: there is nothing to move. */
    HcclResult (*run)(hccl_round *round, const struct hccl_call *call);

    hccl_comm *comm;
    const void *send;
    void *receive;
    uint64_t count;
    HcclDataType type;
    HcclReduceOp op;
    uint32_t root;
    hccl_parts sent, received; /* owned by the call */
    hccl_parts slices;         /* of a chunk of a reduction, filled chunk by chunk; owned by the call */

    HcclSendRecvItem *items; /* point to point; owned by the call */
    size_t item_count;
} hccl_call;

/* Finds the communicator and puts it, with a reference, into the call. The thread must be on its device. */
HcclResult hccl_begin(hccl_call *call, HcclComm comm);

/* Copies parts into the call. Without `counts` each has `each` elements; without `places` they follow one another. */
HcclResult hccl_set_parts(const hccl_call *call, hccl_parts *parts, const uint64_t *counts, const uint64_t *places,
                          uint64_t each);

/* Whether a buffer of `count` elements lies in the memory of the communicator's device. */
HcclResult hccl_check_buffer(const hccl_call *call, const char *which, const void *buffer, uint64_t count,
                             HcclDataType type);

/* Whether `rank` is one of the communicator's. */
HcclResult hccl_check_rank(const hccl_call *call, uint32_t rank);

/* Puts the call into the stream, or into the group that the thread has begun. Takes what the call owns. */
HcclResult hccl_end(hccl_call *call, hcclStream stream);

/* Gives a call up whose arguments are wrong: releases what it owns, and returns `result`. */
HcclResult hccl_drop(hccl_call *call, HcclResult result);

/* Groups: what a thread calls between the two is done at the end, its sends and receives all at once. */
void hccl_begin_group(void);
HcclResult hccl_end_group(const char *function);

#endif
