#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "children.h"

#define UNUSED_RANK (void)rank, (void)size

static void set(const char *name, const char *value)
{
    setenv(name, value, 1);
}

static unsigned device_count(void)
{
    unsigned count = 99;

    return aclrtGetDeviceCount(&count) ? 99 : count;
}

static void defaults(unsigned rank, unsigned size)
{
    size_t free_bytes, total;

    UNUSED_RANK;
    CHECK("there are two devices", device_count() == 2);
    CHECK("init succeeds", aclInit(NULL) == ACL_SUCCESS);
    CHECK("init a second time is refused", aclInit(NULL) == ACL_ERROR_REPEAT_INITIALIZE);
    CHECK("device 1 can be set", aclrtSetDevice(1) == ACL_SUCCESS);
    CHECK("a device has 4 GiB", aclrtGetMemInfo(ACL_HBM_MEM, &free_bytes, &total) == ACL_SUCCESS &&
                                    total == (size_t)4 << 30 && free_bytes == total);
    CHECK("finalize succeeds once", aclFinalize() == ACL_SUCCESS && aclFinalize() == ACL_ERROR_REPEAT_FINALIZE);
}

static void wrong_count(unsigned rank, unsigned size)
{
    unsigned count;

    UNUSED_RANK;
    set("CANN_SIM_DEVICES", "many");
    CHECK("a wrong number of devices stops everything",
          aclInit(NULL) == ACL_ERROR_INVALID_PARAM && aclrtGetDeviceCount(&count) && aclrtSetDevice(0));
    CHECK("the message names variable and value", strstr(aclGetRecentErrMsg(), "CANN_SIM_DEVICES is \"many\""));
}

static void wrong_memory(unsigned rank, unsigned size)
{
    UNUSED_RANK;
    set("CANN_SIM_MEMORY", "4 GB");
    CHECK("a wrong size of memory stops everything", aclInit(NULL) == ACL_ERROR_INVALID_PARAM);
}

static void chosen_soc(unsigned rank, unsigned size)
{
    UNUSED_RANK;
    set("CANN_SIM_SOC", "Ascend310P3");
    CHECK("the kind of the devices can be chosen, and is known at once", !strcmp(aclrtGetSocName(), "Ascend310P3"));
}

static void wrong_soc(unsigned rank, unsigned size)
{
    UNUSED_RANK;
    set("CANN_SIM_SOC", "H100");
    CHECK("a wrong kind stops everything", !aclrtGetSocName() && aclInit(NULL) == ACL_ERROR_INVALID_PARAM);
}

static void wrong_timeout(unsigned rank, unsigned size)
{
    UNUSED_RANK;
    set("CANN_SIM_HCCL_TIMEOUT", "0");
    CHECK("no timeout at all is refused", aclInit(NULL) == ACL_ERROR_INVALID_PARAM);
}

static void wrong_connect_timeout(unsigned rank, unsigned size)
{
    UNUSED_RANK;
    set("HCCL_CONNECT_TIMEOUT", "119");
    CHECK("HCCL waits for two minutes at least", aclInit(NULL) == ACL_ERROR_INVALID_PARAM);
}

static void memory_with_unit(unsigned rank, unsigned size)
{
    size_t free_bytes, total = 0;

    UNUSED_RANK;
    set("CANN_SIM_MEMORY", "64M");
    aclrtSetDevice(0);
    aclrtGetMemInfo(ACL_HBM_MEM, &free_bytes, &total);
    CHECK("sizes may have units", total == (size_t)64 << 20);
}

static void some_visible(unsigned rank, unsigned size)
{
    int64_t chip = -1;
    int32_t logical = -1;
    aclrtUuid zero, one;

    UNUSED_RANK;
    set("CANN_SIM_DEVICES", "4");
    set("ASCEND_RT_VISIBLE_DEVICES", "1,3");
    CHECK("only the visible devices count", device_count() == 2);
    CHECK("the second is the machine's fourth",
          aclrtGetDeviceInfo(1, ACL_DEV_ATTR_PHY_CHIP_ID, &chip) == ACL_SUCCESS && chip == 3 &&
              aclrtGetLogicDevIdByUserDevId(1, &logical) == ACL_SUCCESS && logical == 3);
    CHECK("devices have different UUIDs", aclrtDeviceGetUuid(0, &zero) == ACL_SUCCESS &&
                                              aclrtDeviceGetUuid(1, &one) == ACL_SUCCESS &&
                                              memcmp(&zero, &one, sizeof zero));
}

static void none_visible(unsigned rank, unsigned size)
{
    UNUSED_RANK;
    set("ASCEND_RT_VISIBLE_DEVICES", "");
    CHECK("an empty list hides all devices", device_count() == 0);
    CHECK("none can be set", aclrtSetDevice(0) == ACL_ERROR_RT_INVALID_DEVICEID);
}

static void unordered_visible(unsigned rank, unsigned size)
{
    UNUSED_RANK;
    set("ASCEND_RT_VISIBLE_DEVICES", "1,0");
    CHECK("a list that does not ascend hides all devices", device_count() == 0);
}

static void repeated_visible(unsigned rank, unsigned size)
{
    UNUSED_RANK;
    set("ASCEND_RT_VISIBLE_DEVICES", "1,1");
    CHECK("nor does one that repeats itself", device_count() == 0);
}

static void too_many_visible(unsigned rank, unsigned size)
{
    UNUSED_RANK;
    set("ASCEND_RT_VISIBLE_DEVICES", "1,5");
    CHECK("a device that is not there ends the list", device_count() == 1);
}

static void *look_at_device(void *argument)
{
    aclrtContext context;
    void *memory = NULL;
    int device = -1;

    *(aclError *)argument = aclrtGetDevice(&device);
    if (*(aclError *)argument == ACL_ERROR_RT_CONTEXT_NULL)
        *(aclError *)argument = aclrtGetCurrentContext(&context);
    if (*(aclError *)argument == ACL_ERROR_RT_CONTEXT_NULL)
        *(aclError *)argument = aclrtMalloc(&memory, 4096, ACL_MEM_MALLOC_HUGE_FIRST);
    if (memory)
        aclrtFree(memory);
    return NULL;
}

static void threads(unsigned rank, unsigned size)
{
    aclError seen = ACL_SUCCESS;
    pthread_t thread;

    UNUSED_RANK;
    CHECK("the first thread sets device 1", aclrtSetDevice(1) == ACL_SUCCESS);
    pthread_create(&thread, NULL, look_at_device, &seen);
    pthread_join(thread, NULL);
    CHECK("another thread has no device", seen == ACL_ERROR_RT_CONTEXT_NULL);
}

static void default_device(unsigned rank, unsigned size)
{
    char path[] = "/tmp/cann_sim_testXXXXXX";
    const char *text = "{\"dump\":{\"dump_scene\":\"lite_exception\"}, \"defaultDevice\":{\"default_device\":\"1\"}}";
    aclrtContext by_default, explicitly;
    int file = mkstemp(path), device = -1;

    UNUSED_RANK;
    CHECK("a configuration is written", write(file, text, strlen(text)) == (ssize_t)strlen(text));
    close(file);
    CHECK("init reads it", aclInit(path) == ACL_SUCCESS);
    unlink(path);
    CHECK("no device is set yet", aclrtGetDevice(&device) == ACL_ERROR_RT_CONTEXT_NULL);
    CHECK("who needs a device gets the default",
          aclrtGetCurrentContext(&by_default) == ACL_SUCCESS && aclrtGetDevice(&device) == ACL_SUCCESS && device == 1);
    aclrtSetDevice(1);
    aclrtGetCurrentContext(&explicitly);
    CHECK("it is the same as if set", by_default == explicitly);
}

static void missing_configuration(unsigned rank, unsigned size)
{
    UNUSED_RANK;
    CHECK("a configuration that is not there is refused", aclInit("/nowhere/acl.json") == ACL_ERROR_INVALID_PARAM);
}

static void contexts(unsigned rank, unsigned size)
{
    aclrtContext zero, one, other;
    int32_t active = 1;
    int device = -1;

    UNUSED_RANK;
    CHECK("no device is in use", aclrtGetPrimaryCtxState(0, NULL, &active) == ACL_SUCCESS && !active);
    CHECK("both devices can be set",
          !aclrtSetDevice(0) && !aclrtGetCurrentContext(&zero) && !aclrtSetDevice(1) && !aclrtGetCurrentContext(&one));
    CHECK("they have different contexts", zero != one);
    CHECK("a context stands for its device", !aclrtSetCurrentContext(zero) && !aclrtGetDevice(&device) && device == 0);
    CHECK("nonsense is not a context", aclrtSetCurrentContext(&device) == ACL_ERROR_RT_CONTEXT_NULL);
    CHECK("the device is in use", !aclrtGetPrimaryCtxState(0, NULL, &active) && active);
    CHECK("a reset undoes it", !aclrtResetDevice(0));
    CHECK("its thread has no device then", aclrtGetCurrentContext(&other) == ACL_ERROR_RT_CONTEXT_NULL);
    CHECK("its context is none", aclrtSetCurrentContext(zero) == ACL_ERROR_RT_CONTEXT_NULL);
    CHECK("another reset is refused", aclrtResetDevice(0) == ACL_ERROR_RT_CONTEXT_NULL);
    CHECK("the other device is untouched", !aclrtSetCurrentContext(one));
    CHECK("device 2 is not there",
          aclrtSetDevice(2) == ACL_ERROR_RT_INVALID_DEVICEID && aclrtSetDevice(-1) == ACL_ERROR_RT_INVALID_DEVICEID);
}

static void properties(unsigned rank, unsigned size)
{
    aclCANNPackageVersion version;
    const aclCannAttr *attributes;
    char text[ACL_PKG_VERSION_MAX_SIZE], driver[] = "driver";
    int32_t can_access = -1, value = -1;
    int64_t cores = 0, same = 0;
    size_t count = 0;

    UNUSED_RANK;
    CHECK("the chip is an Ascend 910B1", !strcmp(aclrtGetSocName(), "Ascend910B1"));
    CHECK("it has cores", !aclrtGetDeviceInfo(0, ACL_DEV_ATTR_CUBE_CORE_NUM, &cores) && cores == 24 &&
                              !aclGetDeviceCapability(0, ACL_DEVICE_INFO_AI_CORE_NUM, &same) && same == 24);
    CHECK("unknown properties are refused",
          aclrtGetDeviceInfo(0, (aclrtDevAttr)9999, &cores) == ACL_ERROR_RT_FEATURE_NOT_SUPPORT);
    CHECK("devices reach each other", !aclrtDeviceCanAccessPeer(&can_access, 0, 1) && can_access == 1 &&
                                          !aclrtSetDevice(0) && !aclrtDeviceEnablePeerAccess(1, 0) &&
                                          aclrtDeviceEnablePeerAccess(0, 0));
    CHECK("CANN has a version", !aclsysGetCANNVersion(ACL_PKG_NAME_CANN, &version) && version.version[0] == '9' &&
                                    !aclsysGetVersionStr(driver, text) && !strncmp(text, "25.", 3));
    CHECK("infinities are supported", !aclGetCannAttributeList(&attributes, &count) && count == 2 &&
                                          !aclGetCannAttribute(ACL_CANN_ATTR_INF_NAN, &value) && value == 1);
}

static void errors(unsigned rank, unsigned size)
{
    UNUSED_RANK;
    CHECK("there is no error at first", !*aclGetRecentErrMsg() && !aclrtPeekAtLastError(ACL_RT_THREAD_LEVEL));
    aclrtSetDevice(77);
    CHECK("the last error can be looked at",
          aclrtPeekAtLastError(ACL_RT_THREAD_LEVEL) == ACL_ERROR_RT_INVALID_DEVICEID);
    CHECK("and taken", aclrtGetLastError(ACL_RT_THREAD_LEVEL) == ACL_ERROR_RT_INVALID_DEVICEID &&
                           aclrtGetLastError(ACL_RT_THREAD_LEVEL) == ACL_SUCCESS);
    CHECK("the message names the function", strstr(aclGetRecentErrMsg(), "aclrtSetDevice: there is no device 77"));
    CHECK("it is told once", !*aclGetRecentErrMsg());
}

int main(void)
{
    CHECK("defaults", alone(defaults));
    CHECK("wrong number of devices", alone(wrong_count));
    CHECK("wrong memory", alone(wrong_memory));
    CHECK("chosen SoC", alone(chosen_soc));
    CHECK("wrong SoC", alone(wrong_soc));
    CHECK("wrong timeout", alone(wrong_timeout));
    CHECK("wrong timeout of connections", alone(wrong_connect_timeout));
    CHECK("memory with unit", alone(memory_with_unit));
    CHECK("some devices visible", alone(some_visible));
    CHECK("no device visible", alone(none_visible));
    CHECK("visible devices out of order", alone(unordered_visible));
    CHECK("a visible device repeated", alone(repeated_visible));
    CHECK("visible device that is not there", alone(too_many_visible));
    CHECK("threads", alone(threads));
    CHECK("default device", alone(default_device));
    CHECK("missing configuration", alone(missing_configuration));
    CHECK("contexts", alone(contexts));
    CHECK("properties", alone(properties));
    CHECK("errors", alone(errors));
    return REPORT();
}
