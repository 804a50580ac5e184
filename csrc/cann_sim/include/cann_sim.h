/* What the simulator offers beyond CANN: the hooks for code that carries operators.
 *
 * An operator runs on the host, in the thread that calls it, on device memory that is host memory. It must therefore
 *   1. cann_sim_wait_for_turn(stream) before it touches the memory: what was put into the stream earlier is done then;
 *   2. cann_sim_record(stream, node) after it ran, if cann_sim_capturing(stream), so that a replay repeats it.
 * Most operators are better carried above, where torch dispatches them. Those that torch-npu calls without dispatch
 * come through the operator compiler, and cann_sim_carry_operators is how to get at them.
 *
 * Where CANN's own headers are included, too, define CANN_SIM_GENUINE_HEADERS before this one.
 */
#ifndef CANN_SIM_H
#define CANN_SIM_H

#include "acl_api.h"

#ifdef __cplusplus
extern "C" {
#endif

/* One step of a captured graph. `run` is called at every replay with `argument` and returns an ACL error; `release` is
 * called once, when the graph is destroyed or could not take the node, and may be NULL. Neither may throw or longjmp.
 * `name` is copied. A graph is replayed in the thread that asks for it, unless earlier work of the stream still waits,
 * or CANN_SIM_ASYNC is set and a node `waits` for others: then in a thread of the stream, which has the stream's device
 * and no other state. */
typedef struct {
    const char *name;
    aclError (*run)(void *argument);
    void (*release)(void *argument);
    void *argument;
    int waits;
} cann_sim_node;

/* A tensor of an operator that comes through the operator compiler. `data` is host memory for some inputs (shapes,
 * scalars), device memory for the others; `size` is in bytes. */
typedef struct {
    aclDataType type;
    aclFormat format;
    size_t dimension_count;
    const int64_t *dimensions;
    void *data;
    size_t size;
} cann_sim_tensor;

/* An attribute: `count` integers (booleans and types, too), `count` floats, or a text; the other two are NULL. */
typedef struct {
    const char *name;
    size_t count;
    const int64_t *integers;
    const float *floats;
    const char *text;
} cann_sim_attribute;

/* Valid during the call only. */
typedef struct {
    const char *type;
    const cann_sim_tensor *inputs, *outputs;
    const cann_sim_attribute *attributes;
    size_t input_count, output_count, attribute_count;
} cann_sim_operator;

/* Carries an operator and returns an ACL error, or ACL_ERROR_OP_NOT_FOUND for one that it does not know. */
typedef aclError (*cann_sim_operator_carrier)(const cann_sim_operator *operation);

#pragma GCC visibility push(default)

/* 1 if what is put into `stream` (NULL: the default stream of the current device) is being captured, else 0. */
int cann_sim_capturing(aclrtStream stream);

/* Appends a node to the graph that `stream` is being captured into. The node belongs to the simulator afterwards,
 * whatever is returned: if the stream is not being captured, it is released and the error says so. */
aclError cann_sim_record(aclrtStream stream, const cann_sim_node *node);

/* Returns when all that was put into `stream` has been done, with the error if something of it failed. Unlike
 * aclrtSynchronizeStream it is allowed during capture and leaves the error for the next synchronisation to report. */
aclError cann_sim_wait_for_turn(aclrtStream stream);

/* How many nodes a captured graph has; 0 for a handle that is not a graph. */
size_t cann_sim_node_count(aclmdlRI graph);

/* The device whose memory holds all of [address, address + length), or -1: host memory, or memory of nobody. */
int cann_sim_device_of(const void *address, size_t length);

/* From now on `carrier` (NULL: none) is asked for each operator that comes through the operator compiler, in the thread
 * that called, when it is its turn in the stream. What it does not know fails as if there were no carrier. */
void cann_sim_carry_operators(cann_sim_operator_carrier carrier);

#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif
#endif
