/* Communicators: groups of ranks, each of which has a connection to every other. */
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
    size_t streams; /* of the device, that HCCL holds for it */
    double timeout; /* seconds without progress until an operation fails */
    char name[COMM_NAME_MAX_LENGTH];

    pthread_mutex_t turn;   /* for one operation at a time, and for the next three fields */
    int *sockets;           /* by rank; -1: oneself, or closed */
    struct pollfd *watched; /* by rank: room for a wait */
    double missed_since;    /* when a peer was found dead while idle; 0: never */

    pthread_mutex_t lock; /* for the two fields below */
    HcclResult error;     /* of the operation that failed; none will run after it */
    char error_text[512];
} hccl_comm;

/* A communicator without handle and connections; NULL if the host has no memory or no files left. The second function
 * frees it; sim_publish is to be given that one. */
hccl_comm *hccl_new_comm(uint32_t size, uint32_t rank, int device);
void hccl_release_comm(sim_object *object);

/* The communicator behind a handle, with a reference, unless it has failed: then its error, and `comm` is NULL. */
HcclResult hccl_find(const char *function, HcclComm handle, hccl_comm **comm);

/* The error of a failed communicator, as the calling thread's error. */
HcclResult hccl_state(const char *function, hccl_comm *comm);

#endif
