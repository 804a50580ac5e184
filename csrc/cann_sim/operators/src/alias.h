// The host's view of device tensors during one call of an operator.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

namespace cann_sim
{

bool is_on_device(const at::Tensor &tensor);

// A CPU tensor on the memory of a device tensor. It owns nothing.
at::Tensor host_alias(const at::Tensor &device);

// The same for all tensors of a value: a tensor, or a list of them.
c10::IValue alias_all(const c10::IValue &value);

class Aliases
{
  public:
    // The alias of an argument in a plain format. Tensors that share memory have aliases that do.
    at::Tensor to_host(const at::Tensor &device);

    // After the call: what the operator resized is resized on the device.
    void write_back();

    // The device tensor for a result: an argument, a view of one, or a new tensor that takes over the memory.
    at::Tensor to_device(const at::Tensor &host, c10::Device device);

    bool empty() const
    {
        return tensors_.empty();
    }

  private:
    struct Tensors {
        at::Tensor device, host;
    };
    struct Storages {
        c10::Storage device, host;
        at::Tensor owner; // a device tensor on the storage
    };

    c10::SmallVector<Tensors, 8> tensors_;
    c10::SmallVector<Storages, 8> storages_;
};

} // namespace cann_sim
