/* Tests in processes of their own: for settings, which a process reads once, and for ranks. */
#ifndef CANN_SIM_CHILDREN_H
#define CANN_SIM_CHILDREN_H

#include <stdbool.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include "testhelp.h"

#define CHILD_SECONDS 60 /* then it is killed by its alarm */

/* Starts a child that runs `body(rank, size)` and fails if a check fails in it. Children of one process are on a machine
 * of their own. */
static inline pid_t start_child(void (*body)(unsigned rank, unsigned size), unsigned rank, unsigned size)
{
    char machine[32];
    pid_t child;

    fflush(stdout);
    if ((child = fork()))
        return child;
    alarm(CHILD_SECONDS);
    snprintf(machine, sizeof machine, "test %d", (int)getppid());
    setenv("CANN_SIM_MACHINE", machine, 1);
    checks = failures = 0;
    body(rank, size);
    fflush(stdout);
    exit(failures ? 1 : 0);
}

/* Whether a child ended without a failed check. */
static inline bool child_passed(pid_t child)
{
    int status;

    return waitpid(child, &status, 0) == child && WIFEXITED(status) && !WEXITSTATUS(status);
}

/* Runs `size` ranks and returns how many of them passed. */
static inline unsigned run_ranks(void (*body)(unsigned rank, unsigned size), unsigned size)
{
    pid_t children[64];
    unsigned passed = 0;

    for (unsigned rank = 0; rank < size; rank++)
        children[rank] = start_child(body, rank, size);
    for (unsigned rank = 0; rank < size; rank++)
        passed += child_passed(children[rank]);
    return passed;
}

/* Runs a test alone, in a process of its own. */
static inline bool alone(void (*body)(unsigned rank, unsigned size))
{
    return run_ranks(body, 1) == 1;
}

#endif
