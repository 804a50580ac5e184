/* Profiling: torch-npu announces itself when it is loaded; nobody ever asks it for a profile. */
#include <stdint.h>
#include <time.h>

#define EXPORT __attribute__((visibility("default")))

typedef int32_t (*prof_command_handle)(uint32_t type, void *data, uint32_t length);

EXPORT int32_t MsprofRegisterCallback(uint32_t moduleId, prof_command_handle handle);
EXPORT uint64_t MsprofSysCycleTime(void);

/* Ignored: the callback is never called. */
int32_t MsprofRegisterCallback(uint32_t moduleId, prof_command_handle handle)
{
    (void)moduleId, (void)handle;
    return 0;
}

/* Returns the time of the steady clock, in nanoseconds. */
uint64_t MsprofSysCycleTime(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}
