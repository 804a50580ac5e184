#include "hccl_comm.h"

#include <stdlib.h>
#include <string.h>

#include "config.h"
#include "errors.h"
#include "stream.h"

void hccl_release_comm(sim_object *object)
{
    hccl_comm *comm = (hccl_comm *)object;

    if (comm->streams)
        sim_give_streams(comm->device, comm->streams);
    pthread_mutex_destroy(&comm->turn);
    pthread_mutex_destroy(&comm->lock);
    free(comm->sockets);
    free(comm->watched);
    free(comm);
}

HcclResult hccl_state(const char *function, hccl_comm *comm)
{
    HcclResult error;

    pthread_mutex_lock(&comm->lock);
    if ((error = comm->error))
        sim_fail(function, (int)error, "the communicator has failed: %s", comm->error_text);
    pthread_mutex_unlock(&comm->lock);
    return error;
}

HcclResult hccl_find(const char *function, HcclComm handle, hccl_comm **comm)
{
    HcclResult error;

    if (!(*comm = sim_acquire(SIM_COMMUNICATOR, handle)))
        return sim_fail(function, HCCL_E_PARA, "%p is not a communicator, or was destroyed", handle);
    if (!(error = hccl_state(function, *comm)))
        return HCCL_SUCCESS;
    sim_let_go(&(*comm)->object);
    *comm = NULL;
    return error;
}

hccl_comm *hccl_new_comm(uint32_t size, uint32_t rank, int device)
{
    hccl_comm *comm = calloc(1, sizeof *comm);

    if (!comm)
        return NULL;
    comm->rank = rank;
    comm->size = size;
    comm->device = device;
    comm->timeout = sim_settings()->hccl_timeout;
    comm->sockets = malloc(size * sizeof *comm->sockets);
    comm->watched = calloc(size, sizeof *comm->watched);
    pthread_mutex_init(&comm->turn, NULL);
    pthread_mutex_init(&comm->lock, NULL);
    if (!comm->sockets || !comm->watched) {
        hccl_release_comm(&comm->object);
        return NULL;
    }
    for (uint32_t peer = 0; peer < size; peer++)
        comm->sockets[peer] = -1;
    return comm;
}

/* Tells the name that was configured, or one that no other communicator has. `commName` has room for 128 bytes. */
HcclResult HcclGetCommName(HcclComm comm, char *commName)
{
    SIM_BORROWED hccl_comm *object = sim_acquire(SIM_COMMUNICATOR, comm);

    if (!object || !commName)
        return FAIL(object ? HCCL_E_PTR : HCCL_E_PARA, "%p is not a communicator, or commName is NULL", comm);
    strcpy(commName, object->name);
    return HCCL_SUCCESS;
}

/* Tells the number of ranks. */
HcclResult HcclGetRankSize(HcclComm comm, uint32_t *rankSize)
{
    SIM_BORROWED hccl_comm *object = NULL;
    HcclResult result = hccl_find(__func__, comm, &object);

    if (result)
        return result;
    if (!rankSize)
        return FAIL(HCCL_E_PTR, "rankSize is NULL");
    *rankSize = object->size;
    return HCCL_SUCCESS;
}

/* Tells the rank of this process in the communicator. */
HcclResult HcclGetRankId(HcclComm comm, uint32_t *rank)
{
    SIM_BORROWED hccl_comm *object = NULL;
    HcclResult result = hccl_find(__func__, comm, &object);

    if (result)
        return result;
    if (!rank)
        return FAIL(HCCL_E_PTR, "rank is NULL");
    *rank = object->rank;
    return HCCL_SUCCESS;
}

/* Returns what a code means, in a few words. */
const char *HcclGetErrorString(HcclResult code)
{
    switch (code) {
    case HCCL_SUCCESS:
        return "no error";
    case HCCL_E_PARA:
        return "wrong argument, or the ranks do different things";
    case HCCL_E_PTR:
        return "null pointer";
    case HCCL_E_MEMORY:
        return "out of memory";
    case HCCL_E_INTERNAL:
        return "internal error";
    case HCCL_E_NOT_SUPPORT:
        return "not supported";
    case HCCL_E_NOT_FOUND:
        return "not found";
    case HCCL_E_UNAVAIL:
        return "the communicator is destroyed";
    case HCCL_E_SYSCALL:
        return "a system call failed";
    case HCCL_E_TIMEOUT:
        return "timeout";
    case HCCL_E_RUNTIME:
        return "the runtime refused: device, stream or event";
    case HCCL_E_REMOTE:
        return "another rank is gone";
    }
    return "unknown error";
}

/* Tells which fields of HcclCommConfig are read: those up to the timeout. Only name and timeout have an effect. */
uint32_t HcclGetCommConfigCapability(void)
{
    return HCCL_COMM_CONFIG_EXEC_TIMEOUT + 1;
}

/* Accepts only HCCL_DETERMINISTIC, with any value: reductions are always deterministic here. */
HcclResult HcclSetConfig(HcclConfig config, HcclConfigValue configValue)
{
    (void)configValue;
    return config == HCCL_DETERMINISTIC
               ? HCCL_SUCCESS
               : (HcclResult)FAIL(HCCL_E_NOT_SUPPORT, "configuration %d is not simulated", (int)config);
}
