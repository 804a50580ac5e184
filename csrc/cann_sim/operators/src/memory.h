// Device memory for the CPU's operators.
//
// An operator that runs on the host allocates its results with the CPU's allocator. That allocator is wrapped once:
// while a DeviceAllocations lives, its thread is given memory of torch-npu's allocator instead, so that statistics and
// exhaustion are those of the device, and a result becomes a device tensor's memory without being copied.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/StorageImpl.h>

namespace cann_sim
{

constexpr auto NPU = c10::DeviceType::PrivateUse1;

void wrap_cpu_allocator();

class DeviceAllocations
{
  public:
    DeviceAllocations();
    ~DeviceAllocations();
    DeviceAllocations(const DeviceAllocations &) = delete;
    DeviceAllocations &operator=(const DeviceAllocations &) = delete;
};

// Gives the bytes of `host` to `device`: the memory itself if it is the device's, otherwise a copy. `host` keeps a
// pointer that it does not own.
void give_memory(c10::StorageImpl &device, c10::StorageImpl &host);

} // namespace cann_sim
