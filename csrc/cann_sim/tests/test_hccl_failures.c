#include <dirent.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#include "children.h"
#include "hccl_api.h"

static HcclRootInfo root;
static HcclComm comm;
static uint8_t *buffer;

enum { BYTES = 8 << 20 }; /* more than any socket buffers */

/* Seconds: the margins are for a machine that is busy. */
#define TIMEOUT 2.0
#define SOON 1.5           /* what is noticed at once */
#define LATE (TIMEOUT + 2) /* what needs the timeout */

static void wait_for(double seconds)
{
    usleep((useconds_t)(seconds * 1e6));
}

static double now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static void join(unsigned rank, unsigned size)
{
    aclrtSetDevice((int)rank);
    aclrtMalloc((void **)&buffer, BYTES, ACL_MEM_MALLOC_HUGE_FIRST);
    CHECK("the communicator is made", !HcclCommInitRootInfo(size, &root, rank, &comm));
}

static void leave(void)
{
    CHECK("the communicator can be destroyed", !HcclCommDestroy(comm));
    aclrtFree(buffer);
}

static HcclResult async_error(void)
{
    HcclResult error = HCCL_E_INTERNAL;

    return HcclGetCommAsyncError(comm, &error) ? HCCL_E_INTERNAL : error;
}

static HcclResult all_reduce(void)
{
    return HcclAllReduce(buffer, buffer, BYTES / 4, HCCL_DATA_TYPE_FP32, HCCL_REDUCE_SUM, comm, NULL);
}

/* Whether a new communicator of the ranks that are left works. */
static void go_on(unsigned rank, unsigned size)
{
    HcclRootInfo next = root;

    next.internal[20] ^= 1;
    CHECK("a new communicator works",
          !HcclCommInitRootInfo(size, &next, rank, &comm) && !all_reduce() && async_error() == HCCL_SUCCESS);
}

static void dies_before(unsigned rank, unsigned size)
{
    double start;

    join(rank, size);
    HcclBarrier(comm, NULL);
    if (rank == size - 1)
        raise(SIGKILL);
    start = now();
    CHECK("a collective with the dead fails", all_reduce() == HCCL_E_REMOTE);
    CHECK("and at once", now() - start < SOON);
    CHECK("the message says who", strstr(aclGetRecentErrMsg(), "gone"));
    CHECK("the communicator says so, too", async_error() == HCCL_E_REMOTE);
    CHECK("it is of no more use", HcclBarrier(comm, NULL) == HCCL_E_REMOTE);
    leave();
    aclrtMalloc((void **)&buffer, BYTES, ACL_MEM_MALLOC_HUGE_FIRST);
    go_on(rank, size - 1);
    leave();
}

static void *kill_soon(void *argument)
{
    (void)argument;
    usleep(200000);
    raise(SIGKILL);
    return NULL;
}

static void dies_in_the_middle(unsigned rank, unsigned size)
{
    pthread_t thread;
    double start = now();
    HcclResult result = HCCL_SUCCESS;

    join(rank, size);
    if (!rank) { /* receives for as long as it lives, and is slow */
        pthread_create(&thread, NULL, kill_soon, NULL);
        for (;;) {
            HcclRecv(buffer, BYTES, HCCL_DATA_TYPE_UINT8, 1, comm, NULL);
            usleep(10000);
        }
    }
    while (!result && now() - start < 20)
        result = HcclSend(buffer, BYTES, HCCL_DATA_TYPE_UINT8, 0, comm, NULL);
    CHECK("to send to the dead fails", result == HCCL_E_REMOTE && now() - start < 10);
    CHECK("the communicator says so, too", async_error() == HCCL_E_REMOTE);
    leave();
}

static void stays_away(unsigned rank, unsigned size)
{
    double start;

    join(rank, size);
    HcclBarrier(comm, NULL);
    start = now();
    if (rank == size - 1) {
        wait_for(TIMEOUT + 0.6);
        CHECK("who comes late is told", all_reduce() == HCCL_E_REMOTE);
    } else {
        CHECK("to wait too long fails",
              all_reduce() == (rank ? HCCL_E_REMOTE : HCCL_E_TIMEOUT) || async_error() == HCCL_E_TIMEOUT);
        CHECK("after the timeout", now() - start > TIMEOUT - 0.1 && now() - start < LATE);
        CHECK("the communicator says so, too", async_error() != HCCL_SUCCESS);
    }
    leave();
    aclrtMalloc((void **)&buffer, BYTES, ACL_MEM_MALLOC_HUGE_FIRST);
    go_on(rank, size);
    leave();
}

static void slow_is_not_dead(unsigned rank, unsigned size)
{
    join(rank, size);
    for (int i = 0; i < 3; i++) {
        wait_for(rank ? TIMEOUT / 2 : 0);
        CHECK("a pause below the timeout is no failure", !HcclBarrier(comm, NULL));
    }
    leave();
}

static void never_comes(unsigned rank, unsigned size)
{
    double start = now();
    HcclResult result;

    if (rank == size - 1)
        return;
    aclrtSetDevice((int)rank);
    result = HcclCommInitRootInfo(size, &root, rank, &comm);
    CHECK("a communicator without all its ranks is none", result == HCCL_E_TIMEOUT || result == HCCL_E_REMOTE);
    CHECK("nobody waits for ever", now() - start > TIMEOUT - 0.1 && now() - start < LATE);
}

static void dies_while_joining(unsigned rank, unsigned size)
{
    pthread_t thread;
    double start;

    aclrtSetDevice((int)rank);
    if (rank == 1) {
        pthread_create(&thread, NULL, kill_soon, NULL); /* while it waits for the last rank */
    } else if (rank == size - 1) {
        usleep(500000);
    }
    start = now();
    CHECK("a rank that died while joining is missed", HcclCommInitRootInfo(size, &root, rank, &comm) != HCCL_SUCCESS);
    CHECK("nobody waits for ever", now() - start < LATE);
}

static void disagree(unsigned rank, unsigned size)
{
    HcclResult result;

    aclrtSetDevice((int)rank);
    result = HcclCommInitRootInfo(rank ? size + 1 : size, &root, rank, &comm);
    CHECK("ranks that disagree about their number are told", result == HCCL_E_PARA);
}

static void same_rank(unsigned rank, unsigned size)
{
    double start = now();
    HcclResult result;

    (void)size;
    aclrtSetDevice((int)rank);
    result = HcclCommInitRootInfo(2, &root, 0, &comm);
    CHECK("a rank is there once", result == HCCL_E_PARA || (result == HCCL_E_TIMEOUT && now() - start > TIMEOUT - 0.1));
}

static void different_things(unsigned rank, unsigned size)
{
    HcclResult result;

    join(rank, size);
    result = rank ? HcclBroadcast(buffer, 16, HCCL_DATA_TYPE_UINT8, 0, comm, NULL)
                  : HcclAllReduce(buffer, buffer, 4, HCCL_DATA_TYPE_FP32, HCCL_REDUCE_SUM, comm, NULL);
    CHECK("ranks that do different things are told", result == HCCL_E_PARA || result == HCCL_E_REMOTE);
    leave();
}

static void different_lengths(unsigned rank, unsigned size)
{
    const char *text;
    HcclResult result;

    join(rank, size);
    result = rank ? HcclRecv(buffer, 15, HCCL_DATA_TYPE_UINT8, 0, comm, NULL)
                  : HcclSend(buffer, 16, HCCL_DATA_TYPE_UINT8, 1, comm, NULL);
    CHECK("a receive that is not as long as the send is told", result == (rank ? HCCL_E_PARA : HCCL_SUCCESS));
    text = aclGetRecentErrMsg();
    CHECK("the message says what both do", !rank || (strstr(text, "16 bytes") && strstr(text, "of 15")));
    leave();
}

static void leaves_early(unsigned rank, unsigned size)
{
    join(rank, size);
    if (rank) {
        CHECK("a send and good-bye", !HcclSend(buffer, 64, HCCL_DATA_TYPE_UINT8, 0, comm, NULL));
    } else {
        usleep(300000);
        CHECK("what was sent is there", !HcclRecv(buffer, 64, HCCL_DATA_TYPE_UINT8, 1, comm, NULL));
        CHECK("who left politely is no failure", async_error() == HCCL_SUCCESS && async_error() == HCCL_SUCCESS);
        CHECK("but does not answer", HcclRecv(buffer, 64, HCCL_DATA_TYPE_UINT8, 1, comm, NULL) == HCCL_E_REMOTE);
        CHECK("as the message says", strstr(aclGetRecentErrMsg(), "has destroyed its communicator"));
    }
    leave();
}

static void idle(unsigned rank, unsigned size)
{
    double start;

    join(rank, size);
    HcclBarrier(comm, NULL);
    if (rank)
        raise(SIGKILL);
    usleep(200000);
    start = now();
    CHECK("a death is not told at once, in case all end", async_error() == HCCL_SUCCESS);
    while (async_error() == HCCL_SUCCESS && now() - start < 10)
        usleep(50000);
    CHECK("but after the timeout, with nothing under way",
          async_error() == HCCL_E_REMOTE && now() - start > TIMEOUT - 0.1 && now() - start < LATE);
    leave();
}

static int about_to_destroy[2]; /* a pipe from one rank to the other */

static void *destroy_soon(void *argument)
{
    usleep(200000);
    if (write(about_to_destroy[1], "x", 1) == 1)
        *(HcclResult *)argument = HcclCommDestroy(comm);
    return NULL;
}

static void destroyed_meanwhile(unsigned rank, unsigned size)
{
    HcclResult destroyed = HCCL_E_INTERNAL;
    pthread_t thread;
    char byte;

    join(rank, size);
    memset(buffer, (int)rank, BYTES);
    if (rank) {
        CHECK("the other destroys", read(about_to_destroy[0], &byte, 1) == 1);
        usleep(300000);
        CHECK("it still receives", !HcclSend(buffer, BYTES, HCCL_DATA_TYPE_UINT8, 0, comm, NULL));
        leave();
        return;
    }
    pthread_create(&thread, NULL, destroy_soon, &destroyed);
    CHECK("an operation under way is not ended with its communicator",
          !HcclRecv(buffer, BYTES, HCCL_DATA_TYPE_UINT8, 1, comm, NULL) && buffer[BYTES - 1] == 1);
    pthread_join(thread, NULL);
    CHECK("which is destroyed after that", !destroyed);
    aclrtFree(buffer);
}

static int open_files(void)
{
    DIR *directory = opendir("/proc/self/fd");
    int count = 0;

    while (directory && readdir(directory))
        count++;
    closedir(directory);
    return count;
}

static void nothing_stays_open(unsigned rank, unsigned size)
{
    int before = 0;

    aclrtSetDevice((int)rank);
    for (int i = 0; i < 20; i++) {
        CHECK("communicators come and go",
              !HcclCommInitRootInfo(size, &root, rank, &comm) && !HcclBarrier(comm, NULL) && !HcclCommDestroy(comm));
        before = before ? before : open_files();
    }
    CHECK("nothing stays open", open_files() == before);
}

static void lives_on(unsigned rank, unsigned size)
{
    join(rank, size);
    HcclBarrier(comm, NULL);
    pause();
}

/* Sockets of a process. Another run of the tests has sockets of other processes. */
static int sockets(pid_t process)
{
    FILE *file = fopen("/proc/net/unix", "r");
    char line[512], part[32];
    int count = 0;

    snprintf(part, sizeof part, ".%d.", (int)process);
    while (file && fgets(line, sizeof line, file))
        count += strstr(line, "@cann_sim_machine.") && strstr(line, part);
    if (file)
        fclose(file);
    return count;
}

static int entries(const char *path)
{
    DIR *directory = opendir(path);
    struct dirent *entry;
    int count = 0;

    while (directory && (entry = readdir(directory)))
        count += strstr(entry->d_name, "cann_sim") || strstr(entry->d_name, "hccl");
    if (directory)
        closedir(directory);
    return count;
}

static void kill_all(void)
{
    pid_t children[3];
    int status, alive = 0, left = 0, before = entries("/dev/shm") + entries("/tmp");

    for (unsigned rank = 0; rank < 3; rank++)
        children[rank] = start_child(lives_on, rank, 3);
    usleep(500000);
    for (unsigned rank = 0; rank < 3; rank++)
        alive += sockets(children[rank]);
    for (unsigned rank = 0; rank < 3; rank++)
        kill(children[rank], SIGKILL);
    for (unsigned rank = 0; rank < 3; rank++) {
        waitpid(children[rank], &status, 0);
        left += sockets(children[rank]);
    }
    CHECK("ranks that live have sockets", alive == 3);
    CHECK("nothing is left of those that were killed", !left && entries("/dev/shm") + entries("/tmp") == before);
}

/* Runs ranks of which one kills itself. */
static bool all_but_one(void (*body)(unsigned rank, unsigned size), unsigned size)
{
    return run_ranks(body, size) == size - 1;
}

int main(void)
{
    setenv("CANN_SIM_DEVICES", "8", 1);
    setenv("CANN_SIM_HCCL_TIMEOUT", "2", 1); /* TIMEOUT */
    HcclGetRootInfo(&root);
    CHECK("there is a pipe", !pipe(about_to_destroy));
    CHECK("dies before", all_but_one(dies_before, 2));
    CHECK("one of four dies before", all_but_one(dies_before, 4));
    CHECK("dies in the middle", all_but_one(dies_in_the_middle, 2));
    CHECK("stays away", run_ranks(stays_away, 2) == 2);
    CHECK("one of three stays away", run_ranks(stays_away, 3) == 3);
    CHECK("slow is not dead", run_ranks(slow_is_not_dead, 2) == 2);
    CHECK("never comes", run_ranks(never_comes, 3) == 3);
    CHECK("dies while joining", all_but_one(dies_while_joining, 3));
    CHECK("disagree", run_ranks(disagree, 2) == 2);
    CHECK("same rank", run_ranks(same_rank, 2) == 2);
    CHECK("different things", run_ranks(different_things, 2) == 2);
    CHECK("different lengths", run_ranks(different_lengths, 2) == 2);
    CHECK("leaves early", run_ranks(leaves_early, 2) == 2);
    CHECK("idle", all_but_one(idle, 2));
    CHECK("destroyed meanwhile", run_ranks(destroyed_meanwhile, 2) == 2);
    CHECK("nothing stays open", run_ranks(nothing_stays_open, 3) == 3);
    kill_all();
    return REPORT();
}
