/* The connections between the ranks of a communicator.
 *
 * They are Unix stream sockets without a name in the file system, one for each pair of ranks: a process that dies takes
 * its ends with it, so that its peers notice at once and nothing is left behind.
 */
#ifndef CANN_SIM_HCCL_LINK_H
#define CANN_SIM_HCCL_LINK_H

#include "hccl_comm.h"

#define HCCL_NONCE_BYTES 16

/* Connects all ranks that know `nonce`. Returns when all of them are connected, or with an error. */
HcclResult hccl_connect(const char *function, hccl_comm *comm, const unsigned char nonce[HCCL_NONCE_BYTES],
                        double timeout);

/* Closes all connections, if `politely` after telling the peers that this is meant. */
void hccl_disconnect(hccl_comm *comm, bool politely);

/* A peer that closed its connection without saying goodbye, or -1. Looks at what has come, but takes nothing. */
int hccl_find_dead_peer(const hccl_comm *comm);

#endif
