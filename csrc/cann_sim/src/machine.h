/* What the processes of the simulated machine have taken of its devices.
 *
 * The processes share one table in anonymous memory. Each has a slot there and an abstract Unix socket, which only says
 * that it lives: the kernel closes it with the process, however that ends. So a slot without a socket counts no more,
 * and when the last process has gone, nothing is left. A new process finds the others by their sockets' names, and the
 * table among the open files of any of them.
 */
#ifndef CANN_SIM_MACHINE_H
#define CANN_SIM_MACHINE_H

#include <stddef.h>

#include "acl_api.h"

typedef enum { SIM_BYTES, SIM_STREAMS, SIM_RESOURCES } sim_resource;

/* Tells how much of a device's resource all processes together have taken. */
aclError sim_usage(const char *function, sim_resource resource, int device, size_t *taken);

/* Takes `amount`, or nothing if all processes would have more than `limit` then: `left` is what there was to take. */
aclError sim_take(const char *function, sim_resource resource, int device, size_t amount, size_t limit, size_t *left);

/* Gives back what was taken. */
void sim_give(sim_resource resource, int device, size_t amount);

#endif
