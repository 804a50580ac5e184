#include "alias.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/CPUAllocator.h>

#include "format.h"
#include "memory.h"

namespace cann_sim
{
namespace
{

c10::Storage alias_storage(const c10::Storage &device)
{
    c10::DataPtr borrowed(const_cast<void *>(device.data()), c10::DeviceType::CPU);

    return {c10::Storage::use_byte_size_t(), device.nbytes(), std::move(borrowed), c10::GetCPUAllocator(), true};
}

void copy_metadata(const at::Tensor &from, const at::Tensor &to)
{
    auto *target = to.unsafeGetTensorImpl();

    target->set_storage_offset(from.storage_offset());
    target->set_sizes_and_strides(from.sizes(), from.strides());
    target->_set_conj(from.is_conj());
    target->_set_neg(from.is_neg());
}

at::Tensor alias_on(c10::Storage storage, const at::Tensor &device)
{
    auto host = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                                         device.dtype());
    copy_metadata(device, host);
    return host;
}

bool have_equal_shape(const at::Tensor &a, const at::Tensor &b)
{
    return a.sizes() == b.sizes() && a.strides() == b.strides() && a.storage_offset() == b.storage_offset();
}

} // namespace

bool is_on_device(const at::Tensor &tensor)
{
    return tensor.defined() && tensor.device().type() == NPU && tensor.has_storage();
}

at::Tensor host_alias(const at::Tensor &device)
{
    return alias_on(alias_storage(device.storage()), device);
}

c10::IValue alias_all(const c10::IValue &value)
{
    if (value.isTensor())
        return is_on_device(value.toTensor()) ? host_alias(value.toTensor()) : value.toTensor();
    if (!value.isTensorList())
        return value;
    c10::List<at::Tensor> aliases;
    for (const auto &each : value.toTensorVector())
        aliases.push_back(is_on_device(each) ? host_alias(each) : each);
    return aliases;
}

at::Tensor Aliases::to_host(const at::Tensor &device)
{
    for (const auto &each : tensors_)
        if (each.device.is_same(device))
            return each.host;
    for (const auto &each : storages_)
        if (each.device.is_alias_of(device.storage()))
            return tensors_.emplace_back(Tensors{device, alias_on(each.host, device)}).host;
    storages_.push_back({device.storage(), alias_storage(device.storage()), device});
    return tensors_.emplace_back(Tensors{device, alias_on(storages_.back().host, device)}).host;
}

void Aliases::write_back()
{
    for (auto &each : storages_)
        if (each.host.data() != each.device.data() || each.host.nbytes() != each.device.nbytes()) {
            give_memory(*each.device.unsafeGetStorageImpl(), *each.host.unsafeGetStorageImpl());
            describe(each.owner, each.device);
        }
    for (auto &each : tensors_)
        if (!have_equal_shape(each.device, each.host)) {
            copy_metadata(each.host, each.device);
            if (each.device.storage_offset() == 0)
                describe(each.device, each.device.storage());
        }
}

at::Tensor Aliases::to_device(const at::Tensor &host, c10::Device device)
{
    if (!host.defined())
        return host;
    for (const auto &each : tensors_)
        if (each.host.is_same(host))
            return each.device;
    TORCH_CHECK(host.layout() == c10::kStrided && host.has_storage() && !host.is_quantized(),
                "a result is not a plain strided tensor but ", host.toString(), ", which is not simulated");
    if (host._is_zerotensor()) // which has sizes, but no memory
        return at::zeros(host.sizes(), host.options().device(device));
    for (const auto &each : storages_)
        if (each.host.is_alias_of(host.storage())) {
            at::Tensor view(each.owner.unsafeGetTensorImpl()->shallow_copy_and_detach(c10::VariableVersion(0), true));
            view.unsafeGetTensorImpl()->set_storage_and_dtype(view.storage(), host.dtype());
            copy_metadata(host, view);
            return view;
        }
    auto result = at::empty({0}, host.options().device(device));
    give_memory(*result.storage().unsafeGetStorageImpl(), *host.storage().unsafeGetStorageImpl());
    copy_metadata(host, result);
    describe(result, result.storage());
    storages_.push_back({result.storage(), host.storage(), result});
    return result;
}

} // namespace cann_sim
