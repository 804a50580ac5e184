#include "memory.h"

#include <cstring>

#include <c10/core/CPUAllocator.h>

#include "cann_sim.h"

namespace cann_sim
{
namespace
{

c10::Allocator *host_allocator;
thread_local int depth;

c10::Allocator &device_allocator()
{
    return *c10::GetAllocator(NPU);
}

// Users of the raw interface (oneDNN) have nothing but the address when they free.
void free_raw(void *address)
{
    auto &owner = cann_sim_device_of(address, 1) < 0 ? *host_allocator : device_allocator();
    owner.raw_deleter()(address);
}

class WrappedAllocator final : public c10::Allocator
{
  public:
    c10::DataPtr allocate(size_t size) override
    {
        if (!depth || !size)
            return host_allocator->allocate(size);
        auto memory = device_allocator().allocate(size);
        TORCH_CHECK(memory.get() == memory.get_context(),
                    "cann_sim: torch-npu's allocator returned memory that is not its own context");
        memory.unsafe_set_device(c10::DeviceType::CPU);
        return memory;
    }

    c10::DeleterFnPtr raw_deleter() const override
    {
        return free_raw;
    }

    void copy_data(void *target, const void *source, size_t size) const override
    {
        default_copy_data(target, source, size);
    }
};

} // namespace

void wrap_cpu_allocator()
{
    constexpr uint8_t above_all_others = 255;

    host_allocator = c10::GetCPUAllocator();
    c10::SetCPUAllocator(new WrappedAllocator, above_all_others); // for as long as anybody may free memory
}

DeviceAllocations::DeviceAllocations()
{
    depth++;
}

DeviceAllocations::~DeviceAllocations()
{
    depth--;
}

void give_memory(c10::StorageImpl &device, c10::StorageImpl &host)
{
    const auto size = host.nbytes();
    auto &memory = host._mutable_data_ptr_no_checks();
    auto target = device.device();

    if (size && memory.get_deleter() == device_allocator().raw_deleter()) {
        const auto free = memory.get_deleter();
        void *address = memory.release_context();
        device.set_data_ptr_noswap({address, address, free, target});
    } else {
        auto copy = device_allocator().allocate(size);
        if (size)
            std::memcpy(copy.get(), memory.get(), size);
        device.set_data_ptr_noswap(std::move(copy));
    }
    device.set_nbytes(size);
}

} // namespace cann_sim
