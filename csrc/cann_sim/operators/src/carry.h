// Operators of the device, carried by the CPU's operators on aliases of its memory.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

namespace cann_sim
{

// The kernel of every operator: runs the CPU's in this thread when it is the stream's turn, and records it if the
// stream is captured.
void carry(const c10::OperatorHandle &op, torch::jit::Stack *stack);

// The autograd kernel of operators for which torch-npu has one of its own, whose backward needs what is not there:
// upstream's instead.
void differentiate(const c10::OperatorHandle &op, torch::jit::Stack *stack);

} // namespace cann_sim
