#include "hccl_membership.h"

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#include "clock.h"
#include "config.h"
#include "device.h"
#include "errors.h"
#include "hccl_link.h"
#include "stream.h"

#define MAX_GROUP_NAME 32 /* hcclUdi has room for more, but that is what torch-npu documents of its group_name */
#define ROOT_MAGIC "cannsim root 1"
#define APART_SECONDS 0.02

/* What HcclRootInfo holds: a unique number from which each rank derives where the others are. */
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

/* With the list's lock held: names tell the communicators of a device apart. */
static bool is_taken(const hccl_comm *comm)
{
    for (const hccl_comm *each = list; each; each = each->next)
        if (each->device == comm->device && !strcmp(each->name, comm->name))
            return true;
    return false;
}

static HcclResult enter_list(const char *function, hccl_comm *comm)
{
    HcclResult result = HCCL_SUCCESS;

    pthread_mutex_lock(&list_lock);
    if (is_taken(comm)) {
        result = sim_fail(function, HCCL_E_PARA, "device %d has a communicator with the name %s already", comm->device,
                          comm->name);
    } else {
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

/* The names and the timeout; everything else that can be configured makes hardware faster. */
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
    if (head.size >= offsetof(HcclCommConfig, hcclOpExpansionMode) &&
        strnlen(config->hcclUdi, UDI_MAX_LENGTH) > MAX_GROUP_NAME)
        return sim_fail(function, HCCL_E_PARA, "the group_name \"%.*s\" is longer than the %d characters that torch-npu "
                        "documents", UDI_MAX_LENGTH, config->hcclUdi, MAX_GROUP_NAME);
    if (head.size >= offsetof(HcclCommConfig, hcclAlgo) && config->hcclExecTimeOut > 0)
        comm->timeout = config->hcclExecTimeOut;
    return HCCL_SUCCESS;
}

/* Makes a number by which the ranks of one communicator find each other. Nobody needs to keep it alive, and it may be
 * used again when the communicator is gone. */
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

/* Does the same as HcclCommInitRootInfoConfig without a configuration. */
HcclResult HcclCommInitRootInfo(uint32_t nRanks, const HcclRootInfo *rootInfo, uint32_t rank, HcclComm *comm)
{
    return HcclCommInitRootInfoConfig(nRanks, rootInfo, rank, NULL, comm);
}

/* Enters the communicator into the list, connects it to the other ranks and publishes it. */
static HcclResult join(const char *function, hccl_comm *comm, const root *content, const HcclCommConfig *config,
                       HcclComm *handle)
{
    HcclResult result;

    name_after(comm, content->nonce);
    if (sim_take_streams(function, comm->device, sim_settings()->communicator_streams))
        return HCCL_E_RUNTIME;
    comm->streams = sim_settings()->communicator_streams;
    if ((config && (result = read_config(function, comm, config))) || (result = enter_list(function, comm)) ||
        (result = hccl_connect(function, comm, content->nonce, sim_settings()->connect_timeout)))
        return result;
    *handle = sim_publish(SIM_COMMUNICATOR, &comm->object, hccl_release_comm);
    return *handle ? HCCL_SUCCESS : HCCL_E_MEMORY;
}

/* Returns to the threads of a process one after another. Torch-npu notes each new communicator in a list of the process
 * without a lock, and here, unlike on a device, all ranks may be threads of one process and come together at once. */
static void part_from_others(void)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static double latest;
    double wait;

    pthread_mutex_lock(&lock);
    wait = latest + APART_SECONDS - sim_seconds();
    if (latest && wait > 0)
        usleep((useconds_t)(wait * 1e6));
    latest = sim_seconds();
    pthread_mutex_unlock(&lock);
}

/* Joins the communicator that `rootInfo` stands for, on the current device. Returns when all `nRanks` are there;
 * HCCL_E_TIMEOUT after HCCL_CONNECT_TIMEOUT seconds, or CANN_SIM_HCCL_TIMEOUT, HCCL_E_REMOTE if another rank gives up, HCCL_E_PARA if the ranks
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
    if (!(object = hccl_new_comm(nRanks, rank, device)))
        return FAIL(HCCL_E_MEMORY, "the host has no memory or no files left");
    if ((result = join(__func__, object, &content, config, comm))) {
        hccl_disconnect(object, false);
        leave_list(object);
        hccl_release_comm(&object->object);
    } else {
        part_from_others();
    }
    return result;
}

/* Leaves the communicator when an operation that is under way has ended, by its timeout at the latest. Those that are
 * queued are not done. Does not wait for the peers, which can still take what they have been sent. */
HcclResult HcclCommDestroy(HcclComm comm)
{
    hccl_comm *object = sim_retire(SIM_COMMUNICATOR, comm);

    if (!object)
        return FAIL(HCCL_E_PARA, "%p is not a communicator, or was destroyed", comm);
    pthread_mutex_lock(&object->turn);
    hccl_disconnect(object, true);
    hccl_give_up(object, HCCL_E_UNAVAIL, "it was destroyed"); /* a graph may still hold it */
    pthread_mutex_unlock(&object->turn);
    leave_list(object);
    sim_let_go(&object->object);
    return HCCL_SUCCESS;
}

/* During one's turn, while nothing is under way: fails the communicator if a peer has been dead for the timeout. */
static void look_for_dead_peer(hccl_comm *comm)
{
    int dead = hccl_find_dead_peer(comm);
    char text[64];

    if (dead < 0) {
        comm->missed_since = 0;
        return;
    }
    if (!comm->missed_since)
        comm->missed_since = sim_seconds();
    if (sim_seconds() - comm->missed_since < comm->timeout)
        return;
    snprintf(text, sizeof text, "rank %d is gone", dead);
    hccl_give_up(comm, HCCL_E_REMOTE, text);
}

/* The error that ended the communicator, or HCCL_SUCCESS. While it is idle, a dead peer becomes an error
 * (HCCL_E_REMOTE) only when it has been missed for the timeout, as by a heartbeat: peers that end together do not alarm
 * each other. */
HcclResult HcclGetCommAsyncError(HcclComm comm, HcclResult *asyncError)
{
    SIM_BORROWED hccl_comm *object = sim_acquire(SIM_COMMUNICATOR, comm);

    if (!object)
        return FAIL(HCCL_E_PARA, "%p is not a communicator, or was destroyed", comm);
    if (!asyncError)
        return FAIL(HCCL_E_PTR, "asyncError is NULL");
    if (!pthread_mutex_trylock(&object->turn)) {
        look_for_dead_peer(object);
        pthread_mutex_unlock(&object->turn);
    }
    pthread_mutex_lock(&object->lock);
    *asyncError = object->error;
    pthread_mutex_unlock(&object->lock);
    return HCCL_SUCCESS;
}
