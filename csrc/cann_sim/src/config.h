/* The simulator's settings. README.md lists the environment variables. */
#ifndef CANN_SIM_CONFIG_H
#define CANN_SIM_CONFIG_H

#include <stdbool.h>
#include <stddef.h>

#define SIM_MAX_DEVICES 64
#define SIM_SOC_BYTES 64

typedef struct {
    int device_count;              /* devices that this process sees */
    int physical[SIM_MAX_DEVICES]; /* which devices of the machine they are */
    char soc[SIM_SOC_BYTES];       /* what kind of device they are, as CANN names it */
    int machine_devices;           /* devices of the machine */
    const char *machine;           /* its name */
    size_t memory;                 /* bytes of each device */
    size_t streams;                /* of each device */
    size_t communicator_streams;   /* that HCCL takes for a communicator */
    double hccl_timeout;           /* seconds until an operation fails */
    double connect_timeout;        /* seconds until the creation of a communicator fails */
    bool asynchronous;             /* collectives do not block the caller */
    bool poison;                   /* fresh device memory is filled with garbage */
} sim_config;

/* The settings, read from the environment at the first call; or NULL, with the thread's error set, if one is wrong.
 * A wrong value is never replaced by a default. */
const sim_config *sim_settings(void);

#endif
