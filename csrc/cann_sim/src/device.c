#include "device.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

#include "config.h"
#include "errors.h"

/* An Ascend 910B1. */
#define CUBE_CORES 24
#define VECTOR_CORES 48
#define AICPU_CORES 6
#define L2_BYTES ((int64_t)192 << 20)

/* A device has one context, the primary one; its address is the aclrtContext. */
typedef struct {
    atomic_int users; /* aclrtSetDevice calls less aclrtResetDevice calls */
} primary_context;

static primary_context contexts[SIM_MAX_DEVICES];
static atomic_int default_device = -1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static _Thread_local int current = -1;

static int device_of_context(const void *handle)
{
    for (int device = 0; device < SIM_MAX_DEVICES; device++)
        if (handle == &contexts[device])
            return device;
    return -1;
}

aclError sim_check_device(const char *function, int64_t device)
{
    const sim_config *settings = sim_settings();

    if (!settings)
        return ACL_ERROR_INVALID_PARAM;
    if (device < 0 || device >= settings->device_count)
        return sim_fail(function, ACL_ERROR_RT_INVALID_DEVICEID, "there is no device %lld; this process sees %d",
                        (long long)device, settings->device_count);
    return ACL_SUCCESS;
}

aclError sim_current_device(const char *function, int *device)
{
    *device = -1;
    if (current >= 0 && contexts[current].users) {
        *device = current;
        return ACL_SUCCESS;
    }
    if (current < 0 && default_device >= 0) {
        aclError error = aclrtSetDevice(default_device);

        *device = current;
        return error;
    }
    return sim_fail(function, ACL_ERROR_RT_CONTEXT_NULL,
                    current < 0 ? "this thread has not set a device" : "the device of this thread was reset");
}

void sim_work_on(int device)
{
    current = device;
}

void sim_set_default_device(int device)
{
    default_device = device;
}

aclError sim_leave_device(const char *function, int device, bool *last)
{
    aclError error = ACL_SUCCESS;

    pthread_mutex_lock(&lock);
    if (!contexts[device].users)
        error = sim_fail(function, ACL_ERROR_RT_CONTEXT_NULL, "device %d was not set", device);
    else
        *last = --contexts[device].users == 0;
    pthread_mutex_unlock(&lock);
    return error;
}

/* The calling thread works on `deviceId` from now on. */
aclError aclrtSetDevice(int32_t deviceId)
{
    aclError error = CHECK_DEVICE(deviceId);

    if (error)
        return error;
    contexts[deviceId].users++;
    current = deviceId;
    return ACL_SUCCESS;
}

/* Tells the device of the calling thread; an error if it has none. */
aclError aclrtGetDevice(int32_t *deviceId)
{
    if (!deviceId)
        return FAIL(ACL_ERROR_RT_PARAM_INVALID, "deviceId is NULL");
    if (current < 0 || !contexts[current].users)
        return FAIL(ACL_ERROR_RT_CONTEXT_NULL, "this thread has not set a device, or it was reset");
    *deviceId = current;
    return ACL_SUCCESS;
}

/* Tells how many devices this process sees. */
aclError aclrtGetDeviceCount(uint32_t *count)
{
    const sim_config *settings = sim_settings();

    if (!settings)
        return ACL_ERROR_INVALID_PARAM;
    if (!count)
        return FAIL(ACL_ERROR_RT_PARAM_INVALID, "count is NULL");
    *count = (uint32_t)settings->device_count;
    return ACL_SUCCESS;
}

/* Tells the context of the calling thread's device, which stays the same as long as the process lives. */
aclError aclrtGetCurrentContext(aclrtContext *context)
{
    int device;
    aclError error = CURRENT_DEVICE(&device);

    if (error)
        return error;
    if (!context)
        return FAIL(ACL_ERROR_RT_PARAM_INVALID, "context is NULL");
    *context = &contexts[device];
    return ACL_SUCCESS;
}

/* The calling thread works on the device of `context` from now on; the device must have been set by some thread. */
aclError aclrtSetCurrentContext(aclrtContext context)
{
    int device = device_of_context(context);

    if (device < 0 || !contexts[device].users)
        return FAIL(ACL_ERROR_RT_CONTEXT_NULL, "%p is not the context of a device in use", context);
    current = device;
    return ACL_SUCCESS;
}

/* Tells whether some thread has set the device. */
aclError aclrtGetPrimaryCtxState(int32_t deviceId, uint32_t *flags, int32_t *active)
{
    aclError error = CHECK_DEVICE(deviceId);

    if (error)
        return error;
    if (flags)
        *flags = 0;
    if (active)
        *active = contexts[deviceId].users > 0;
    return ACL_SUCCESS;
}

/* Describes the device: an Ascend 910B1 with CANN_SIM_MEMORY bytes. */
aclError aclrtGetDeviceInfo(uint32_t deviceId, aclrtDevAttr attr, int64_t *value)
{
    aclError error = CHECK_DEVICE(deviceId);

    if (error)
        return error;
    if (!value)
        return FAIL(ACL_ERROR_RT_PARAM_INVALID, "value is NULL");
    switch (attr) {
    case ACL_DEV_ATTR_AICPU_CORE_NUM:
        *value = AICPU_CORES;
        break;
    case ACL_DEV_ATTR_AICORE_CORE_NUM:
    case ACL_DEV_ATTR_CUBE_CORE_NUM:
        *value = CUBE_CORES;
        break;
    case ACL_DEV_ATTR_VECTOR_CORE_NUM:
        *value = VECTOR_CORES;
        break;
    case ACL_DEV_ATTR_TOTAL_GLOBAL_MEM_SIZE:
        *value = (int64_t)sim_settings()->memory;
        break;
    case ACL_DEV_ATTR_L2_CACHE_SIZE:
        *value = L2_BYTES;
        break;
    case ACL_DEV_ATTR_PHY_CHIP_ID:
        *value = sim_settings()->physical[deviceId];
        break;
    case ACL_DEV_ATTR_IS_VIRTUAL:
        *value = 0;
        break;
    default:
        return FAIL(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "device attribute %d is not simulated", (int)attr);
    }
    return ACL_SUCCESS;
}

/* Tells some of the facts of aclrtGetDeviceInfo, by older names. */
aclError aclGetDeviceCapability(uint32_t deviceId, aclDeviceInfo deviceInfo, int64_t *value)
{
    static const aclrtDevAttr attributes[] = {
        [ACL_DEVICE_INFO_AI_CORE_NUM] = ACL_DEV_ATTR_CUBE_CORE_NUM,
        [ACL_DEVICE_INFO_VECTOR_CORE_NUM] = ACL_DEV_ATTR_VECTOR_CORE_NUM,
        [ACL_DEVICE_INFO_L2_SIZE] = ACL_DEV_ATTR_L2_CACHE_SIZE,
    };

    if ((int)deviceInfo < 0 || (size_t)deviceInfo >= sizeof attributes / sizeof *attributes)
        return FAIL(ACL_ERROR_INVALID_PARAM, "device capability %d is unknown", (int)deviceInfo);
    return aclrtGetDeviceInfo(deviceId, attributes[deviceInfo], value);
}

/* Tells a number that a device of the machine has in all processes. */
aclError aclrtDeviceGetUuid(int32_t deviceId, aclrtUuid *uuid)
{
    aclError error = CHECK_DEVICE(deviceId);

    if (error)
        return error;
    if (!uuid)
        return FAIL(ACL_ERROR_RT_PARAM_INVALID, "uuid is NULL");
    memset(uuid, 0, sizeof *uuid);
    memcpy(uuid->bytes, "simulated NPU", sizeof "simulated NPU" - 1);
    uuid->bytes[sizeof uuid->bytes - 1] = (char)sim_settings()->physical[deviceId];
    return ACL_SUCCESS;
}

/* Tells whether the two devices are different: each reaches the memory of every other. */
aclError aclrtDeviceCanAccessPeer(int32_t *canAccessPeer, int32_t deviceId, int32_t peerDeviceId)
{
    aclError error;

    if ((error = CHECK_DEVICE(deviceId)) || (error = CHECK_DEVICE(peerDeviceId)))
        return error;
    if (!canAccessPeer)
        return FAIL(ACL_ERROR_RT_PARAM_INVALID, "canAccessPeer is NULL");
    *canAccessPeer = deviceId != peerDeviceId;
    return ACL_SUCCESS;
}

/* Does nothing but check its arguments: a copy between devices always works. */
aclError aclrtDeviceEnablePeerAccess(int32_t peerDeviceId, uint32_t flags)
{
    int device;
    aclError error;

    if ((error = CURRENT_DEVICE(&device)) || (error = CHECK_DEVICE(peerDeviceId)))
        return error;
    if (flags || peerDeviceId == device)
        return FAIL(ACL_ERROR_RT_PARAM_INVALID, "flags %u, device %d from device %d", flags, peerDeviceId, device);
    return ACL_SUCCESS;
}

/* Tells the process id, by which memory would be shared on hardware. */
aclError aclrtDeviceGetBareTgid(int32_t *pid)
{
    if (!pid)
        return FAIL(ACL_ERROR_RT_PARAM_INVALID, "pid is NULL");
    *pid = (int32_t)getpid();
    return ACL_SUCCESS;
}

/* Tells which device of the machine the process knows as `userDevid`. */
aclError aclrtGetLogicDevIdByUserDevId(const int32_t userDevid, int32_t *const logicDevId)
{
    aclError error = CHECK_DEVICE(userDevid);

    if (error)
        return error;
    if (!logicDevId)
        return FAIL(ACL_ERROR_RT_PARAM_INVALID, "logicDevId is NULL");
    *logicDevId = sim_settings()->physical[userDevid];
    return ACL_SUCCESS;
}
