#include "hccl_comm.h"

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <unistd.h>

#include "config.h"
#include "device.h"
#include "errors.h"
#include "hccl_link.h"

#define ROOT_MAGIC "cannsim root 1"

/* What HcclRootInfo holds: a number that nobody else has. Each rank derives from it where the others are. */
typedef struct {
    char magic[16];
    unsigned char nonce[HCCL_NONCE_BYTES];
} root;

/* What `reserved` of HcclCommConfig holds. */
typedef struct {
    size_t size;
    uint32_t magic;
} config_head;

static pthread_mutex_t list_lock = PTHREAD_MUTEX_INITIALIZER;
static hccl_comm *list;

static void release_comm(sim_object *object)
{
    hccl_comm *comm = (hccl_comm *)object;

    if (comm->wake >= 0)
        close(comm->wake);
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
    if ((error = hccl_state(function, *comm)))
        sim_let_go(&(*comm)->object);
    return error;
}

void hccl_give_up(hccl_comm *comm, HcclResult error, const char *text)
{
    pthread_mutex_lock(&comm->lock);
    if (!comm->error) {
        comm->error = error;
        snprintf(comm->error_text, sizeof comm->error_text, "%s", text);
    }
    pthread_mutex_unlock(&comm->lock);
    hccl_disconnect(comm, false);
}

static void name_after(hccl_comm *comm, const unsigned char *nonce)
{
    int used = sprintf(comm->name, "cann_sim_");

    for (int i = 0; i < HCCL_NONCE_BYTES; i++)
        used += sprintf(comm->name + used, "%02x", nonce[i]);
    sprintf(comm->name + used, "_%u", comm->rank);
}

/* Names tell communicators of a device apart. */
static HcclResult enter_list(const char *function, hccl_comm *comm)
{
    HcclResult result = HCCL_SUCCESS;

    pthread_mutex_lock(&list_lock);
    for (const hccl_comm *each = list; each && !result; each = each->next)
        if (each->device == comm->device && !strcmp(each->name, comm->name))
            result = sim_fail(function, HCCL_E_PARA, "device %d has a communicator with the name %s already",
                              comm->device, comm->name);
    if (!result) {
        comm->next = list;
        list = comm;
    }
    pthread_mutex_unlock(&list_lock);
    return result;
}

static void leave_list(const hccl_comm *comm)
{
    hccl_comm **place;

    pthread_mutex_lock(&list_lock);
    for (place = &list; *place && *place != comm; place = &(*place)->next)
        ;
    if (*place)
        *place = comm->next;
    pthread_mutex_unlock(&list_lock);
}

/* The name and the timeout; everything else that can be configured makes hardware faster. */
static HcclResult read_config(const char *function, hccl_comm *comm, const HcclCommConfig *config)
{
    config_head head;

    memcpy(&head, config->reserved, sizeof head);
    if (head.magic != HCCL_COMM_CONFIG_MAGIC_WORD)
        return sim_fail(function, HCCL_E_PARA, "the configuration was not initialised");
    if (head.size >= offsetof(HcclCommConfig, hcclUdi) && config->hcclCommName[0]) {
        if (!memchr(config->hcclCommName, '\0', COMM_NAME_MAX_LENGTH))
            return sim_fail(function, HCCL_E_PARA, "the name is longer than %d bytes", COMM_NAME_MAX_LENGTH - 1);
        strcpy(comm->name, config->hcclCommName);
    }
    if (head.size >= offsetof(HcclCommConfig, hcclAlgo) && config->hcclExecTimeOut > 0)
        comm->timeout = config->hcclExecTimeOut;
    return HCCL_SUCCESS;
}

static hccl_comm *new_comm(uint32_t size, uint32_t rank, int device)
{
    hccl_comm *comm = calloc(1, sizeof *comm);

    if (!comm)
        return NULL;
    comm->rank = rank;
    comm->size = size;
    comm->device = device;
    comm->timeout = sim_settings()->hccl_timeout;
    comm->sockets = malloc(size * sizeof *comm->sockets);
    comm->watched = calloc((size_t)size + 1, sizeof *comm->watched);
    comm->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    pthread_mutex_init(&comm->turn, NULL);
    pthread_mutex_init(&comm->lock, NULL);
    if (!comm->sockets || !comm->watched || comm->wake < 0) {
        release_comm(&comm->object);
        return NULL;
    }
    for (uint32_t peer = 0; peer < size; peer++)
        comm->sockets[peer] = -1;
    return comm;
}

/* A number by which the ranks of one communicator find each other. It needs no one to keep it, and may be used again
 * after the communicator is gone. */
HcclResult HcclGetRootInfo(HcclRootInfo *rootInfo)
{
    root content = {ROOT_MAGIC, {0}};

    if (!rootInfo)
        return FAIL(HCCL_E_PTR, "rootInfo is NULL");
    if (getrandom(content.nonce, sizeof content.nonce, 0) != sizeof content.nonce)
        return FAIL(HCCL_E_SYSCALL, "getrandom: %s", strerror(errno));
    memset(rootInfo, 0, sizeof *rootInfo);
    memcpy(rootInfo->internal, &content, sizeof content);
    return HCCL_SUCCESS;
}

/* The same as HcclCommInitRootInfoConfig without configuration. */
HcclResult HcclCommInitRootInfo(uint32_t nRanks, const HcclRootInfo *rootInfo, uint32_t rank, HcclComm *comm)
{
    return HcclCommInitRootInfoConfig(nRanks, rootInfo, rank, NULL, comm);
}

/* Joins the communicator that `rootInfo` stands for, on the current device. Returns when all `nRanks` are there;
 * HCCL_E_TIMEOUT after CANN_SIM_HCCL_TIMEOUT seconds, HCCL_E_REMOTE if another rank gives up, HCCL_E_PARA if the ranks
 * do not fit together. Then there is nothing to destroy. */
HcclResult HcclCommInitRootInfoConfig(uint32_t nRanks, const HcclRootInfo *rootInfo, uint32_t rank,
                                      const HcclCommConfig *config, HcclComm *comm)
{
    hccl_comm *object;
    HcclResult result;
    root content;
    int device;

    if (!rootInfo || !comm)
        return FAIL(HCCL_E_PTR, "NULL");
    memcpy(&content, rootInfo->internal, sizeof content);
    if (!nRanks || rank >= nRanks || memcmp(content.magic, ROOT_MAGIC, sizeof ROOT_MAGIC))
        return FAIL(HCCL_E_PARA, "rank %u of %u, or a root info that HcclGetRootInfo did not make", rank, nRanks);
    if (CURRENT_DEVICE(&device))
        return HCCL_E_RUNTIME;
    if (!(object = new_comm(nRanks, rank, device)))
        return FAIL(HCCL_E_MEMORY, "the host has no memory or no files left");
    name_after(object, content.nonce);
    if (config && (result = read_config(__func__, object, config)))
        goto failed;
    if ((result = enter_list(__func__, object)))
        goto failed;
    if ((result = hccl_connect(__func__, object, content.nonce, sim_settings()->hccl_timeout)))
        goto failed;
    if ((*comm = sim_publish(SIM_COMMUNICATOR, &object->object, release_comm)))
        return HCCL_SUCCESS;
    result = HCCL_E_MEMORY;

failed:
    hccl_disconnect(object, false);
    leave_list(object);
    release_comm(&object->object);
    return result;
}

/* Leaves the communicator. An operation of another thread that is under way ends with HCCL_E_UNAVAIL; what peers have
 * been sent they can still take. Does not wait for the peers. */
HcclResult HcclCommDestroy(HcclComm comm)
{
    hccl_comm *object = sim_retire(SIM_COMMUNICATOR, comm);
    uint64_t one = 1;

    if (!object)
        return FAIL(HCCL_E_PARA, "%p is not a communicator, or was destroyed", comm);
    (void)!write(object->wake, &one, sizeof one); /* it has room for the only one */
    pthread_mutex_lock(&object->turn);
    hccl_disconnect(object, true);
    hccl_give_up(object, HCCL_E_UNAVAIL, "it was destroyed"); /* a graph may still hold it */
    pthread_mutex_unlock(&object->turn);
    leave_list(object);
    sim_let_go(&object->object);
    return HCCL_SUCCESS;
}

/* The name that was configured, or one that no other communicator has; `commName` has room for 128 bytes. */
HcclResult HcclGetCommName(HcclComm comm, char *commName)
{
    hccl_comm *object = sim_acquire(SIM_COMMUNICATOR, comm);

    if (!object || !commName) {
        if (object)
            sim_let_go(&object->object);
        return FAIL(object ? HCCL_E_PTR : HCCL_E_PARA, "%p is not a communicator, or commName is NULL", comm);
    }
    strcpy(commName, object->name);
    sim_let_go(&object->object);
    return HCCL_SUCCESS;
}

/* How many ranks there are. */
HcclResult HcclGetRankSize(HcclComm comm, uint32_t *rankSize)
{
    hccl_comm *object;
    HcclResult result = hccl_find(__func__, comm, &object);

    if (result)
        return result;
    if (rankSize)
        *rankSize = object->size;
    sim_let_go(&object->object);
    return rankSize ? HCCL_SUCCESS : FAIL(HCCL_E_PTR, "rankSize is NULL");
}

/* Which of them this is. */
HcclResult HcclGetRankId(HcclComm comm, uint32_t *rank)
{
    hccl_comm *object;
    HcclResult result = hccl_find(__func__, comm, &object);

    if (result)
        return result;
    if (rank)
        *rank = object->rank;
    sim_let_go(&object->object);
    return rank ? HCCL_SUCCESS : FAIL(HCCL_E_PTR, "rank is NULL");
}

/* The error that ended the communicator, or HCCL_SUCCESS. While it is idle, a peer that is dead becomes an error
 * (HCCL_E_REMOTE) the timeout after it was first missed, as by a heartbeat: peers that end together do not alarm each
 * other. */
HcclResult HcclGetCommAsyncError(HcclComm comm, HcclResult *asyncError)
{
    hccl_comm *object = sim_acquire(SIM_COMMUNICATOR, comm);

    if (!object)
        return FAIL(HCCL_E_PARA, "%p is not a communicator, or was destroyed", comm);
    if (!asyncError) {
        sim_let_go(&object->object);
        return FAIL(HCCL_E_PTR, "asyncError is NULL");
    }
    if (!pthread_mutex_trylock(&object->turn)) {
        int dead = hccl_find_dead_peer(object);

        if (dead < 0)
            object->missed_since = 0;
        else if (!object->missed_since)
            object->missed_since = hccl_now();
        else if (hccl_now() - object->missed_since >= object->timeout) {
            char text[64];

            snprintf(text, sizeof text, "rank %d is gone", dead);
            hccl_give_up(object, HCCL_E_REMOTE, text);
        }
        pthread_mutex_unlock(&object->turn);
    }
    pthread_mutex_lock(&object->lock);
    *asyncError = object->error;
    pthread_mutex_unlock(&object->lock);
    sim_let_go(&object->object);
    return HCCL_SUCCESS;
}

/* What a code means, in a few words. */
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

/* Which fields of HcclCommConfig are read: those up to the timeout. Of these only name and timeout have an effect. */
uint32_t HcclGetCommConfigCapability(void)
{
    return HCCL_COMM_CONFIG_EXEC_TIMEOUT + 1;
}

/* Accepted: reductions are always deterministic here. */
HcclResult HcclSetConfig(HcclConfig config, HcclConfigValue configValue)
{
    (void)configValue;
    return config == HCCL_DETERMINISTIC
               ? HCCL_SUCCESS
               : (HcclResult)FAIL(HCCL_E_NOT_SUPPORT, "configuration %d is not simulated", (int)config);
}
