#include "hccl_round.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "clock.h"
#include "errors.h"

HcclResult hccl_open_round(hccl_round *round, const char *function, hccl_comm *comm, hccl_tag tag, size_t room)
{
    *round = (hccl_round){function, comm, tag, calloc(room, sizeof *round->transfers), 0};
    return round->transfers ? HCCL_SUCCESS : hccl_no_memory(function);
}

void hccl_close_round(hccl_round *round)
{
    free(round->transfers);
}

void hccl_give(hccl_round *round, uint32_t peer, const void *data, size_t length)
{
    round->transfers[round->count++] =
        (hccl_transfer){peer, true, (void *)data, length, 0, {HCCL_FRAME_MAGIC, round->tag, 0, length}};
}

void hccl_take(hccl_round *round, uint32_t peer, void *data, size_t length)
{
    round->transfers[round->count++] = (hccl_transfer){.peer = peer, .data = data, .length = length};
}

void hccl_greet_all(hccl_round *round)
{
    for (uint32_t peer = 0; peer < round->comm->size; peer++)
        if (peer != round->comm->rank) {
            hccl_give(round, peer, NULL, 0);
            hccl_take(round, peer, NULL, 0);
        }
}

static const char *name_of(uint16_t kind)
{
    static const char *const names[] = {
        [HCCL_KIND_GOODBYE] = "goodbye",       [HCCL_KIND_INIT] = "initialisation",
        [HCCL_KIND_P2P] = "send or receive",   [HCCL_KIND_ALL_REDUCE] = "all-reduce",
        [HCCL_KIND_BROADCAST] = "broadcast",   [HCCL_KIND_REDUCE_SCATTER] = "reduce-scatter",
        [HCCL_KIND_REDUCE] = "reduce",         [HCCL_KIND_SCATTER] = "scatter",
        [HCCL_KIND_ALL_GATHER] = "all-gather", [HCCL_KIND_BARRIER] = "barrier",
        [HCCL_KIND_ALL_TO_ALL] = "all-to-all",
    };
    return kind && kind < sizeof names / sizeof *names ? names[kind] : "nonsense";
}

static HcclResult check_header(const hccl_round *round, const hccl_transfer *transfer)
{
    const hccl_frame *header = &transfer->header;
    hccl_tag tag = round->tag;

    if (header->magic == HCCL_FRAME_MAGIC && header->tag.kind == HCCL_KIND_GOODBYE)
        return sim_fail(round->function, HCCL_E_REMOTE, "rank %u has destroyed its communicator", transfer->peer);
    if (header->magic == HCCL_FRAME_MAGIC && !memcmp(&header->tag, &tag, sizeof tag) &&
        header->length == transfer->length)
        return HCCL_SUCCESS;
    return sim_fail(round->function, HCCL_E_PARA,
                    "rank %u does a %s of %llu bytes (type %u, root or operation %u), this rank a %s of %zu (%u, %u)",
                    transfer->peer, name_of(header->tag.kind), (unsigned long long)header->length, header->tag.type,
                    header->tag.detail, name_of(tag.kind), transfer->length, tag.type, tag.detail);
}

/* Moves what can be moved of a transfer without waiting; returns the bytes, 0 if none, or -1 with `result` set. */
static ssize_t advance(const hccl_round *round, hccl_transfer *transfer, HcclResult *result)
{
    size_t header_done = transfer->done < sizeof transfer->header ? transfer->done : sizeof transfer->header;
    size_t data_done = transfer->done - header_done;
    struct iovec parts[2] = {
        {(char *)&transfer->header + header_done, sizeof transfer->header - header_done},
        {transfer->data ? (char *)transfer->data + data_done : NULL, transfer->length - data_done},
    };
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
    int fd = round->comm->sockets[transfer->peer];
    ssize_t moved = transfer->outgoing ? sendmsg(fd, &message, MSG_NOSIGNAL) : recvmsg(fd, &message, 0);

    if (moved < 0 && (errno == EAGAIN || errno == EINTR))
        return 0;
    if (moved < 0 && errno != EPIPE && errno != ECONNRESET) {
        *result = sim_fail(round->function, HCCL_E_SYSCALL, "rank %u: %s", transfer->peer, strerror(errno));
        return -1;
    }
    if (moved <= 0) {
        *result = sim_fail(round->function, HCCL_E_REMOTE, "rank %u is gone", transfer->peer);
        return -1;
    }
    transfer->done += (size_t)moved;
    if (!transfer->outgoing && header_done < sizeof transfer->header && transfer->done >= sizeof transfer->header &&
        (*result = check_header(round, transfer)))
        return -1;
    return moved;
}

static bool is_done(const hccl_transfer *transfer)
{
    return transfer->done == sizeof transfer->header + transfer->length;
}

/* Whether an earlier unfinished transfer occupies the same direction of the same connection. */
static bool must_wait(const hccl_comm *comm, const hccl_transfer *transfer)
{
    return comm->watched[transfer->peer].events & (transfer->outgoing ? POLLOUT : POLLIN);
}

static void watch(hccl_comm *comm, const hccl_transfer *transfer)
{
    comm->watched[transfer->peer].fd = comm->sockets[transfer->peer];
    comm->watched[transfer->peer].events |= transfer->outgoing ? POLLOUT : POLLIN;
}

static void watch_nobody(hccl_comm *comm)
{
    for (uint32_t peer = 0; peer < comm->size; peer++)
        comm->watched[peer] = (struct pollfd){-1, 0, 0};
}

/* Moves what can be moved without waiting, and watches the connections of the rest. `last` is a transfer that is not
 * done, NULL if all are. */
static HcclResult advance_all(hccl_round *round, bool *moved, const hccl_transfer **last)
{
    HcclResult result = HCCL_SUCCESS;

    *moved = false;
    *last = NULL;
    watch_nobody(round->comm);
    for (size_t i = 0; i < round->count; i++) {
        hccl_transfer *transfer = &round->transfers[i];

        while (!is_done(transfer) && !must_wait(round->comm, transfer)) {
            ssize_t bytes = advance(round, transfer, &result);

            if (bytes < 0)
                return result;
            if (!bytes)
                watch(round->comm, transfer);
            *moved = *moved || bytes;
        }
        if (!is_done(transfer))
            *last = transfer;
    }
    return HCCL_SUCCESS;
}

HcclResult hccl_exchange(hccl_round *round)
{
    hccl_comm *comm = round->comm;
    double deadline = sim_seconds() + comm->timeout;

    for (;;) {
        const hccl_transfer *last;
        HcclResult result;
        bool moved;

        if ((result = advance_all(round, &moved, &last)))
            return result;
        if (!last)
            break;
        if (moved)
            deadline = sim_seconds() + comm->timeout;
        (void)poll(comm->watched, comm->size, sim_milliseconds_until(deadline));
        if (sim_seconds() >= deadline)
            return sim_fail(round->function, HCCL_E_TIMEOUT, "nothing has moved for %g s; rank %u is waited for",
                            comm->timeout, last->peer);
    }
    round->count = 0;
    return HCCL_SUCCESS;
}
