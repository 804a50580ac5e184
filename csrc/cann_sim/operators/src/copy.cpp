#include "copy.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/_to_copy_native.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "alias.h"
#include "carry.h"
#include "format.h"
#include "memory.h"
#include "stream.h"

namespace cann_sim
{
namespace
{

const c10::OperatorHandle &copy_operator()
{
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::copy_", "");
    return op;
}

// torch-npu's own kernel of copy_.
const c10::SafeKernelFunction &plain_copy()
{
    static const auto kernel = copy_operator().getComputedKernelForDispatchKey(c10::DispatchKey::PrivateUse1);
    return kernel;
}

bool is_whole(const at::Tensor &tensor)
{
    return tensor.is_contiguous() && !tensor.storage_offset() && !tensor.is_conj() && !tensor.is_neg();
}

bool is_plain(const at::Tensor &target, const at::Tensor &source)
{
    return target.scalar_type() == source.scalar_type() && target.sizes() == source.sizes() && is_whole(target) &&
           is_whole(source);
}

at::Tensor wait_and_alias(const at::Tensor &tensor, std::vector<PlainCopy> &copies)
{
    if (!is_on_device(tensor))
        return tensor;
    c10::DeviceGuard guard(tensor.device());
    wait_for_turn(tensor.device());
    return is_fractal(tensor) ? copies.emplace_back(tensor).seen_as(tensor) : host_alias(tensor);
}

void convert(const at::Tensor &target, const at::Tensor &source)
{
    const auto device = is_on_device(target) ? target.device() : source.device();
    c10::DeviceGuard guard(device);
    at::AutoDispatchBelowADInplaceOrView below_autograd;

    TORCH_CHECK(!is_on_device(target) || !is_fractal(target),
                "aten::copy_: the target is in FRACTAL_NZ, into which the simulator writes by npu_format_cast only");
    std::vector<PlainCopy> copies;
    const auto to = wait_and_alias(target, copies), from = wait_and_alias(source, copies);
    const bool captured = is_captured(device);

    TORCH_CHECK(!captured || (is_on_device(target) && is_on_device(source)),
                "aten::copy_ from ", source.device(), " to ", target.device(),
                " cannot be captured: it converts, for which the host would have to wait");
    {
        Filled filled(copies);
        to.copy_(from);
    }
    if (captured)
        record(device, {copy_operator(), {to, from, false}, {}, std::nullopt, false, std::move(copies)});
}

at::Tensor &copy_(c10::DispatchKeySet keys, at::Tensor &self, const at::Tensor &source, bool non_blocking)
{
    if (is_plain(self, source)) {
        torch::jit::Stack stack{self, source, non_blocking};
        plain_copy().callBoxed(
            copy_operator(),
            keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, c10::DispatchKey::ADInplaceOrView), &stack);
    } else {
        convert(self, source);
    }
    return self;
}

at::Tensor copy_from(const at::Tensor &source, const at::Tensor &target, bool)
{
    convert(target, source);
    return target;
}

at::Tensor copy_from_and_resize(const at::Tensor &source, const at::Tensor &target)
{
    target.resize_(source.sizes());
    convert(target, source);
    return target;
}

// torch-npu keeps the format of a whole tensor. Its own kernel knows more cases, but needs operators of its own for
// them.
void clone(const c10::OperatorHandle &op, torch::jit::Stack *stack)
{
    const auto source = torch::jit::peek(*stack, 0, op.schema().arguments().size()).toTensor();

    if (!is_on_device(source) || !is_whole_fractal(source))
        return carry(op, stack);
    auto copy = at::empty_like(source);
    copy.copy_(source);
    torch::jit::drop(*stack, op.schema().arguments().size());
    stack->emplace_back(copy);
}

} // namespace

void carry_copies()
{
    // Never destroyed: that would take the kernels away from who ends later.
    constexpr auto key = c10::DispatchKey::PrivateUse1;
    auto &library = *new torch::Library(torch::Library::IMPL, "aten", key, __FILE__, __LINE__);

    plain_copy(); // before it is replaced
    library.impl("copy_", TORCH_FN(copy_));
    library.impl("clone", torch::CppFunction::makeFromBoxedFunction<&clone>());
    library.impl("_to_copy", TORCH_FN(at::native::_to_copy));
    library.impl("_copy_from", TORCH_FN(copy_from));
    library.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
}

} // namespace cann_sim
