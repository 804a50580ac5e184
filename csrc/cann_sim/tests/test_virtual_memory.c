#include <string.h>

#include "cann_sim.h"
#include "children.h"

#define MIB ((size_t)1 << 20)

static size_t free_bytes(void)
{
    size_t left = 0, total;

    aclrtGetMemInfo(ACL_HBM_MEM, &left, &total);
    return left;
}

static void virtual_memory(unsigned rank, unsigned size)
{
    aclrtPhysicalMemProp device = {.location = {1, ACL_MEM_LOCATION_TYPE_DEVICE}};
    aclrtPhysicalMemProp host = {.location = {0, ACL_MEM_LOCATION_TYPE_HOST}};
    aclrtDrvMemHandle first, second, third;
    char *base = NULL, *few = NULL;

    (void)rank, (void)size;
    setenv("CANN_SIM_MEMORY", "8M", 1);
    aclrtSetDevice(1);
    CHECK("addresses cost nothing",
          !aclrtReserveMemAddress((void **)&base, 64 * MIB, 0, NULL, 1) && base && free_bytes() == 8 * MIB);
    CHECK("a few are enough", !aclrtReserveMemAddress((void **)&few, 512, 0, NULL, 1) && !aclrtReleaseMemAddress(few));
    CHECK("none are not", aclrtReserveMemAddress((void **)&few, 0, 0, NULL, 1) == ACL_ERROR_INVALID_PARAM);
    CHECK("memory costs its size", !aclrtMallocPhysical(&first, 4 * MIB, &device, 0) &&
                                       !aclrtMallocPhysical(&second, 4 * MIB, &device, 0) && !free_bytes());
    CHECK("and runs out", aclrtMallocPhysical(&third, 2 * MIB, &device, 0) == ACL_ERROR_RT_MEMORY_ALLOCATION);
    CHECK("host memory is refused", aclrtMallocPhysical(&third, 2 * MIB, &host, 0) == ACL_ERROR_INVALID_PARAM);
    CHECK("both are mapped side by side",
          !aclrtMapMem(base, 4 * MIB, 0, first, 0) && !aclrtMapMem(base + 4 * MIB, 4 * MIB, 0, second, 0));
    CHECK("they are one piece of device memory",
          cann_sim_device_of(base, 8 * MIB) == 1 && cann_sim_device_of(base, 8 * MIB + 1) == -1);
    CHECK("a copy goes across", !aclrtMemset(base, 8 * MIB, 5, 8 * MIB) && base[8 * MIB - 1] == 5);
    CHECK("memory is not mapped over memory", aclrtMapMem(base, 4 * MIB, 0, first, 0) == ACL_ERROR_RT_PARAM_INVALID);
    CHECK("nor where nothing is reserved",
          aclrtMapMem(base + 62 * MIB, 4 * MIB, 0, first, 0) == ACL_ERROR_RT_PARAM_INVALID);
    CHECK("a part is not mapped", aclrtMapMem(base + 8 * MIB, 2 * MIB, 0, first, 0) == ACL_ERROR_RT_PARAM_INVALID);
    CHECK("addresses in use are not released", aclrtReleaseMemAddress(base) == ACL_ERROR_RT_PARAM_INVALID);
    CHECK("memory can be unmapped", !aclrtUnmapMem(base + 4 * MIB) && cann_sim_device_of(base, 8 * MIB) == -1 &&
                                        aclrtUnmapMem(base + 4 * MIB) == ACL_ERROR_RT_PARAM_INVALID);
    CHECK("it keeps its content", !aclrtMapMem(base + 32 * MIB, 4 * MIB, 0, second, 0) && base[32 * MIB] == 5);
    CHECK("freed while mapped it still counts", !aclrtFreePhysical(first) && !free_bytes() && base[0] == 5);
    CHECK("its handle is gone", aclrtFreePhysical(first) == ACL_ERROR_RT_INVALID_HANDLE &&
                                    aclrtMapMem(base + 8 * MIB, 4 * MIB, 0, first, 0) == ACL_ERROR_RT_INVALID_HANDLE);
    CHECK("unmapped it comes back", !aclrtUnmapMem(base) && free_bytes() == 4 * MIB);
    CHECK("all comes back", !aclrtUnmapMem(base + 32 * MIB) && !aclrtFreePhysical(second) && free_bytes() == 8 * MIB);
    CHECK("and the addresses",
          !aclrtReleaseMemAddress(base) && aclrtReleaseMemAddress(base) == ACL_ERROR_RT_PARAM_INVALID);
}

int main(void)
{
    CHECK("virtual memory", alone(virtual_memory));
    return REPORT();
}
