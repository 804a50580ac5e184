#include "stream.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string_view>

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "cann_sim.h"
#include "memory.h"
#include "torch_npu/csrc/core/npu/NPUStream.h"
#include "torch_npu/csrc/framework/OpCommand.h"

namespace cann_sim
{
namespace
{

// Once all that is in torch-npu's queue has reached the stream.
aclrtStream current_stream(c10::Device device)
{
    return c10_npu::getCurrentNPUStream(device.index()).stream();
}

// While the queue may still have work for the stream.
aclrtStream current_stream_now(c10::Device device)
{
    return c10_npu::getCurrentNPUStream(device.index()).stream(false);
}

// Results go where memory was made for them before. Operators in place are there already.
void put(const c10::IValue &result, const c10::IValue &place)
{
    if (result.isTensor() && result.toTensor().defined()) {
        auto target = place.toTensor();
        const auto &source = result.toTensor();

        TORCH_CHECK(source.sizes() == target.sizes(), "it returned ", source.sizes(), " instead of ", target.sizes());
        if (source.data_ptr() != target.data_ptr())
            target.copy_(source);
    } else if (result.isTensorList()) {
        const auto sources = result.toTensorVector(), targets = place.toTensorVector();

        for (size_t i = 0; i < sources.size(); i++)
            put(sources[i], targets[i]);
    }
}

aclError run(Node &node, const char *occasion)
{
    try {
        at::AutoDispatchBelowADInplaceOrView guard;
        torch::jit::Stack stack = node.arguments;
        Filled filled(node.copies);

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
        std::fprintf(stderr, "cann_sim: %s of %s: %s\n", occasion, node.op.schema().name().c_str(), error.what());
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
    return cann_sim_capturing(current_stream_now(device));
}

bool has_queue()
{
    static const bool has = [] {
        const char *setting = std::getenv("TASK_QUEUE_ENABLE");
        return !setting || std::string_view(setting) != "0";
    }();
    return has;
}

void enqueue(c10::Device device, Node node)
{
    const auto stream = current_stream_now(device);
    const auto kept = std::make_shared<Node>(std::move(node));

    at_npu::native::OpCommand::RunOpApi(kept->op.schema().name(), [kept, stream]() -> int {
        const auto error = cann_sim_wait_for_turn(stream);
        return error ? error : run(*kept, "launch");
    });
}

void record(c10::Device device, Node node)
{
    auto name = node.op.schema().name();
    const cann_sim_node entry = {
        name.c_str(),
        [](void *argument) { return run(*static_cast<Node *>(argument), "replay"); },
        [](void *argument) { delete static_cast<Node *>(argument); },
        new Node(std::move(node)),
        0,
    };
    const auto error = cann_sim_record(current_stream(device), &entry);

    TORCH_CHECK(!error, name, " cannot be captured, error ", error, ": ", aclGetRecentErrMsg());
}

} // namespace cann_sim
