#include "graph.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#include "errors.h"

struct sim_node {
    struct sim_node *next;
    char name[64];
    aclError (*run)(void *argument);
    void (*release)(void *argument);
    void *argument;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* for what may change in any graph */
static atomic_uint last_id;

static void release_graph(sim_object *object)
{
    sim_graph *graph = (sim_graph *)object;
    sim_node *node;

    while ((node = graph->nodes)) {
        graph->nodes = node->next;
        if (node->release)
            node->release(node->argument);
        free(node);
    }
    for (int device = 0; device < SIM_MAX_DEVICES; device++)
        if (graph->streams[device])
            sim_give_streams(device, graph->streams[device]);
    free(graph);
}

sim_graph *sim_new_graph(const char *function)
{
    sim_graph *graph = calloc(1, sizeof *graph);

    if (!graph) {
        sim_no_memory(function);
        return NULL;
    }
    graph->id = ++last_id;
    graph->nodes_end = &graph->nodes;
    if ((graph->handle = sim_publish(SIM_GRAPH, &graph->object, release_graph)))
        return graph;
    free(graph);
    return NULL;
}

aclError sim_take_graph_stream(const char *function, sim_graph *graph, int device)
{
    aclError error = sim_take_streams(function, device, 1);

    if (!error)
        graph->streams[device]++;
    return error;
}

aclError sim_add_node(const char *function, sim_graph *graph, const cann_sim_node *node)
{
    sim_node *entry = calloc(1, sizeof *entry);

    if (!entry)
        return sim_no_memory(function);
    snprintf(entry->name, sizeof entry->name, "%s", node->name ? node->name : "");
    entry->run = node->run;
    entry->release = node->release;
    entry->argument = node->argument;

    pthread_mutex_lock(&lock);
    *graph->nodes_end = entry;
    graph->nodes_end = &entry->next;
    graph->node_count++;
    graph->waits = graph->waits || node->waits;
    pthread_mutex_unlock(&lock);
    return ACL_SUCCESS;
}

void sim_complete_graph(sim_graph *graph)
{
    pthread_mutex_lock(&lock);
    graph->complete = true;
    pthread_mutex_unlock(&lock);
}

void sim_drop_graph(sim_graph *graph)
{
    if (sim_retire(SIM_GRAPH, graph->handle))
        sim_let_go(&graph->object);
}

static aclError acquire_graph(const char *function, aclmdlRI handle, sim_graph **graph)
{
    if ((*graph = sim_acquire(SIM_GRAPH, handle)))
        return ACL_SUCCESS;
    return sim_fail(function, ACL_ERROR_RT_INVALID_HANDLE, "%p is not a graph, or was destroyed", handle);
}

aclError sim_find_graph(const char *function, aclmdlRI handle, sim_graph **graph)
{
    aclError error = acquire_graph(function, handle, graph);
    bool complete;

    if (error)
        return error;
    pthread_mutex_lock(&lock);
    complete = (*graph)->complete;
    pthread_mutex_unlock(&lock);
    if (complete)
        return ACL_SUCCESS;
    sim_let_go(&(*graph)->object);
    *graph = NULL;
    return sim_fail(function, ACL_ERROR_RT_MODEL_CAPTURED, "the graph is still being captured");
}

static aclError run_nodes(void *argument)
{
    const sim_graph *graph = argument;
    aclError error;

    for (const sim_node *node = graph->nodes; node; node = node->next)
        if ((error = node->run(node->argument)))
            return sim_fail("replay", error, "%s: %s", node->name, sim_error_text());
    return ACL_SUCCESS;
}

static void end_replay(void *argument)
{
    sim_graph *graph = argument;

    pthread_mutex_lock(&lock);
    graph->replays--;
    pthread_mutex_unlock(&lock);
    sim_let_go(&graph->object);
}

aclError sim_replay(const char *function, sim_graph *graph, sim_stream *stream)
{
    sim_task task = {.name = function, .run = run_nodes, .release = end_replay, .argument = graph};

    sim_hold(&graph->object);
    pthread_mutex_lock(&lock);
    graph->replays++;
    task.waits = graph->waits;
    pthread_mutex_unlock(&lock);
    return sim_run(function, stream, &task);
}

/* Destroys a graph that is neither being captured nor replayed, and releases its nodes. */
aclError aclmdlRIDestroy(aclmdlRI modelRI)
{
    SIM_BORROWED sim_graph *graph = NULL;
    aclError error = sim_find_graph(__func__, modelRI, &graph);
    int replays;

    if (error)
        return error;
    pthread_mutex_lock(&lock);
    replays = graph->replays;
    pthread_mutex_unlock(&lock);
    if (replays)
        return FAIL(ACL_ERROR_RT_MODEL_RUNNING, "the graph is being replayed");
    if (!sim_retire(SIM_GRAPH, modelRI))
        return FAIL(ACL_ERROR_RT_INVALID_HANDLE, "another thread destroyed the graph");
    sim_let_go(&graph->object);
    return ACL_SUCCESS;
}

/* Tells a number that no other graph of the process has had. It can be asked for during the capture as well. */
aclError aclmdlRIGetId(aclmdlRI modelRI, uint32_t *modelRIId)
{
    SIM_BORROWED sim_graph *graph = NULL;
    aclError error = acquire_graph(__func__, modelRI, &graph);

    if (error)
        return error;
    if (!modelRIId)
        return FAIL(ACL_ERROR_INVALID_PARAM, "modelRIId is NULL");
    *modelRIId = graph->id;
    return ACL_SUCCESS;
}

size_t cann_sim_node_count(aclmdlRI handle)
{
    SIM_BORROWED sim_graph *graph = sim_acquire(SIM_GRAPH, handle);
    size_t count;

    if (!graph)
        return 0;
    pthread_mutex_lock(&lock);
    count = graph->node_count;
    pthread_mutex_unlock(&lock);
    return count;
}
