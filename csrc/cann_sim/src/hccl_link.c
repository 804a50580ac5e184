#include "hccl_link.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "errors.h"

#define FRAME_MAGIC 0x4c434348u
#define HELLO_MAGIC "cannsim1"
#define SOCKET_BUFFER (4 << 20) /* a wish; fewer, larger steps */
#define HELLO_SECONDS 1.0       /* for who has connected: it sends its hello at once */
#define RETRY_SECONDS 0.005     /* until a peer listens */

typedef struct {
    char magic[8];
    unsigned char nonce[HCCL_NONCE_BYTES];
    uint32_t size, from, to;
} hello;

typedef enum { WELCOME = 1, WRONG_SIZE, TAKEN } verdict;

typedef struct {
    const char *function;
    hccl_comm *comm;
    double deadline;
} attempt;

double hccl_now(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static int milliseconds_until(double deadline)
{
    double left = ceil((deadline - hccl_now()) * 1000);

    return left <= 0 ? 0 : left > 1e6 ? 1000000 : (int)left;
}

/* The address at which a rank waits for the others: known to who knows the nonce. */
static socklen_t address_of(struct sockaddr_un *address, const unsigned char *nonce, uint32_t rank)
{
    char *name = address->sun_path + 1; /* a leading zero: not in the file system */
    int used = sprintf(name, "cann_sim.");

    memset(address->sun_path, 0, 1);
    address->sun_family = AF_UNIX;
    for (int i = 0; i < HCCL_NONCE_BYTES; i++)
        used += sprintf(name + used, "%02x", nonce[i]);
    used += sprintf(name + used, ".%u", rank);
    return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)used);
}

static int new_socket(void)
{
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), size = SOCKET_BUFFER;

    if (fd >= 0)
        (void)setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    return fd;
}

/* Moves a whole small message before the deadline. */
static bool move(int fd, void *data, size_t length, bool outgoing, double deadline)
{
    size_t done = 0;

    while (done < length) {
        struct pollfd watched = {fd, outgoing ? POLLOUT : POLLIN, 0};
        char *place = (char *)data + done;
        ssize_t moved = outgoing ? send(fd, place, length - done, MSG_NOSIGNAL) : recv(fd, place, length - done, 0);

        if (moved > 0) {
            done += (size_t)moved;
        } else if (!moved || (errno != EAGAIN && errno != EINTR)) {
            return false;
        } else {
            int left = milliseconds_until(deadline);

            if (!left)
                return false;
            (void)poll(&watched, 1, left);
        }
    }
    return true;
}

/* Waits for connections at this rank's address. */
static HcclResult listen_at(const attempt *attempt, const unsigned char *nonce, int *listener)
{
    struct sockaddr_un address;
    socklen_t length = address_of(&address, nonce, attempt->comm->rank);
    int fd = new_socket();
    HcclResult result;

    if (fd >= 0 && !bind(fd, (struct sockaddr *)&address, length) && !listen(fd, (int)attempt->comm->size)) {
        *listener = fd;
        return HCCL_SUCCESS;
    }
    result = errno == EADDRINUSE ? HCCL_E_PARA : HCCL_E_SYSCALL;
    sim_fail(attempt->function, (int)result, "rank %u cannot wait for the others: %s", attempt->comm->rank,
             errno == EADDRINUSE ? "another process has this rank" : strerror(errno));
    if (fd >= 0)
        close(fd);
    return result;
}

/* Connects to a lower rank, as soon as it listens. */
static HcclResult call(const attempt *attempt, const unsigned char *nonce, uint32_t peer)
{
    hccl_comm *comm = attempt->comm;
    struct sockaddr_un address;
    socklen_t length = address_of(&address, nonce, peer);
    hello greeting = {HELLO_MAGIC, {0}, comm->size, comm->rank, peer};
    unsigned char answer;
    int fd = -1;

    memcpy(greeting.nonce, nonce, HCCL_NONCE_BYTES);
    for (;;) {
        if (fd < 0 && (fd = new_socket()) < 0)
            return sim_fail(attempt->function, HCCL_E_SYSCALL, "socket: %s", strerror(errno));
        if (!connect(fd, (struct sockaddr *)&address, length))
            break;
        if (errno != ECONNREFUSED && errno != EAGAIN && errno != EINTR) {
            int error = errno;

            close(fd);
            return sim_fail(attempt->function, HCCL_E_SYSCALL, "connect to rank %u: %s", peer, strerror(error));
        }
        if (!milliseconds_until(attempt->deadline)) {
            close(fd);
            return sim_fail(attempt->function, HCCL_E_TIMEOUT, "rank %u did not come", peer);
        }
        nanosleep(&(struct timespec){0, (long)(RETRY_SECONDS * 1e9)}, NULL);
    }
    comm->sockets[peer] = fd;
    if (!move(fd, &greeting, sizeof greeting, true, attempt->deadline) ||
        !move(fd, &answer, sizeof answer, false, attempt->deadline)) {
        if (!milliseconds_until(attempt->deadline))
            return sim_fail(attempt->function, HCCL_E_TIMEOUT, "rank %u did not answer", peer);
        return sim_fail(attempt->function, HCCL_E_REMOTE, "rank %u gave up", peer);
    }
    if (answer == WELCOME)
        return HCCL_SUCCESS;
    return sim_fail(attempt->function, HCCL_E_PARA, "rank %u refuses: %s", peer,
                    answer == WRONG_SIZE ? "it was given another number of ranks" : "another process has this rank");
}

/* Takes a connection of a higher rank. A stranger's is dropped. Fails if the peer's idea of the group is another. */
static HcclResult answer(const attempt *attempt, int listener, const unsigned char *nonce)
{
    hccl_comm *comm = attempt->comm;
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK), size = SOCKET_BUFFER;
    unsigned char verdict = WELCOME;
    hello greeting;

    if (fd < 0)
        return HCCL_SUCCESS; /* it has changed its mind */
    if (!move(fd, &greeting, sizeof greeting, false, fmin(attempt->deadline, hccl_now() + HELLO_SECONDS)) ||
        memcmp(greeting.magic, HELLO_MAGIC, sizeof greeting.magic) || memcmp(greeting.nonce, nonce, HCCL_NONCE_BYTES) ||
        greeting.to != comm->rank) {
        close(fd);
        return HCCL_SUCCESS;
    }
    (void)setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    if (greeting.size != comm->size)
        verdict = WRONG_SIZE;
    else if (greeting.from <= comm->rank || greeting.from >= comm->size || comm->sockets[greeting.from] >= 0)
        verdict = TAKEN;
    if (move(fd, &verdict, sizeof verdict, true, attempt->deadline) && verdict == WELCOME) {
        comm->sockets[greeting.from] = fd;
        return HCCL_SUCCESS;
    }
    close(fd);
    if (verdict == WRONG_SIZE)
        return sim_fail(attempt->function, HCCL_E_PARA, "rank %u was given %u ranks, rank %u was given %u", comm->rank,
                        comm->size, greeting.from, greeting.size);
    return HCCL_SUCCESS;
}

static HcclResult answer_all(const attempt *attempt, int listener, const unsigned char *nonce)
{
    hccl_comm *comm = attempt->comm;

    for (;;) {
        struct pollfd watched = {listener, POLLIN, 0};
        uint32_t missing = comm->rank + 1;
        HcclResult result;
        int left;

        while (missing < comm->size && comm->sockets[missing] >= 0)
            missing++;
        if (missing == comm->size)
            return HCCL_SUCCESS;
        if (!(left = milliseconds_until(attempt->deadline)))
            return sim_fail(attempt->function, HCCL_E_TIMEOUT, "rank %u did not come", missing);
        if (poll(&watched, 1, left) > 0 && (result = answer(attempt, listener, nonce)))
            return result;
    }
}

/* All ranks tell each other that they are ready: the group exists for all, or for none. */
static HcclResult confirm(const attempt *attempt)
{
    hccl_comm *comm = attempt->comm;
    hccl_transfer *transfers = calloc(2 * (size_t)comm->size, sizeof *transfers);
    double timeout = comm->timeout;
    size_t count = 0;
    HcclResult result;

    if (!transfers)
        return hccl_no_memory(attempt->function);
    for (uint32_t peer = 0; peer < comm->size; peer++)
        if (peer != comm->rank) {
            transfers[count++] = (hccl_transfer){.peer = peer, .outgoing = true};
            transfers[count++] = (hccl_transfer){.peer = peer};
        }
    comm->timeout = fmax(attempt->deadline - hccl_now(), 0.001);
    result = hccl_exchange(attempt->function, comm, (hccl_tag){HCCL_KIND_INIT, 0, 0}, transfers, count);
    comm->timeout = timeout;
    free(transfers);
    return result;
}

HcclResult hccl_connect(const char *function, hccl_comm *comm, const unsigned char nonce[HCCL_NONCE_BYTES],
                        double timeout)
{
    attempt attempt = {function, comm, hccl_now() + timeout};
    HcclResult result;
    int listener;

    if (comm->size == 1)
        return HCCL_SUCCESS;
    if ((result = listen_at(&attempt, nonce, &listener)))
        return result;
    for (uint32_t peer = 0; peer < comm->rank && !result; peer++)
        result = call(&attempt, nonce, peer);
    if (!result)
        result = answer_all(&attempt, listener, nonce);
    close(listener);
    return result ? result : confirm(&attempt);
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

static HcclResult check_header(const char *function, const hccl_transfer *transfer, hccl_tag tag)
{
    const hccl_frame *header = &transfer->header;

    if (header->magic == FRAME_MAGIC && header->tag.kind == HCCL_KIND_GOODBYE)
        return sim_fail(function, HCCL_E_REMOTE, "rank %u has destroyed its communicator", transfer->peer);
    if (header->magic == FRAME_MAGIC && !memcmp(&header->tag, &tag, sizeof tag) && header->length == transfer->length)
        return HCCL_SUCCESS;
    return sim_fail(function, HCCL_E_PARA,
                    "rank %u does a %s of %llu bytes (type %u, root or operation %u), this rank a %s of %zu (%u, %u)",
                    transfer->peer, name_of(header->tag.kind), (unsigned long long)header->length, header->tag.type,
                    header->tag.detail, name_of(tag.kind), transfer->length, tag.type, tag.detail);
}

/* Moves what can be moved of a transfer without waiting; returns the bytes, 0 if none, or -1 with `result` set. */
static ssize_t advance(const char *function, hccl_comm *comm, hccl_tag tag, hccl_transfer *transfer, HcclResult *result)
{
    size_t header_done = transfer->done < sizeof transfer->header ? transfer->done : sizeof transfer->header;
    size_t data_done = transfer->done - header_done;
    struct iovec parts[2] = {
        {(char *)&transfer->header + header_done, sizeof transfer->header - header_done},
        {transfer->data ? (char *)transfer->data + data_done : NULL, transfer->length - data_done},
    };
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
    int fd = comm->sockets[transfer->peer];
    ssize_t moved;

    if (transfer->outgoing && !transfer->done)
        transfer->header = (hccl_frame){FRAME_MAGIC, tag, 0, transfer->length};
    moved = transfer->outgoing ? sendmsg(fd, &message, MSG_NOSIGNAL) : recvmsg(fd, &message, 0);
    if (moved < 0 && (errno == EAGAIN || errno == EINTR))
        return 0;
    if (moved < 0 && errno != EPIPE && errno != ECONNRESET) {
        *result = sim_fail(function, HCCL_E_SYSCALL, "rank %u: %s", transfer->peer, strerror(errno));
        return -1;
    }
    if (moved <= 0) {
        *result = sim_fail(function, HCCL_E_REMOTE, "rank %u is gone", transfer->peer);
        return -1;
    }
    transfer->done += (size_t)moved;
    if (!transfer->outgoing && header_done < sizeof transfer->header && transfer->done >= sizeof transfer->header &&
        (*result = check_header(function, transfer, tag)))
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

HcclResult hccl_exchange(const char *function, hccl_comm *comm, hccl_tag tag, hccl_transfer *transfers, size_t count)
{
    double deadline = hccl_now() + comm->timeout;
    HcclResult result = HCCL_SUCCESS;

    for (;;) {
        size_t unfinished = 0, waiting = 0;
        bool moved = false;

        for (uint32_t peer = 0; peer < comm->size; peer++)
            comm->watched[peer] = (struct pollfd){-1, 0, 0};
        comm->watched[comm->size] = (struct pollfd){comm->wake, POLLIN, 0};
        for (size_t i = 0; i < count; i++) {
            hccl_transfer *transfer = &transfers[i];

            while (!is_done(transfer) && !must_wait(comm, transfer)) {
                ssize_t bytes = advance(function, comm, tag, transfer, &result);

                if (bytes < 0)
                    return result;
                if (!bytes)
                    watch(comm, transfer);
                else
                    moved = true;
            }
            if (!is_done(transfer)) {
                unfinished++;
                waiting = i;
            }
        }
        if (!unfinished)
            return HCCL_SUCCESS;
        if (moved)
            deadline = hccl_now() + comm->timeout;
        if (poll(comm->watched, comm->size + 1, milliseconds_until(deadline)) > 0 && comm->watched[comm->size].revents)
            return sim_fail(function, HCCL_E_UNAVAIL, "the communicator is being destroyed");
        if (hccl_now() >= deadline)
            return sim_fail(function, HCCL_E_TIMEOUT, "nothing has moved for %g s; rank %u is waited for",
                            comm->timeout, transfers[waiting].peer);
    }
}

void hccl_disconnect(hccl_comm *comm, bool politely)
{
    hccl_frame goodbye = {FRAME_MAGIC, {HCCL_KIND_GOODBYE, 0, 0}, 0, 0};

    for (uint32_t peer = 0; peer < comm->size; peer++) {
        if (comm->sockets[peer] < 0)
            continue;
        if (politely)
            (void)send(comm->sockets[peer], &goodbye, sizeof goodbye, MSG_NOSIGNAL);
        close(comm->sockets[peer]);
        comm->sockets[peer] = -1;
    }
}

int hccl_find_dead_peer(const hccl_comm *comm)
{
    for (uint32_t peer = 0; peer < comm->size; peer++) {
        hccl_frame frame;
        ssize_t seen;

        if (comm->sockets[peer] < 0)
            continue;
        seen = recv(comm->sockets[peer], &frame, sizeof frame, MSG_PEEK);
        if (!seen || (seen < 0 && errno == ECONNRESET))
            return (int)peer;
    }
    return -1;
}
