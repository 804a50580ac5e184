/* Several processes on the devices of one machine. */
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "children.h"

#define UNUSED_RANK (void)rank, (void)size
#define MIB ((size_t)1 << 20)

static int told[2], asked[2]; /* pipes between a test and the process beside it, a byte for each step */

static void tell(const int *pipe_ends)
{
    if (write(pipe_ends[1], "x", 1) != 1)
        exit(3);
}

static void wait_for(const int *pipe_ends)
{
    char byte;

    if (read(pipe_ends[0], &byte, 1) != 1)
        exit(3);
}

static size_t free_bytes(void)
{
    size_t left = 0, total;

    aclrtGetMemInfo(ACL_HBM_MEM, &left, &total);
    return left;
}

static void use_device(int device)
{
    setenv("CANN_SIM_MEMORY", "16M", 1);
    aclrtSetDevice(device);
}

static aclError take(size_t bytes)
{
    void *memory;

    return aclrtMalloc(&memory, bytes, ACL_MEM_MALLOC_HUGE_FIRST);
}

/* Takes 10 MiB, frees them when it is asked, takes them again and keeps them. */
static void neighbour(unsigned rank, unsigned size)
{
    void *memory = NULL;

    UNUSED_RANK;
    use_device(0);
    CHECK("a neighbour takes memory", !aclrtMalloc(&memory, 10 * MIB, ACL_MEM_MALLOC_HUGE_FIRST));
    tell(told);
    wait_for(asked);
    aclrtFree(memory);
    tell(told);
    wait_for(asked);
    CHECK("a neighbour takes it again", !take(10 * MIB));
    tell(told);
    pause();
}

/* Runs beside a neighbour, whom `asked` and `told` connect to it and who is killed. */
static void beside_neighbour(unsigned rank, unsigned size)
{
    pid_t child = (pid_t)atoi(getenv("NEIGHBOUR"));

    UNUSED_RANK;
    use_device(0);
    wait_for(told);
    CHECK("what another process takes is not free", free_bytes() == 6 * MIB);
    CHECK("and cannot be had", take(7 * MIB) == ACL_ERROR_RT_MEMORY_ALLOCATION);
    CHECK("what is left can", !take(MIB) && free_bytes() == 5 * MIB);
    CHECK("another device is another's", !aclrtSetDevice(1) && free_bytes() == 16 * MIB && !aclrtSetDevice(0));
    tell(asked);
    wait_for(told);
    CHECK("what is freed there is free here", free_bytes() == 15 * MIB);
    tell(asked);
    wait_for(told);
    CHECK("and is gone when it is taken again", free_bytes() == 5 * MIB);
    kill(child, SIGKILL);
    for (int i = 0; i < 1000 && take(15 * MIB); i++)
        usleep(10000);
    CHECK("who is killed leaves all that he had", !free_bytes());
}

static bool survives_its_neighbour(void)
{
    char text[16];
    pid_t victim, child;
    int status;

    if (pipe(told) || pipe(asked))
        return false;
    victim = start_child(neighbour, 0, 1);
    snprintf(text, sizeof text, "%d", (int)victim);
    setenv("NEIGHBOUR", text, 1);
    child = start_child(beside_neighbour, 0, 1);
    return child_passed(child) && waitpid(victim, &status, 0) == victim && WIFSIGNALED(status);
}

static int ready[2], start[2], done[2], end[2];

/* One of many that want a megabyte of the same 16 at once. Passes if it gets it, and keeps it until all have tried. */
static void competitor(unsigned rank, unsigned size)
{
    aclError error;

    UNUSED_RANK;
    use_device(0);
    free_bytes();
    tell(ready);
    wait_for(start);
    error = take(MIB);
    tell(done);
    wait_for(end);
    exit(error == ACL_SUCCESS ? 0 : error == ACL_ERROR_RT_MEMORY_ALLOCATION ? 1 : 2);
}

static void for_all(int count, void (*step)(const int *pipe_ends), const int *pipe_ends)
{
    for (int i = 0; i < count; i++)
        step(pipe_ends);
}

static bool only_so_many_get_it(void)
{
    enum { COUNT = 40 };
    pid_t children[COUNT];
    int outcomes[3] = {0}, status;

    if (pipe(ready) || pipe(start) || pipe(done) || pipe(end))
        return false;
    for (int i = 0; i < COUNT; i++)
        children[i] = start_child(competitor, 0, 1);
    for_all(COUNT, wait_for, ready);
    for_all(COUNT, tell, start);
    for_all(COUNT, wait_for, done);
    for_all(COUNT, tell, end);
    for (int i = 0; i < COUNT; i++)
        if (waitpid(children[i], &status, 0) == children[i] && WIFEXITED(status) && WEXITSTATUS(status) < 3)
            outcomes[WEXITSTATUS(status)]++;
    return outcomes[0] == 16 && outcomes[1] == COUNT - 16;
}

/* Takes and frees until it is killed. */
static void restless(unsigned rank, unsigned size)
{
    UNUSED_RANK;
    use_device(0);
    tell(told);
    for (;;) {
        void *memory = NULL;

        if (!aclrtMalloc(&memory, 4096, ACL_MEM_MALLOC_HUGE_FIRST))
            aclrtFree(memory);
    }
}

static void whole_device(unsigned rank, unsigned size)
{
    UNUSED_RANK;
    use_device(0);
    CHECK("all of the device can be had", free_bytes() == 16 * MIB && !take(16 * MIB));
}

/* At any moment a process may be killed: while it joins, while it counts. */
static bool nobody_leaves_anything(void)
{
    if (pipe(told))
        return false;
    srand(1);
    for (int i = 0; i < 100; i++) {
        pid_t child = start_child(restless, 0, 1);
        int status;

        wait_for(told);
        usleep((useconds_t)(rand() % 2000));
        kill(child, SIGKILL);
        waitpid(child, &status, 0);
        if (i % 10 == 9 && !alone(whole_device))
            return false;
    }
    return true;
}

/* A process that forks, and ends before its child. The grandchild takes a megabyte for itself. */
static void parent(unsigned rank, unsigned size)
{
    UNUSED_RANK;
    use_device(0);
    CHECK("a parent takes memory", !take(8 * MIB));
    if (fork())
        return;
    alarm(CHILD_SECONDS);
    CHECK("its child does, too", !take(MIB));
    tell(told);
    wait_for(asked);
    _exit(0);
}

static void after_parent(unsigned rank, unsigned size)
{
    UNUSED_RANK;
    use_device(0);
    wait_for(told);
    CHECK("only the child's is still taken", free_bytes() == 15 * MIB);
    tell(asked);
}

static bool a_fork_takes_nothing_along(void)
{
    return !pipe(told) && !pipe(asked) && alone(parent) && alone(after_parent);
}

static void elsewhere(unsigned rank, unsigned size)
{
    UNUSED_RANK;
    setenv("CANN_SIM_MACHINE", "another", 1);
    use_device(1);
    CHECK("a machine with another name has memory of its own", free_bytes() == 16 * MIB);
}

static void second_device(unsigned rank, unsigned size)
{
    UNUSED_RANK;
    setenv("ASCEND_RT_VISIBLE_DEVICES", "1", 1);
    use_device(0);
    CHECK("the machine's second device is this process's first", free_bytes() == 12 * MIB);
}

static void on_two_devices(unsigned rank, unsigned size)
{
    UNUSED_RANK;
    use_device(1);
    CHECK("memory is taken", !take(4 * MIB));
    tell(told);
    wait_for(asked);
}

static bool devices_have_one_number(void)
{
    bool passed;
    pid_t child;

    if (pipe(told) || pipe(asked))
        return false;
    child = start_child(on_two_devices, 0, 1);
    wait_for(told);
    passed = alone(second_device) && alone(elsewhere);
    tell(asked);
    return child_passed(child) && passed;
}

int main(void)
{
    alarm(2 * CHILD_SECONDS);
    CHECK("memory beside a process that is killed", survives_its_neighbour());
    CHECK("many at once", only_so_many_get_it());
    CHECK("killed at any moment", nobody_leaves_anything());
    CHECK("a process that forks", a_fork_takes_nothing_along());
    CHECK("which device, and of which machine", devices_have_one_number());
    return REPORT();
}
