#include "stream.h"

#include <cstdio>

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "cann_sim.h"
#include "memory.h"

namespace cann_sim
{
namespace
{

aclrtStream current_stream(c10::Device device)
{
    return c10::impl::getDeviceGuardImpl(NPU)->getStream(device).native_handle();
}

// What the results of the capture were is where those of a replay go. Operators in place are there already.
void put(const c10::IValue &result, const c10::IValue &place)
{
    if (result.isTensor() && result.toTensor().defined()) {
        auto target = place.toTensor();
        const auto &source = result.toTensor();

        TORCH_CHECK(source.sizes() == target.sizes(), "a replay returned ", source.sizes(), ", the capture ",
                    target.sizes());
        if (source.data_ptr() != target.data_ptr())
            target.copy_(source);
    } else if (result.isTensorList()) {
        const auto sources = result.toTensorVector(), targets = place.toTensorVector();

        for (size_t i = 0; i < sources.size(); i++)
            put(sources[i], targets[i]);
    }
}

aclError replay(void *argument)
{
    auto &node = *static_cast<Node *>(argument);

    try {
        at::AutoDispatchBelowADInplaceOrView guard;
        torch::jit::Stack stack = node.arguments;

        if (node.draw)
            node.draw->repeat();
        {
            std::optional<DefaultGeneratorDraws> draws;
            if (node.draws_by_default)
                draws.emplace(*node.draw);
            node.op.callBoxed(&stack);
        }
        for (size_t i = 0; i < node.results.size(); i++)
            put(stack[i], node.results[i]);
        return ACL_SUCCESS;
    } catch (const std::exception &error) {
        std::fprintf(stderr, "cann_sim: replay of %s: %s\n", node.op.schema().name().c_str(), error.what());
        return ACL_ERROR_INTERNAL_ERROR;
    }
}

} // namespace

void wait_for_turn(c10::Device device)
{
    const auto error = cann_sim_wait_for_turn(current_stream(device));

    TORCH_CHECK(!error, "work before this in the stream of ", device, " failed with ", error, ": ",
                aclGetRecentErrMsg());
}

bool is_captured(c10::Device device)
{
    return cann_sim_capturing(current_stream(device));
}

void record(c10::Device device, Node node)
{
    auto name = node.op.schema().name();
    const cann_sim_node entry = {
        name.c_str(),
        replay,
        [](void *argument) { delete static_cast<Node *>(argument); },
        new Node(std::move(node)),
        0,
    };
    const auto error = cann_sim_record(current_stream(device), &entry);

    TORCH_CHECK(!error, name, " cannot be captured, error ", error, ": ", aclGetRecentErrMsg());
}

} // namespace cann_sim
