#include "hccl_link.h"

#include <errno.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "clock.h"
#include "errors.h"
#include "hccl_round.h"

#define HELLO_MAGIC "cannsim1"
#define SOCKET_BUFFER (4 << 20) /* asked for, not promised: fewer and larger steps */
#define HELLO_SECONDS 1.0       /* for a peer that has connected: it sends its hello at once */
#define RETRY_SECONDS 0.005     /* until a peer listens */

typedef struct {
    char magic[8];
    unsigned char nonce[HCCL_NONCE_BYTES];
    uint32_t size, from, to;
} hello;

enum { WELCOME = 1, WRONG_SIZE, TAKEN }; /* a byte that answers a hello */

typedef struct {
    const char *function;
    hccl_comm *comm;
    const unsigned char *nonce;
    double deadline;
} joining;

/* The address at which a rank waits for the others, which only those who know the nonce can tell. */
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
            int left = sim_milliseconds_until(deadline);

            if (!left)
                return false;
            (void)poll(&watched, 1, left);
        }
    }
    return true;
}

/* Waits for connections at this rank's address. */
static HcclResult listen_at(const joining *attempt, int *listener)
{
    struct sockaddr_un address;
    socklen_t length = address_of(&address, attempt->nonce, attempt->comm->rank);
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

/* Connects to a lower rank, as soon as it listens, and enters the connection. */
static HcclResult dial(const joining *attempt, uint32_t peer)
{
    struct sockaddr_un address;
    socklen_t length = address_of(&address, attempt->nonce, peer);
    int fd = new_socket();

    if (fd < 0)
        return sim_fail(attempt->function, HCCL_E_SYSCALL, "socket: %s", strerror(errno));
    attempt->comm->sockets[peer] = fd;
    while (connect(fd, (struct sockaddr *)&address, length)) {
        if (errno != ECONNREFUSED && errno != EAGAIN && errno != EINTR)
            return sim_fail(attempt->function, HCCL_E_SYSCALL, "connect to rank %u: %s", peer, strerror(errno));
        if (!sim_milliseconds_until(attempt->deadline))
            return sim_fail(attempt->function, HCCL_E_TIMEOUT, "rank %u did not come", peer);
        nanosleep(&(struct timespec){0, (long)(RETRY_SECONDS * 1e9)}, NULL);
    }
    return HCCL_SUCCESS;
}

/* Connects to a lower rank and says which rank this is. */
static HcclResult call(const joining *attempt, uint32_t peer)
{
    const hccl_comm *comm = attempt->comm;
    hello greeting = {HELLO_MAGIC, {0}, comm->size, comm->rank, peer};
    unsigned char verdict;
    HcclResult result;

    if ((result = dial(attempt, peer)))
        return result;
    memcpy(greeting.nonce, attempt->nonce, HCCL_NONCE_BYTES);
    if (!move(comm->sockets[peer], &greeting, sizeof greeting, true, attempt->deadline) ||
        !move(comm->sockets[peer], &verdict, sizeof verdict, false, attempt->deadline)) {
        if (!sim_milliseconds_until(attempt->deadline))
            return sim_fail(attempt->function, HCCL_E_TIMEOUT, "rank %u did not answer", peer);
        return sim_fail(attempt->function, HCCL_E_REMOTE, "rank %u gave up", peer);
    }
    if (verdict == WELCOME)
        return HCCL_SUCCESS;
    return sim_fail(attempt->function, HCCL_E_PARA, "rank %u refuses: %s", peer,
                    verdict == WRONG_SIZE ? "it was given another number of ranks" : "another process has this rank");
}

static bool is_known(const joining *attempt, const hello *greeting)
{
    return !memcmp(greeting->magic, HELLO_MAGIC, sizeof greeting->magic) &&
           !memcmp(greeting->nonce, attempt->nonce, HCCL_NONCE_BYTES) && greeting->to == attempt->comm->rank;
}

static unsigned char judge(const hccl_comm *comm, const hello *greeting)
{
    if (greeting->size != comm->size)
        return WRONG_SIZE;
    if (greeting->from <= comm->rank || greeting->from >= comm->size || comm->sockets[greeting->from] >= 0)
        return TAKEN;
    return WELCOME;
}

/* Takes a connection of a higher rank. A stranger's is dropped. Fails if the peer was given another number of ranks. */
static HcclResult answer(const joining *attempt, int listener)
{
    hccl_comm *comm = attempt->comm;
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK), size = SOCKET_BUFFER;
    unsigned char verdict;
    hello greeting;

    if (fd < 0)
        return HCCL_SUCCESS; /* it has changed its mind */
    if (!move(fd, &greeting, sizeof greeting, false, fmin(attempt->deadline, sim_seconds() + HELLO_SECONDS)) ||
        !is_known(attempt, &greeting)) {
        close(fd);
        return HCCL_SUCCESS;
    }
    (void)setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    verdict = judge(comm, &greeting);
    if (move(fd, &verdict, sizeof verdict, true, attempt->deadline) && verdict == WELCOME) {
        comm->sockets[greeting.from] = fd;
        return HCCL_SUCCESS;
    }
    close(fd);
    if (verdict != WRONG_SIZE)
        return HCCL_SUCCESS;
    return sim_fail(attempt->function, HCCL_E_PARA, "rank %u was given %u ranks, rank %u was given %u", comm->rank,
                    comm->size, greeting.from, greeting.size);
}

static HcclResult answer_all(const joining *attempt, int listener)
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
        if (!(left = sim_milliseconds_until(attempt->deadline)))
            return sim_fail(attempt->function, HCCL_E_TIMEOUT, "rank %u did not come", missing);
        if (poll(&watched, 1, left) > 0 && (result = answer(attempt, listener)))
            return result;
    }
}

/* All ranks tell each other that they are ready: the group exists for all, or for none. */
static HcclResult confirm(const joining *attempt)
{
    hccl_comm *comm = attempt->comm;
    double timeout = comm->timeout;
    HcclResult result;
    hccl_round round;

    if ((result = hccl_open_round(&round, attempt->function, comm, (hccl_tag){HCCL_KIND_INIT, 0, 0}, 2 * comm->size)))
        return result;
    hccl_greet_all(&round);
    comm->timeout = fmax(attempt->deadline - sim_seconds(), 0.001);
    result = hccl_exchange(&round);
    comm->timeout = timeout;
    hccl_close_round(&round);
    return result;
}

/* With connections awaited at `listener`: calls the lower ranks, then answers the higher ones. */
static HcclResult meet_all(const joining *attempt, int listener)
{
    HcclResult result;

    for (uint32_t peer = 0; peer < attempt->comm->rank; peer++)
        if ((result = call(attempt, peer)))
            return result;
    return answer_all(attempt, listener);
}

HcclResult hccl_connect(const char *function, hccl_comm *comm, const unsigned char nonce[HCCL_NONCE_BYTES],
                        double timeout)
{
    joining attempt = {function, comm, nonce, sim_seconds() + timeout};
    HcclResult result;
    int listener;

    if (comm->size == 1)
        return HCCL_SUCCESS;
    if ((result = listen_at(&attempt, &listener)))
        return result;
    result = meet_all(&attempt, listener);
    close(listener);
    return result ? result : confirm(&attempt);
}

void hccl_disconnect(hccl_comm *comm, bool politely)
{
    hccl_frame goodbye = {HCCL_FRAME_MAGIC, {HCCL_KIND_GOODBYE, 0, 0}, 0, 0};

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
