// The current stream of a device: waiting for it, and the graph it may be captured into.
#pragma once

#include <optional>

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include "random.h"

namespace cann_sim
{

// Returns when what was put into the device's current stream is done: only then may the host touch its memory. The
// device must be the current one.
void wait_for_turn(c10::Device device);

bool is_captured(c10::Device device);

// An operator on host aliases of device memory that a graph repeats. Like a node of a real graph it has addresses, not
// references: the memory belongs to the graph's pool.
struct Node {
    c10::OperatorHandle op;
    torch::jit::Stack arguments;
    torch::jit::Stack results; // where the results of the capture are
    std::optional<Draw> draw;
    bool draws_by_default; // it takes no generator
};

// Appends to the graph that the device's current stream is captured into.
void record(c10::Device device, Node node);

} // namespace cann_sim
