/* How bytes move between the ranks of a communicator.
 *
 * Unix stream sockets without a name in the file system, one for each pair of ranks: a process that dies takes its ends
 * with it, so that its peers notice at once and nothing is left behind. Each transfer is a frame with a header that
 * says what it belongs to; ranks that do different things at the same time are told so, instead of taking each other's
 * bytes.
 */
#ifndef CANN_SIM_HCCL_LINK_H
#define CANN_SIM_HCCL_LINK_H

#include "hccl_comm.h"

#define HCCL_NONCE_BYTES 16

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

/* What a transfer belongs to. Both ends must agree in all of it. */
typedef struct {
    uint16_t kind, type;
    uint32_t detail; /* the root or the operation */
} hccl_tag;

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
    size_t done; /* of the header and the data; 0 to begin with */
    hccl_frame header;
} hccl_transfer;

/* Connects all ranks that know `nonce`. Returns when all of them are connected, or with an error. */
HcclResult hccl_connect(const char *function, hccl_comm *comm, const unsigned char nonce[HCCL_NONCE_BYTES],
                        double timeout);

/* Does all transfers at once; those with the same peer and direction in the order given. Fails if a peer is gone or
 * does something else, if nothing moves for the communicator's timeout, or when the communicator is being destroyed. */
HcclResult hccl_exchange(const char *function, hccl_comm *comm, hccl_tag tag, hccl_transfer *transfers, size_t count);

/* Closes all connections, if `politely` after telling the peers that this is meant. */
void hccl_disconnect(hccl_comm *comm, bool politely);

/* A peer that closed its connection without saying goodbye, or -1. Looks, but takes nothing. */
int hccl_find_dead_peer(const hccl_comm *comm);

/* Seconds of the steady clock. */
double hccl_now(void);

#endif
