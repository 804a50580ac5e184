/* Which address belongs to whom, and how much of a device is taken.
 *
 * Device memory is host memory. What is allocated is kept in a table, so that a copy in the wrong direction, a host
 * address given to a collective, or a range that ends outside its allocation is an error, as it would be on a device.
 */
#ifndef CANN_SIM_MEMORY_H
#define CANN_SIM_MEMORY_H

#include <stdbool.h>

#include "acl_api.h"

typedef enum {
    SIM_PAGEABLE,      /* ordinary host memory, or nothing: nobody told us */
    SIM_PINNED,        /* host memory allocated or registered by us */
    SIM_DEVICE_MEMORY, /* in one device throughout */
    SIM_BROKEN         /* begins in device memory and leaves it, or another device's */
} sim_place;

typedef enum { SIM_MALLOC, SIM_MALLOC_HOST, SIM_REGISTERED, SIM_MAPPED } sim_origin;

typedef struct {
    void *base;
    size_t size;
    sim_origin origin;
    int device; /* -1 on the host */
} sim_region;

/* Where [address, address + length) is; `device`, if not NULL, is filled for device memory. */
sim_place sim_locate(const void *address, size_t length, int *device);

/* Enters a region that overlaps no other; an ACL error if it does, or if there is no memory for the table. */
aclError sim_add_region(const char *function, const sim_region *region);

/* Takes the region out that begins at `base` and has this origin; false if there is none. */
bool sim_remove_region(void *base, sim_origin origin, sim_region *region);

/* Takes `size` bytes of a device, or fails with ACL_ERROR_RT_MEMORY_ALLOCATION; gives them back. */
aclError sim_take_memory(const char *function, int device, size_t size);
void sim_give_memory(int device, size_t size);

#endif
