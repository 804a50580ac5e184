/* How bytes move between the ranks of a communicator: transfers that are done at once, over the connections that are
 * there.
 *
 * Each transfer is a frame with a header that says what it belongs to; ranks that do different things at the same time
 * are told so, instead of taking each other's bytes.
 */
#ifndef CANN_SIM_HCCL_ROUND_H
#define CANN_SIM_HCCL_ROUND_H

#include "hccl_comm.h"

typedef enum {
    HCCL_KIND_GOODBYE = 1,
    HCCL_KIND_INIT,
    HCCL_KIND_P2P,
    HCCL_KIND_ALL_REDUCE,
    HCCL_KIND_BROADCAST,
    HCCL_KIND_REDUCE_SCATTER,
    HCCL_KIND_REDUCE,
    HCCL_KIND_SCATTER,
    HCCL_KIND_ALL_GATHER,
    HCCL_KIND_BARRIER,
    HCCL_KIND_ALL_TO_ALL
} hccl_kind;

/* What a transfer belongs to. Both ends must agree on all of it. */
typedef struct {
    uint16_t kind, type;
    uint32_t detail; /* the root or the operation */
} hccl_tag;

#define HCCL_FRAME_MAGIC 0x4c434348u

/* What is sent before the bytes of a transfer. */
typedef struct {
    uint32_t magic;
    hccl_tag tag;
    uint32_t unused;
    uint64_t length;
} hccl_frame;

typedef struct {
    uint32_t peer;
    bool outgoing;
    void *data; /* only read if outgoing */
    size_t length;
    size_t done; /* of the header and the data */
    hccl_frame header;
} hccl_transfer;

/* Transfers that are done at once. */
typedef struct {
    const char *function; /* of the interface, for errors */
    hccl_comm *comm;
    hccl_tag tag;
    hccl_transfer *transfers;
    size_t count;
} hccl_round;

/* An empty round with room for `room` transfers, to be closed after use. */
HcclResult hccl_open_round(hccl_round *round, const char *function, hccl_comm *comm, hccl_tag tag, size_t room);
void hccl_close_round(hccl_round *round);

/* Adds a transfer to or from another rank. The memory is the caller's and must last until the round is done. */
void hccl_give(hccl_round *round, uint32_t peer, const void *data, size_t length);
void hccl_take(hccl_round *round, uint32_t peer, void *data, size_t length);

/* Adds an empty transfer to each rank and one from it, so that nobody is done before everybody has begun. */
void hccl_greet_all(hccl_round *round);

/* Does all transfers of the round at once, those with the same peer and direction in the order in which they were
 * added, and leaves the round empty. Fails if a peer is gone or does something else, if nothing moves for the
 * communicator's timeout, or when the communicator is being destroyed. */
HcclResult hccl_exchange(hccl_round *round);

#endif
