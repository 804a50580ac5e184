/* The simulator's settings. README.md lists the environment variables. */
#ifndef CANN_SIM_CONFIG_H
#define CANN_SIM_CONFIG_H

#include <stdbool.h>
#include <stddef.h>

#define SIM_MAX_DEVICES 64

typedef struct {
    int device_count;              /* devices that this process sees */
    int physical[SIM_MAX_DEVICES]; /* which devices of the machine they are */
    size_t memory;                 /* bytes of each device */
    double hccl_timeout;           /* seconds */
    bool asynchronous;             /* collectives do not block the caller */
    bool poison;                   /* fresh device memory is filled with garbage */
} sim_config;

/* The settings, read from the environment at the first call; or NULL, with the thread's error set, if one is wrong.
 * A wrong value is never replaced by a default. */
const sim_config *sim_settings(void);

#endif
