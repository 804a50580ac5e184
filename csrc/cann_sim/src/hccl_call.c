#include "hccl_call.h"

#include <stdlib.h>
#include <string.h>

#include "capture.h"
#include "device.h"
#include "errors.h"
#include "hccl_membership.h"
#include "hccl_types.h"
#include "memory.h"

typedef struct grouped {
    struct grouped *next;
    hccl_call call;
    hcclStream stream;
} grouped;

static _Thread_local HcclResult last_result; /* of an operation that ran in this thread */
static _Thread_local int group_depth;
static _Thread_local grouped *group;

HcclResult hccl_begin(hccl_call *call, HcclComm comm)
{
    HcclResult result = hccl_find(call->name, comm, &call->comm);
    int device;

    if (result)
        return result;
    if (sim_current_device(call->name, &device))
        return HCCL_E_RUNTIME;
    if (device != call->comm->device)
        return sim_fail(call->name, HCCL_E_RUNTIME, "the communicator is device %d's, this thread is on device %d",
                        call->comm->device, device);
    return HCCL_SUCCESS;
}

HcclResult hccl_set_parts(const hccl_call *call, hccl_parts *parts, const uint64_t *counts, const uint64_t *places,
                          uint64_t each)
{
    uint32_t size = call->comm->size;
    uint64_t next = 0;

    parts->counts = calloc(size, sizeof *parts->counts);
    parts->places = calloc(size, sizeof *parts->places);
    if (!parts->counts || !parts->places)
        return hccl_no_memory(call->name);
    for (uint32_t rank = 0; rank < size; rank++) {
        parts->counts[rank] = counts ? counts[rank] : each;
        parts->places[rank] = places ? places[rank] : next;
        next += parts->counts[rank];
    }
    return HCCL_SUCCESS;
}

HcclResult hccl_check_buffer(const hccl_call *call, const char *which, const void *buffer, uint64_t count,
                             HcclDataType type)
{
    size_t size = hccl_type_size(type);
    int device = -1;

    if (!size)
        return sim_fail(call->name, HCCL_E_PARA, "data type %d is unknown", (int)type);
    if (!count)
        return HCCL_SUCCESS;
    if (!buffer)
        return sim_fail(call->name, HCCL_E_PTR, "the %s buffer is NULL", which);
    if (count > SIZE_MAX / size)
        return sim_fail(call->name, HCCL_E_PARA, "%llu elements", (unsigned long long)count);
    if (sim_locate(buffer, count * size, &device) != SIM_DEVICE_MEMORY || device != call->comm->device)
        return sim_fail(call->name, HCCL_E_PARA, "the %s buffer, %zu bytes at %p, is not memory of device %d", which,
                        (size_t)count * size, buffer, call->comm->device);
    return HCCL_SUCCESS;
}

HcclResult hccl_check_rank(const hccl_call *call, uint32_t rank)
{
    return rank < call->comm->size
               ? HCCL_SUCCESS
               : (HcclResult)sim_fail(call->name, HCCL_E_PARA, "there is no rank %u among %u", rank, call->comm->size);
}

static void free_parts(hccl_parts parts)
{
    free(parts.counts);
    free(parts.places);
}

static void clear_call(hccl_call *call)
{
    if (call->comm)
        sim_let_go(&call->comm->object);
    free_parts(call->sent);
    free_parts(call->received);
    free_parts(call->slices);
    free(call->items);
}

HcclResult hccl_drop(hccl_call *call, HcclResult result)
{
    clear_call(call);
    return result;
}

static void release_call(void *argument)
{
    clear_call(argument);
    free(argument);
}

/* What a stream reports of an operation that failed in it. */
static aclError as_acl_error(HcclResult result)
{
    return result == HCCL_E_TIMEOUT ? ACL_ERROR_RT_FFTS_PLUS_TIMEOUT : ACL_ERROR_RT_TS_ERROR;
}

/* During the communicator's turn. */
static HcclResult move_data(hccl_comm *comm, const hccl_call *call)
{
    hccl_tag tag = {(uint16_t)call->kind, (uint16_t)call->type, call->detail};
    hccl_round round;
    HcclResult result;

    if (!call->run)
        return HCCL_SUCCESS;
    result = hccl_open_round(&round, call->name, comm, tag, call->items ? call->item_count : 2 * (size_t)comm->size);
    if (result)
        return result;
    result = call->run(&round, call);
    hccl_close_round(&round);
    return result;
}

static aclError run_call(void *argument)
{
    const hccl_call *call = argument;
    hccl_comm *comm = call->comm;
    HcclResult result;

    pthread_mutex_lock(&comm->turn);
    if (!(result = hccl_state(call->name, comm)) && (result = move_data(comm, call)))
        hccl_give_up(comm, result, sim_error_text());
    pthread_mutex_unlock(&comm->turn);
    last_result = result;
    return result ? as_acl_error(result) : ACL_SUCCESS;
}

static HcclResult submit(hccl_call *call, hcclStream stream)
{
    hccl_call *argument = malloc(sizeof *argument);
    sim_task task = {.name = call->name, .run = run_call, .release = release_call, .argument = argument, .waits = true};

    if (!argument)
        return hccl_drop(call, hccl_no_memory(call->name));
    *argument = *call;
    last_result = HCCL_SUCCESS;
    if (!sim_submit(call->name, stream, &task))
        return HCCL_SUCCESS;
    return last_result ? last_result : HCCL_E_RUNTIME;
}

/* Whether the two are done at once: sends and receives of one communicator in one stream. */
static bool go_together(const grouped *entry, const hccl_call *call, hcclStream stream)
{
    return call->items && entry->call.items && entry->call.comm == call->comm && entry->stream == stream;
}

static HcclResult add_items(hccl_call *to, hccl_call *call)
{
    HcclSendRecvItem *items = realloc(to->items, (to->item_count + call->item_count) * sizeof *items);

    if (!items)
        return hccl_drop(call, hccl_no_memory(call->name));
    memcpy(items + to->item_count, call->items, call->item_count * sizeof *items);
    to->items = items;
    to->item_count += call->item_count;
    return hccl_drop(call, HCCL_SUCCESS);
}

static HcclResult join_group(hccl_call *call, hcclStream stream)
{
    grouped **place = &group, *entry;

    for (; *place; place = &(*place)->next)
        if (go_together(*place, call, stream))
            return add_items(&(*place)->call, call);
    if (!(entry = malloc(sizeof *entry)))
        return hccl_drop(call, hccl_no_memory(call->name));
    *entry = (grouped){NULL, *call, stream};
    *place = entry;
    return HCCL_SUCCESS;
}

HcclResult hccl_end(hccl_call *call, hcclStream stream)
{
    return group_depth ? join_group(call, stream) : submit(call, stream);
}

void hccl_begin_group(void)
{
    group_depth++;
}

HcclResult hccl_end_group(const char *function)
{
    HcclResult result = HCCL_SUCCESS;
    grouped *entry;

    if (!group_depth)
        return sim_fail(function, HCCL_E_PARA, "no group was begun");
    if (--group_depth)
        return HCCL_SUCCESS;
    while ((entry = group)) {
        group = entry->next;
        if (result)
            clear_call(&entry->call);
        else
            result = submit(&entry->call, entry->stream);
        free(entry);
    }
    return result;
}
