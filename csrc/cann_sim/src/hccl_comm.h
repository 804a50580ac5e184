/* Communicators: a group of ranks, each with a connection to each other. */
#ifndef CANN_SIM_HCCL_COMM_H
#define CANN_SIM_HCCL_COMM_H

#include <poll.h>
#include <pthread.h>
#include <stdbool.h>

#include "handles.h"
#include "hccl_api.h"

typedef struct hccl_comm {
    sim_object object;
    struct hccl_comm *next; /* of the process */
    uint32_t rank, size;
    int device;
    double timeout; /* seconds without progress until an operation fails */
    char name[COMM_NAME_MAX_LENGTH];
    int wake; /* becomes readable when the communicator is being destroyed */

    pthread_mutex_t turn;   /* one operation at a time; what follows */
    int *sockets;           /* by rank; -1: oneself, or closed */
    struct pollfd *watched; /* room for size + 1 */
    double missed_since;    /* when an idle peer was found dead; 0: never */

    pthread_mutex_t lock; /* what follows */
    HcclResult error;     /* of the operation that failed: no other will run */
    char error_text[512];
} hccl_comm;

/* The communicator behind a handle, with a reference, unless it has failed: then its error. */
HcclResult hccl_find(const char *function, HcclComm handle, hccl_comm **comm);

/* The error of a failed communicator, as the calling thread's error. */
HcclResult hccl_state(const char *function, hccl_comm *comm);

/* The communicator fails for good: its connections are closed, so that the other ranks notice, and each later operation
 * returns `error` with this text. During one's turn only. */
void hccl_give_up(hccl_comm *comm, HcclResult error, const char *text);

#endif
