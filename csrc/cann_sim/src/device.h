/* The simulated devices, and which of them a thread works on. */
#ifndef CANN_SIM_DEVICE_H
#define CANN_SIM_DEVICE_H

#include <stdbool.h>

#include "acl_api.h"

/* The device of the calling thread. A thread that has set none gets the default device, if aclInit was given one. */
aclError sim_current_device(const char *function, int *device);

/* Whether `device` is one that this process sees. */
aclError sim_check_device(const char *function, int64_t device);

/* The calling thread, which belongs to the simulator, works on `device` as long as others do. */
void sim_work_on(int device);

/* The device of threads that never call aclrtSetDevice; -1 for none. */
void sim_set_default_device(int device);

/* Undoes one aclrtSetDevice of a device that this process sees; `last` tells whether nobody uses it any more. */
aclError sim_leave_device(const char *function, int device, bool *last);

#define CURRENT_DEVICE(device) sim_current_device(__func__, device)
#define CHECK_DEVICE(device) sim_check_device(__func__, device)

#endif
