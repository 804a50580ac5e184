/* To whom an address belongs, and how much of a device is taken.
 *
 * Device memory is host memory. What is allocated is kept in a table, so that a copy in the wrong direction, a host
 * address given to a collective, or a range that ends outside its allocation is an error, as it would be on a device.
 */
#ifndef CANN_SIM_MEMORY_H
#define CANN_SIM_MEMORY_H

#include <stdbool.h>

#include "acl_api.h"

typedef enum {
    SIM_PAGEABLE,      /* ordinary host memory, or no memory at all */
    SIM_PINNED,        /* host memory that was allocated or registered here */
    SIM_DEVICE_MEMORY, /* memory of one device from end to end */
    SIM_BROKEN         /* begins or ends in device memory, but leaves it in between */
} sim_place;

typedef enum { SIM_MALLOC, SIM_MALLOC_HOST, SIM_REGISTERED, SIM_MAPPED } sim_origin;

typedef struct {
    void *base;
    size_t size;
    sim_origin origin;
    int device; /* -1 on the host */
} sim_region;

/* Tells where [address, address + length) is. If it begins in a known region, `device` (unless NULL) is set. */
sim_place sim_locate(const void *address, size_t length, int *device);

/* Enters a region into the table. Fails if it overlaps another one, or if the host has no memory for the table. */
aclError sim_add_region(const char *function, const sim_region *region);

/* Removes the region that begins at `base` and has this origin, and returns it; false if there is none. */
bool sim_remove_region(void *base, sim_origin origin, sim_region *region);

/* Counts `size` bytes of a device as taken, or fails with ACL_ERROR_RT_MEMORY_ALLOCATION; counts them as free again. */
aclError sim_take_memory(const char *function, int device, size_t size);
void sim_give_memory(int device, size_t size);

#endif
