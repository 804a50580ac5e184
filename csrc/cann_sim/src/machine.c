#include "machine.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "clock.h"
#include "config.h"
#include "errors.h"

#define MAX_PROCESSES 256
#define JOIN_SECONDS 10.0   /* joining takes a millisecond; a stopped process may be in the way */
#define RETRY_SECONDS 0.001 /* while another process joins */
#define KEY_CHARACTERS 16

typedef struct {
    int pid;                                      /* 0: free */
    int file;                                     /* the table's, in that process */
    size_t taken[SIM_RESOURCES][SIM_MAX_DEVICES]; /* by the device's number in the machine */
} slot;

/* The mutex guards everything else. It is robust: only sums are derived from the slots, so a process that dies with it
 * leaves nothing half done. */
typedef struct {
    pthread_mutex_t lock;
    int used; /* no slot from here on was ever taken */
    slot slots[MAX_PROCESSES];
} table;

static pthread_mutex_t joining = PTHREAD_MUTEX_INITIALIZER; /* for what follows, all of which is set once */
static char key[KEY_CHARACTERS + 1];
static table *shared;
static slot *mine;
static int table_file = -1, life_line = -1;

static void hash(uint64_t *sum, const void *data, size_t length)
{
    const unsigned char *bytes = data;

    for (size_t i = 0; i < length; i++)
        *sum = (*sum ^ bytes[i]) * 0x100000001b3; /* FNV-1a */
}

/* Processes are on one machine if they agree about it: its name, its devices, and the simulator itself. Those of other
 * users and other containers cannot be looked into. */
static void set_key(void)
{
    const sim_config *settings = sim_settings();
    uint64_t sum = 0xcbf29ce484222325;
    uid_t user = geteuid();
    struct stat space = {0};
    Dl_info library;

    (void)stat("/proc/self/ns/pid", &space);
    hash(&sum, &space.st_ino, sizeof space.st_ino);
    hash(&sum, &user, sizeof user);
    if (dladdr((void *)&set_key, &library) && library.dli_fname)
        hash(&sum, library.dli_fname, strlen(library.dli_fname) + 1);
    hash(&sum, settings->machine, strlen(settings->machine) + 1);
    hash(&sum, &settings->machine_devices, sizeof settings->machine_devices);
    hash(&sum, &settings->memory, sizeof settings->memory);
    snprintf(key, sizeof key, "%016llx", (unsigned long long)sum);
}

/* A socket with a name outside of the file system; -1 with `errno`, which is EADDRINUSE if a living process has it. */
static int bind_name(const char *name)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    size_t length = strlen(name);
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0), error;

    memcpy(address.sun_path + 1, name, length);
    if (fd < 0 ||
        !bind(fd, (struct sockaddr *)&address, (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + length)))
        return fd;
    error = errno;
    close(fd);
    errno = error;
    return -1;
}

static void name_of(char name[64], int place, int pid, int file)
{
    snprintf(name, 64, "cann_sim_machine.%s.%d.%d.%d", key, pid, file, place);
}

static bool is_alive(int place)
{
    const slot *entry = &shared->slots[place];
    char name[64];
    int fd;

    name_of(name, place, entry->pid, entry->file);
    if ((fd = bind_name(name)) < 0)
        return true;
    close(fd);
    return false;
}

/* With the table's lock held: empties the slots of processes that have died. */
static void bury_the_dead(void)
{
    for (int place = 0; place < shared->used; place++)
        if (shared->slots[place].pid && &shared->slots[place] != mine && !is_alive(place))
            shared->slots[place] = (slot){0};
}

static void lock_table(void)
{
    if (pthread_mutex_lock(&shared->lock) == EOWNERDEAD)
        pthread_mutex_consistent(&shared->lock);
}

/* With the table's lock held. */
static size_t sum_up(sim_resource resource, int device)
{
    size_t sum = 0;

    for (int place = 0; place < shared->used; place++)
        sum += shared->slots[place].taken[resource][device];
    return sum;
}

/* The table as it is open in another process; -1 if that has died, or is none of this machine's. */
static int open_table_of(int pid, int file)
{
    char path[64], target[64] = "", expected[64];

    snprintf(path, sizeof path, "/proc/%d/fd/%d", pid, file);
    snprintf(expected, sizeof expected, "/memfd:cann_sim.%s", key);
    if (readlink(path, target, sizeof target - 1) < 0 || strncmp(target, expected, strlen(expected)))
        return -1;
    return open(path, O_RDWR | O_CLOEXEC);
}

/* Looks for a process of this machine in the kernel's list of sockets. */
static int find_table(void)
{
    FILE *sockets = fopen("/proc/net/unix", "re");
    char line[512], name[48];
    int found = -1;

    if (!sockets)
        return -1;
    snprintf(name, sizeof name, "@cann_sim_machine.%s.", key);
    while (found < 0 && fgets(line, sizeof line, sockets)) {
        const char *place = strstr(line, name);
        int pid, file;

        if (place && sscanf(place + strlen(name), "%d.%d.", &pid, &file) == 2)
            found = open_table_of(pid, file);
    }
    fclose(sockets);
    return found;
}

/* A table for the first process of the machine. */
static int new_table(void)
{
    pthread_mutexattr_t robust;
    char name[40];
    table *made = MAP_FAILED;
    int file;

    snprintf(name, sizeof name, "cann_sim.%s", key);
    if ((file = memfd_create(name, MFD_CLOEXEC)) < 0)
        return -1;
    if (!ftruncate(file, sizeof *made))
        made = mmap(NULL, sizeof *made, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (made == MAP_FAILED) {
        close(file);
        return -1;
    }
    pthread_mutexattr_init(&robust);
    pthread_mutexattr_setpshared(&robust, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&robust, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(&made->lock, &robust);
    pthread_mutexattr_destroy(&robust);
    munmap(made, sizeof *made);
    return file;
}

/* With the table's lock held: the first free slot gets this process's life line. */
static aclError enter(const char *function)
{
    char name[64];
    int place = 0;

    bury_the_dead();
    while (place < shared->used && shared->slots[place].pid)
        place++;
    if (place == MAX_PROCESSES)
        return sim_fail(function, ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "%d processes use the simulated machine already",
                        MAX_PROCESSES);
    name_of(name, place, getpid(), table_file);
    if ((life_line = bind_name(name)) < 0)
        return sim_fail(function, ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "socket %s: %s", name, strerror(errno));
    if (place == shared->used)
        shared->used++;
    mine = &shared->slots[place];
    *mine = (slot){.pid = getpid(), .file = table_file};
    return ACL_SUCCESS;
}

/* While no other process joins: opens the table, or makes it. */
static aclError open_table(const char *function)
{
    aclError error;

    if ((table_file = find_table()) < 0 && (table_file = new_table()) < 0)
        return sim_fail(function, ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "the machine's table: %s", strerror(errno));
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED, table_file, 0);
    if (shared == MAP_FAILED) {
        shared = NULL;
        return sim_fail(function, ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "the machine's table: %s", strerror(errno));
    }
    lock_table();
    error = enter(function);
    pthread_mutex_unlock(&shared->lock);
    return error;
}

/* Leaves the machine to whoever holds the slot: a failed attempt, or the parent of this process. */
static void forget(void)
{
    if (shared)
        munmap(shared, sizeof *shared);
    if (table_file >= 0)
        close(table_file);
    if (life_line >= 0)
        close(life_line);
    shared = NULL;
    mine = NULL;
    table_file = life_line = -1;
}

/* A child that is forked has taken nothing, and must not keep its parent's slot alive. */
static void forget_in_child(void)
{
    pthread_mutex_init(&joining, NULL);
    forget();
}

static aclError join_machine(const char *function)
{
    double deadline = sim_seconds() + JOIN_SECONDS;
    static bool is_prepared;
    aclError error;
    char name[48];
    int turn;

    if (!is_prepared)
        pthread_atfork(NULL, NULL, forget_in_child);
    is_prepared = true;
    set_key();
    snprintf(name, sizeof name, "cann_sim_machine.join.%s", key);
    while ((turn = bind_name(name)) < 0) {
        if (errno != EADDRINUSE || sim_seconds() > deadline)
            return sim_fail(function, ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "socket %s: %s", name, strerror(errno));
        nanosleep(&(struct timespec){0, (long)(RETRY_SECONDS * 1e9)}, NULL);
    }
    if ((error = open_table(function)))
        forget();
    close(turn);
    return error;
}

/* Makes this process one of the machine's, at its first use of a device. */
static aclError be_there(const char *function)
{
    aclError error = ACL_SUCCESS;

    pthread_mutex_lock(&joining);
    if (!mine)
        error = join_machine(function);
    pthread_mutex_unlock(&joining);
    return error;
}

aclError sim_usage(const char *function, sim_resource resource, int device, size_t *taken)
{
    int physical = sim_settings()->physical[device];
    aclError error = be_there(function);

    if (error)
        return error;
    lock_table();
    bury_the_dead();
    *taken = sum_up(resource, physical);
    pthread_mutex_unlock(&shared->lock);
    return ACL_SUCCESS;
}

aclError sim_take(const char *function, sim_resource resource, int device, size_t amount, size_t limit, size_t *left)
{
    int physical = sim_settings()->physical[device];
    aclError error = be_there(function);
    size_t sum;

    if (error)
        return error;
    lock_table();
    sum = sum_up(resource, physical);
    if (sum > limit || amount > limit - sum) {
        bury_the_dead();
        sum = sum_up(resource, physical);
    }
    *left = sum < limit ? limit - sum : 0;
    if (amount <= *left)
        mine->taken[resource][physical] += amount;
    pthread_mutex_unlock(&shared->lock);
    return ACL_SUCCESS;
}

void sim_give(sim_resource resource, int device, size_t amount)
{
    size_t *taken;

    if (!mine) /* a forked child gives up what its parent has taken */
        return;
    lock_table();
    taken = &mine->taken[resource][sim_settings()->physical[device]];
    *taken -= amount < *taken ? amount : *taken; /* the same, of a child that has taken something itself */
    pthread_mutex_unlock(&shared->lock);
}
