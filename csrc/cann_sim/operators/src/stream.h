// The current stream of a device: waiting for it, and the graph it may be captured into.
#pragma once

#include <optional>

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include "format.h"
#include "random.h"

namespace cann_sim
{

// Returns when what was put into the device's current stream is done: only then may the host touch its memory. The
// device must be the current one.
void wait_for_turn(c10::Device device);

bool is_captured(c10::Device device);

// An operator on host aliases of device memory, which runs later or again. Like a kernel that was launched it has
// addresses, not references: the memory is kept by the allocator's order of reuse, or belongs to a graph's pool.
struct Node {
    c10::OperatorHandle op;
    torch::jit::Stack arguments;
    torch::jit::Stack results; // where the results go
    std::optional<Draw> draw;
    bool draws_by_default; // it takes no generator
    std::vector<PlainCopy> copies; // seen by arguments
};

// Whether torch-npu's queue is on: a thread of its own launches what it is given.
bool has_queue();

// Puts an operator into the queue: it runs in the queue's thread, when it is its turn in the device's current stream.
void enqueue(c10::Device device, Node node);

// Appends to the graph that the device's current stream is captured into.
void record(c10::Device device, Node node);

} // namespace cann_sim
