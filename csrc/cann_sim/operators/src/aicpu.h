// Operators that a device runs on its few AICPU cores: slowly, in every layer and every replay of a graph.
#pragma once

#include <string>

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <c10/util/ArrayRef.h>

namespace cann_sim
{

// Counts the operator if a device runs it on AICPU with these arguments, and warns of it in a capture.
void note_aicpu(const c10::OperatorHandle &op, c10::ArrayRef<c10::IValue> arguments, bool is_captured);

// How often such operators were called in this process, by name. Replays do not count.
c10::Dict<std::string, int64_t> aicpu_operators();

} // namespace cann_sim
