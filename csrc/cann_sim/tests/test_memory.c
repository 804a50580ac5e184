#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "cann_sim.h"
#include "children.h"

#define UNUSED_RANK (void)rank, (void)size
#define MIB ((size_t)1 << 20)

static size_t free_bytes(void)
{
    size_t left = 0, total;

    aclrtGetMemInfo(ACL_HBM_MEM, &left, &total);
    return left;
}

static void allocation(unsigned rank, unsigned size)
{
    void *memory = NULL, *more = NULL;
    int host;

    UNUSED_RANK;
    setenv("CANN_SIM_MEMORY", "16M", 1);
    aclrtSetDevice(1);
    CHECK("memory is there", !aclrtMalloc(&memory, 5 * MIB, ACL_MEM_MALLOC_HUGE_FIRST) && memory);
    CHECK("it is counted", free_bytes() == 11 * MIB);
    CHECK("it is the device's throughout",
          cann_sim_device_of(memory, 5 * MIB) == 1 && cann_sim_device_of((char *)memory + 5 * MIB - 1, 1) == 1);
    CHECK("and ends where it ends",
          cann_sim_device_of(memory, 5 * MIB + 1) == -1 && cann_sim_device_of((char *)memory - 1, 2) == -1);
    CHECK("host memory is nobody's", cann_sim_device_of(&host, sizeof host) == -1);
    CHECK("too much is refused as out of memory",
          aclrtMalloc(&more, 12 * MIB, ACL_MEM_MALLOC_HUGE_FIRST) == ACL_ERROR_RT_MEMORY_ALLOCATION && !more);
    CHECK("the message says what is free", strstr(aclGetRecentErrMsg(), "free"));
    CHECK("all that is left can be had", !aclrtMalloc(&more, 11 * MIB, ACL_MEM_MALLOC_HUGE_FIRST) && !free_bytes());
    CHECK("another device has its own", !aclrtSetDevice(0) && free_bytes() == 16 * MIB);
    CHECK("a part cannot be freed", aclrtFree((char *)memory + 4096) == ACL_ERROR_RT_PARAM_INVALID);
    CHECK("memory can be freed from another device", !aclrtFree(memory) && !aclrtFree(more));
    CHECK("but once", aclrtFree(memory) == ACL_ERROR_RT_PARAM_INVALID);
    CHECK("host memory cannot be freed", aclrtFree(&host) == ACL_ERROR_RT_PARAM_INVALID);
    CHECK("it all comes back", !aclrtSetDevice(1) && free_bytes() == 16 * MIB);
    CHECK("nothing cannot be allocated", aclrtMalloc(&memory, 0, ACL_MEM_MALLOC_HUGE_FIRST) == ACL_ERROR_INVALID_PARAM);
}

static void many_allocations(unsigned rank, unsigned size)
{
    enum { COUNT = 2000 };
    static void *memory[COUNT];
    int wrong = 0;

    UNUSED_RANK;
    aclrtSetDevice(0);
    srand(1);
    for (int step = 0; step < 20000; step++) {
        int i = rand() % COUNT;
        size_t length = 4096 + (size_t)i * 16;

        if (memory[i]) {
            wrong += cann_sim_device_of(memory[i], length) != 0 || aclrtFree(memory[i]);
            memory[i] = NULL;
        } else {
            wrong += aclrtMalloc(&memory[i], length, ACL_MEM_MALLOC_HUGE_FIRST) != 0;
        }
    }
    for (int i = 0; i < COUNT; i++)
        if (memory[i])
            wrong += aclrtFree(memory[i]) != 0;
    CHECK("thousands of allocations come and go", !wrong && free_bytes() == (size_t)4 << 30);
}

static void copies(unsigned rank, unsigned size)
{
    char host[100], back[100];
    char *zero, *one, *pinned;

    UNUSED_RANK;
    for (int i = 0; i < 100; i++)
        host[i] = (char)i;
    aclrtSetDevice(1);
    aclrtMalloc((void **)&one, 4096, ACL_MEM_MALLOC_HUGE_FIRST);
    aclrtSetDevice(0);
    aclrtMalloc((void **)&zero, 4096, ACL_MEM_MALLOC_HUGE_FIRST);
    aclrtMallocHost((void **)&pinned, 4096);
    CHECK("host to device", !aclrtMemcpy(zero, 4096, host, 100, ACL_MEMCPY_HOST_TO_DEVICE));
    CHECK("device to device", !aclrtMemcpy(one, 4096, zero, 100, ACL_MEMCPY_DEVICE_TO_DEVICE));
    CHECK("device to pinned host memory", !aclrtMemcpy(pinned, 4096, one, 100, ACL_MEMCPY_DEVICE_TO_HOST));
    CHECK("host to host", !aclrtMemcpy(back, 100, pinned, 100, ACL_MEMCPY_HOST_TO_HOST));
    CHECK("the bytes arrive", !memcmp(back, host, 100));
    CHECK("the direction may be left to the addresses",
          !aclrtMemcpy(one, 4096, host + 50, 10, ACL_MEMCPY_DEFAULT) && one[0] == 50);
    CHECK("in a stream", !aclrtMemcpyAsync(zero + 7, 4089, one, 3, ACL_MEMCPY_DEVICE_TO_DEVICE, NULL) && zero[7] == 50);
    CHECK("no bytes are no error", !aclrtMemcpy(one, 4096, host, 0, ACL_MEMCPY_HOST_TO_DEVICE));
    CHECK("host to device needs a device's address",
          aclrtMemcpy(back, 100, host, 100, ACL_MEMCPY_HOST_TO_DEVICE) == ACL_ERROR_RT_PARAM_INVALID);
    CHECK("and a host's", aclrtMemcpy(zero, 4096, one, 100, ACL_MEMCPY_HOST_TO_DEVICE) == ACL_ERROR_RT_PARAM_INVALID);
    CHECK("device to host needs a host's",
          aclrtMemcpy(zero, 4096, one, 100, ACL_MEMCPY_DEVICE_TO_HOST) == ACL_ERROR_RT_PARAM_INVALID &&
              aclrtMemcpyAsync(zero, 4096, one, 100, ACL_MEMCPY_DEVICE_TO_HOST, NULL) == ACL_ERROR_RT_PARAM_INVALID);
    CHECK("more than there is room for is refused",
          aclrtMemcpy(zero, 99, host, 100, ACL_MEMCPY_HOST_TO_DEVICE) == ACL_ERROR_INVALID_PARAM);
    CHECK("beyond the allocation is refused",
          aclrtMemcpy(zero + 4000, 100, host, 100, ACL_MEMCPY_HOST_TO_DEVICE) == ACL_ERROR_RT_PARAM_INVALID);
    CHECK("an unknown direction is refused",
          aclrtMemcpy(zero, 4096, host, 100, (aclrtMemcpyKind)42) == ACL_ERROR_INVALID_PARAM);
    CHECK("fills", !aclrtMemset(zero, 4096, 0x7e, 4096) && zero[4095] == 0x7e &&
                       !aclrtMemsetAsync(zero, 4096, 1, 10, NULL) && zero[9] == 1 && zero[10] == 0x7e);
    CHECK("fills keep to their room", aclrtMemset(zero, 10, 0, 11) == ACL_ERROR_INVALID_PARAM &&
                                          aclrtMemset(zero + 4090, 100, 0, 100) == ACL_ERROR_RT_PARAM_INVALID);
    aclrtFree(zero);
    CHECK("freed memory is no longer a device's",
          aclrtMemcpy(zero, 4096, host, 100, ACL_MEMCPY_HOST_TO_DEVICE) == ACL_ERROR_RT_PARAM_INVALID);
    aclrtFree(one);
    aclrtFreeHost(pinned);
}

static aclrtMemLocationType place_of(const void *address)
{
    aclrtPtrAttributes attributes;

    return aclrtPointerGetAttributes(address, &attributes) ? (aclrtMemLocationType)-1 : attributes.location.type;
}

static void pinned_memory(unsigned rank, unsigned size)
{
    char *pinned = NULL, *device, *own = malloc(8192);
    void *mapped = NULL;

    UNUSED_RANK;
    aclrtSetDevice(1);
    aclrtMalloc((void **)&device, 4096, ACL_MEM_MALLOC_HUGE_FIRST);
    CHECK("pinned memory needs no device", !aclrtMallocHostWithCfg((void **)&pinned, 100, NULL) && pinned);
    CHECK("addresses know where they are", place_of(pinned) == ACL_MEM_LOCATION_TYPE_HOST &&
                                               place_of(device) == ACL_MEM_LOCATION_TYPE_DEVICE &&
                                               place_of(own) == ACL_MEM_LOCATION_TYPE_UNREGISTERED);
    CHECK("own memory can be pinned", !aclrtHostRegister(own, 8192, ACL_HOST_REGISTER_MAPPED, &mapped) &&
                                          mapped == own && place_of(own + 8191) == ACL_MEM_LOCATION_TYPE_HOST);
    CHECK("but not twice", aclrtHostRegisterV2(own + 4096, 10, 0) == ACL_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
    CHECK("and unpinned", !aclrtHostUnregister(own) && place_of(own) == ACL_MEM_LOCATION_TYPE_UNREGISTERED);
    CHECK("once", aclrtHostUnregister(own) == ACL_ERROR_HOST_MEMORY_NOT_REGISTERED);
    CHECK("each is freed by its own function", aclrtFree(pinned) == ACL_ERROR_RT_PARAM_INVALID &&
                                                   aclrtFreeHost(device) == ACL_ERROR_RT_PARAM_INVALID &&
                                                   !aclrtFreeHost(pinned) && !aclrtFree(device));
    free(own);
}

static void poison(unsigned rank, unsigned size)
{
    unsigned char *memory = NULL;

    UNUSED_RANK;
    setenv("CANN_SIM_POISON", "1", 1);
    aclrtSetDevice(0);
    aclrtMalloc((void **)&memory, 4096, ACL_MEM_MALLOC_HUGE_FIRST);
    CHECK("fresh memory is garbage if asked for", memory[0] && memory[4095]);
    aclrtFree(memory);
}

int main(void)
{
    CHECK("allocation", alone(allocation));
    CHECK("many allocations", alone(many_allocations));
    CHECK("copies", alone(copies));
    CHECK("pinned memory", alone(pinned_memory));
    CHECK("poison", alone(poison));
    return REPORT();
}
