/* How a rank joins a communicator, and how it leaves or fails. */
#ifndef CANN_SIM_HCCL_MEMBERSHIP_H
#define CANN_SIM_HCCL_MEMBERSHIP_H

#include "hccl_comm.h"

/* The communicator fails for good: its connections are closed, so that the other ranks notice, and each later operation
 * returns `error` with this text. To be called during one's turn only. */
void hccl_give_up(hccl_comm *comm, HcclResult error, const char *text);

#endif
