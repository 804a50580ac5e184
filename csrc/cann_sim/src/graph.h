/* Graphs: lists of steps that were captured once and can be repeated.
 *
 * A graph grows while streams are captured into it (capture.c), and never changes after that: replays read it without a
 * lock, and only then can it be found by its handle.
 */
#ifndef CANN_SIM_GRAPH_H
#define CANN_SIM_GRAPH_H

#include <stdbool.h>
#include <stddef.h>

#include "acl_api.h"
#include "cann_sim.h"
#include "config.h"
#include "handles.h"
#include "stream.h"

typedef struct sim_node sim_node;

typedef struct {
    sim_object object;
    void *handle;
    uint32_t id; /* no other graph of the process has it */

    /* What follows is graph.c's. */
    bool complete;
    bool waits; /* one of the nodes does */
    sim_node *nodes, **nodes_end;
    size_t node_count;
    int replays; /* under way */
    size_t streams[SIM_MAX_DEVICES];
} sim_graph;

/* A new graph, which belongs to its handle; NULL, with the thread's error set, if there is no room for it. */
sim_graph *sim_new_graph(const char *function);

/* Takes a stream of the device for as long as the graph lives: a device needs one for each stream that is captured. */
aclError sim_take_graph_stream(const char *function, sim_graph *graph, int device);

/* Appends a step to a graph that is not complete. The node's argument is the graph's if all went well. One thread at a
 * time. */
aclError sim_add_node(const char *function, sim_graph *graph, const cann_sim_node *node);

/* The graph will not grow any more. */
void sim_complete_graph(sim_graph *graph);

/* Destroys a graph that will never be complete. */
void sim_drop_graph(sim_graph *graph);

/* The complete graph behind a handle, with a reference. `graph` is NULL after an error. */
aclError sim_find_graph(const char *function, aclmdlRI handle, sim_graph **graph);

/* Puts all nodes into the stream. */
aclError sim_replay(const char *function, sim_graph *graph, sim_stream *stream);

#endif
