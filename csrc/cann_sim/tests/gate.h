/* A graph whose replay waits until the test lets it pass: work that takes time. */
#ifndef CANN_SIM_GATE_H
#define CANN_SIM_GATE_H

#include <semaphore.h>

#include "cann_sim.h"

typedef struct {
    sem_t open;
    aclError outcome; /* of the replay */
    int released;     /* how often the node was */
} gate_state;

static aclError pass_gate(void *argument)
{
    gate_state *gate = argument;

    sem_wait(&gate->open);
    return gate->outcome;
}

static void release_gate(void *argument)
{
    ((gate_state *)argument)->released++;
}

/* The graph, captured in a stream of the current device; NULL if something goes wrong. */
static inline aclmdlRI make_gate(gate_state *gate, aclrtStream stream, aclError outcome)
{
    cann_sim_node node = {"gate", pass_gate, release_gate, gate, 1};
    aclmdlRI graph = NULL;

    gate->outcome = outcome;
    gate->released = 0;
    sem_init(&gate->open, 0, 0);
    if (aclmdlRICaptureBegin(stream, ACL_MODEL_RI_CAPTURE_MODE_GLOBAL) || cann_sim_record(stream, &node) ||
        aclmdlRICaptureEnd(stream, &graph))
        return NULL;
    return graph;
}

static inline void open_gate(gate_state *gate)
{
    sem_post(&gate->open);
}

#endif
